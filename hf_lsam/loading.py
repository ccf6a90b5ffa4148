"""What kind of model a folder holds, and the code that loads it, for a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypedDict

# Suffixes of the names of transformers' model classes, and the task on the Hub.
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
# peft's names for tasks, and the suffixes of its and transformers' Auto classes for them.
ADAPTERS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "SEQ_2_SEQ_LM": "ForSeq2SeqLM",
    "CAUSAL_LM": "ForCausalLM",
    "QUESTION_ANS": "ForQuestionAnswering",
    "FEATURE_EXTRACTION": "ForFeatureExtraction",
}
READERS = {
    "processor_config.json": "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}


class SavedModel(TypedDict):
    """The fields of `CardFacts` about loading a model."""

    task: str | None
    library: str | None
    loading: str | None


def saved_model(run_dir: Path, labels: list[str] | None = None, base: str | None = None) -> SavedModel:
    """Task, library and loading code of the model in a folder.

    Args:
        labels: a classifier's labels, if its configuration does not hold them, as an adapter's does not.
        base: name of the class of the model that an adapter was trained on, if known.
    """
    import transformers  # not at the top: what else the card's module offers does not need it

    adapter, config = run_dir / "adapter_config.json", run_dir / "config.json"
    options = ", num_labels=len(labels)" if labels else ""
    if adapter.exists():
        library, ending = "peft", ADAPTERS.get(json.loads(adapter.read_bytes()).get("task_type"), "")
        task = _task(ending or base or "")
        if base is None or _loads(ending, base):
            kind = f"AutoPeftModel{ending}"
            of_transformers, of_peft = [], [kind]
            lines = [f"model = {kind}.from_pretrained(folder{options})"]
        else:
            of_transformers, of_peft = [base], ["PeftConfig", "PeftModel"]
            lines = [
                "name = PeftConfig.from_pretrained(folder).base_model_name_or_path",
                f"model = PeftModel.from_pretrained({base}.from_pretrained(name{options}), folder)",
            ]
    elif config.exists():
        library, kind = "transformers", (json.loads(config.read_bytes()).get("architectures") or ["AutoModel"])[0]
        task = _task(kind)
        of_transformers, of_peft = [kind], []
        lines = [f"model = {kind}.from_pretrained(folder{options})"]
    elif (run_dir / "model.safetensors").exists():
        source = (
            "from safetensors.torch import load_file\n\n"
            'model.load_state_dict(load_file("model.safetensors"))  # into the class that was trained'
        )
        return {"task": None, "library": None, "loading": source}
    else:
        return {"task": None, "library": None, "loading": None}
    reader = next((name for file, name in READERS.items() if (run_dir / file).exists()), None)
    if reader:
        of_transformers.append(reader)
        lines += [f"{'tokenizer' if reader == 'AutoTokenizer' else 'processor'} = {reader}.from_pretrained(folder)"]
    if task == "text-classification" and reader == "AutoTokenizer" and labels and len(labels) > 1:
        lines += [
            'scores = model.eval()(**tokenizer(["A sentence."], return_tensors="pt")).logits',
            "print(labels[scores.argmax().item()])",
        ]
    known = sorted(kind for kind in of_transformers if kind in dir(transformers))
    head = [f"from transformers import {', '.join(known)}"] if known else []
    head += [f"from peft import {', '.join(of_peft)}"] if of_peft else []
    foreign = sorted({*of_transformers} - {*known})
    head += [f"# {kind} is the class that was trained; import it from where it is defined" for kind in foreign]
    head += ["", 'folder = "."  # where this card lies, or its name on the Hub']
    head += [f"labels = {labels}"] if labels else []
    return {"task": task, "library": library, "loading": "\n".join([*head, *lines])}


def _task(kind: str) -> str | None:
    return next((task for suffix, task in TASKS.items() if kind.endswith(suffix)), None)


def _loads(ending: str, base: str) -> bool:
    """Whether peft's Auto class that ends in `ending` would put the adapter on a model of the class `base`."""
    from transformers.models.auto import modeling_auto

    if ending == "ForCausalLM":
        return base in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if ending == "ForSeq2SeqLM":
        return base in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    return True  # its name says it, or peft has saved its class
