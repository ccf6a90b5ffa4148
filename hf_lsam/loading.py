"""What kind of model a folder holds, and the code that loads it, for a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

# Suffix of the names of transformers' model classes, the task on the Hub, and peft's name for the task.
TASKS = (
    ("ForSequenceClassification", "text-classification", "SEQ_CLS"),
    ("ForTokenClassification", "token-classification", "TOKEN_CLS"),
    ("ForImageClassification", "image-classification", None),
    ("ForConditionalGeneration", None, "SEQ_2_SEQ_LM"),
    ("ForCausalLM", "text-generation", "CAUSAL_LM"),
    ("LMHeadModel", "text-generation", None),
)
READERS = {"tokenizer_config.json": "AutoTokenizer", "preprocessor_config.json": "AutoImageProcessor"}
AUTO_CLASSES = {"ForConditionalGeneration": "ForSeq2SeqLM", "LMHeadModel": "ForCausalLM"}


class SavedModel(TypedDict):
    """The fields of `CardFacts` about loading a model."""

    task: str | None
    library: str | None
    loading: str | None


def saved_model(run_dir: Path, labels: list[str] | None = None) -> SavedModel:
    """Task, library and loading code of the model in a folder.

    Args:
        labels: a classifier's labels, if its configuration does not hold them.
    """
    adapter, config = run_dir / "adapter_config.json", run_dir / "config.json"
    if adapter.exists():
        kind = json.loads(adapter.read_bytes()).get("task_type")
        ending, task, _ = next((each for each in TASKS if kind is not None and each[2] == kind), (None, None, None))
        library = "peft"
    elif config.exists():
        kind = (json.loads(config.read_bytes()).get("architectures") or [""])[0]
        ending, task, _ = next((each for each in TASKS if kind.endswith(each[0])), (None, None, None))
        library = "transformers"
    elif (run_dir / "model.safetensors").exists():
        source = (
            "from safetensors.torch import load_file\n\n"
            'model.load_state_dict(load_file("model.safetensors"))  # into the class that was trained'
        )
        return {"task": None, "library": None, "loading": source}
    else:
        return {"task": None, "library": None, "loading": None}
    reader = next((name for file, name in READERS.items() if (run_dir / file).exists()), None)
    return {"task": task, "library": library, "loading": _loading(library, ending, task, labels, reader)}


def _loading(library: str, ending: str | None, task: str | None, labels: list[str] | None, reader: str | None) -> str:
    auto = "Auto" if library == "transformers" else "AutoPeft"
    kind = f"{auto}Model{AUTO_CLASSES.get(ending or '', ending or '')}"
    own = [name for name in (kind if library == "transformers" else None, reader) if name]
    lines = [f"from transformers import {', '.join(sorted(own))}"] if own else []
    lines += [] if library == "transformers" else [f"from peft import {kind}"]
    lines += ["", 'folder = "."  # where this card lies, or its name on the Hub']
    if labels:
        lines += [f"labels = {labels}", f"model = {kind}.from_pretrained(folder, num_labels=len(labels))"]
    else:
        lines += [f"model = {kind}.from_pretrained(folder)"]
    if reader:
        name = "tokenizer" if reader == "AutoTokenizer" else "processor"
        lines += [f"{name} = {reader}.from_pretrained(folder)"]
    if task == "text-classification" and labels and reader:
        lines += [
            'scores = model.eval()(**tokenizer(["A sentence."], return_tensors="pt")).logits',
            "print(labels[scores.argmax().item()])",
        ]
    return "\n".join(lines)
