"""The model card of a run for the Hub, from what the run has left: results.json, its record, the saved model.

The template is model_card.md beside this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .parameters import data_parallel_bytes
from .record import Record, read_record

TEMPLATE = Path(__file__).with_name("model_card.md")
MARK = "<!-- written by hf-lsam -->"  # in every card; one without it was written by hand
METHODS = {
    "lsam": "LSAM",
    "sam": "data-parallel SAM",
    "sgd": "data-parallel training without SAM",
    "easgd": "EASGD",
    "lsgd": "LSGD",
}
# Of the model classes of transformers how their names end, the task on the Hub, and peft's name of the task.
TASKS = (
    ("ForSequenceClassification", "text-classification", "SEQ_CLS"),
    ("ForTokenClassification", "token-classification", "TOKEN_CLS"),
    ("ForImageClassification", "image-classification", None),
    ("ForConditionalGeneration", None, "SEQ_2_SEQ_LM"),
    ("ForCausalLM", "text-generation", "CAUSAL_LM"),
    ("LMHeadModel", "text-generation", None),
)
AUTO_CLASSES = {"ForConditionalGeneration": "ForSeq2SeqLM", "LMHeadModel": "ForCausalLM"}
# Fields of a configuration that say nothing of how a model was trained.
NOT_TOLD = ("output_dir", "shared_memory_dir", "server_address")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Args:
        name: of the model.
        method: a key of `METHODS`.
        num_workers: n.
        metrics: (name, value) of the held-out results.
        results: (what, value) rows of the table of results.
        compared: header and rows of what it was compared with; None where it was with nothing.
        against: one sentence below that table, or in its place.
        base: the pretrained model it was fine-tuned from, or None.
        data: what it was trained on, or None.
        on_hub: whether `data` is the name of a dataset on the Hub.
        examples: training examples, or None.
        task: the pipeline tag, or None.
        library: of the Hub's library names, or None.
        loading: Python source that loads it, or None where no model was published.
        configuration: what it was trained with.
        provenance: one line: hardware, versions, commit, date.
        curves: whether curves.png lies beside the card.
        seeds: over which the results are means.
    """

    name: str
    method: str
    num_workers: int
    metrics: list[tuple[str, float]]
    results: list[tuple[str, str]]
    configuration: dict[str, Any]
    provenance: str
    compared: tuple[Sequence[str], list[Sequence[str]]] | None = None
    against: str = "It was compared with no other method."
    base: str | None = None
    data: str | None = None
    on_hub: bool = False
    examples: int | None = None
    task: str | None = None
    library: str | None = None
    loading: str | None = None
    curves: bool = False
    seeds: list[int] = field(default_factory=list)


def model_card(facts: CardFacts, **metadata: Any) -> ModelCard:
    """The card.

    Args:
        metadata: further fields of the card's YAML header, such as `license` and `language`; `tags` come beside LSAM's.
    """
    tags = ["lsam", "sharpness-aware-minimization"] if facts.method == "lsam" else [facts.method]
    data = {
        "base_model": facts.base if facts.base and is_hub_name(facts.base) else None,
        "datasets": [facts.data] if facts.on_hub else None,
        "library_name": facts.library,
        "metrics": [name for name, _ in facts.metrics if name != "loss"] or None,
        "model_name": facts.name,
        "pipeline_tag": facts.task,
        "eval_results": [
            EvalResult(
                task_type=facts.task or "other",
                dataset_type=facts.data if facts.on_hub else "other",
                dataset_name=facts.data or "held-out data",
                metric_type=name,
                metric_value=value,
            )
            for name, value in facts.metrics
        ],
    }
    given = {key: value for key, value in metadata.items() if value is not None}
    tags += [tag for tag in given.pop("tags", []) if tag not in tags]
    data = {key: value for key, value in {**data, **given, "tags": tags}.items() if value}
    configuration = facts.configuration.items()
    known = {key: told(value) for key, value in configuration if value is not None and key not in NOT_TOLD}
    return ModelCard.from_template(
        ModelCardData(**data),
        template_path=str(TEMPLATE),
        mark=MARK,
        facts=facts,
        base=told(facts.base),
        method=METHODS.get(facts.method, facts.method),
        table=markdown_table(("", ""), facts.results),
        comparison=markdown_table(*facts.compared) if facts.compared else None,
        configuration=json.dumps(known, indent=2, sort_keys=True, default=str),
    )


# --- what a run has left ---


def facts_of_run(run_dir: Path) -> CardFacts:
    """Reads results.json, the record and the saved model.

    Args:
        run_dir: the run's output_dir.

    Raises:
        FileNotFoundError: if it holds neither results nor a record.
        ValueError: if one of them is damaged, or of a kind that is not known.
    """
    path = run_dir / "results.json"
    if not path.exists():
        return facts_of_record(run_dir, read_record(run_dir))
    try:
        results = json.loads(path.read_bytes())
        return facts_of_results(run_dir, results)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no results of a run ({error!r}): no card can be made of them. Take it out of the way to have "
            "one from the run's record alone, or let the script write it again."
        ) from error


def facts_of_results(run_dir: Path, results: dict[str, Any]) -> CardFacts:
    """What the results of a script say, beside the model in `run_dir`."""
    configuration = results["configuration"]
    if "metric" in results:
        metrics = [(results["metric"], results[f"eval_{results['metric']}"])]
        if results["metric"] != "loss":
            metrics.append(("loss", results["eval_loss"]))
    else:
        metrics = [("accuracy", results["accuracy"]), ("loss", results["eval_loss"])]
    base = configuration.get("base_model_id") or configuration.get("model_name_or_path")
    named = (configuration.get(key) for key in ("dataset_name", "train_file", "data_dir"))
    data = next(filter(None, named), None)
    on_hub = bool(configuration.get("dataset_name")) and is_hub_name(data)
    return CardFacts(
        run_dir.resolve().name,
        results["method"],
        results["num_workers"],
        metrics,
        result_rows(results),
        configuration,
        provenance_line(results),
        against=_against(results),
        base=base,
        data=data if on_hub or data is None else Path(data).name,
        on_hub=on_hub,
        examples=results.get("train_examples", results.get("train_images")),
        curves=(run_dir / "curves.png").exists(),
        seeds=[results["seed"]] if "seed" in results else [],
        **saved_model(run_dir, results.get("labels")),
    )


def _against(results: dict[str, Any]) -> str:
    alone = "It was compared with no other method."
    before = results.get(f"eval_{results.get('metric')}_before")
    return alone if before is None else "It was compared with the model before training, and with nothing else."


def facts_of_record(run_dir: Path, record: Record) -> CardFacts:
    """What the record of a run says, beside the model in `run_dir`."""
    run, workers = record.run, record.workers
    evaluated = [entry for entry in workers.get(0, []) if any(name.startswith("eval_") for name in entry)]
    timing = ("_runtime", "_per_second", "_preparation_time")
    metrics = [
        (name.removeprefix("eval_"), value)
        for name, value in (evaluated[-1] if evaluated else {}).items()
        if name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(timing)
    ]
    last = {
        rank: next((entry for entry in reversed(entries) if "lsam/drift" in entry), {})
        for rank, entries in workers.items()
    }
    steps = [point.get("step", 0) for point in last.values()]
    exchanged = sum(point.get("lsam/bytes_pushed", 0) + point.get("lsam/bytes_pulled", 0) for point in last.values())
    parallel = data_parallel_bytes(steps, run["model"]["trainable_parameters"])
    rows = [
        ("Method", "LSAM"),
        ("Workers", f"{run['num_workers']}; steps {', '.join(map(str, steps))}"),
        ("Trained parameters", f"{run['model']['trainable_parameters']:,}"),
        *((f"{_capital(name)} at the anchor", f"{value:.4f}") for name, value in metrics),
        ("Server updates", f"{max((point.get('lsam/anchor_version', 0) for point in last.values()), default=0)}"),
        ("Bytes exchanged", _megabytes(exchanged)),
        ("  data-parallel SAM", f"{_megabytes(parallel)} for the same steps"),
    ]
    date = max(entries[-1]["time"] for entries in workers.values()) if workers else run["started"]
    name = run["model"]["name"]
    return CardFacts(
        run_dir.resolve().name,
        "lsam",
        run["num_workers"],
        metrics,
        rows,
        run["configuration"],
        provenance_line({**run, "date": _iso(date)}),
        base=name,
        curves=(run_dir / "curves.png").exists(),
        seeds=[run["configuration"]["seed"]] if "seed" in run["configuration"] else [],
        **saved_model(run_dir),
    )


def saved_model(run_dir: Path, labels: list[str] | None = None) -> dict[str, str | None]:
    """Task, library and loading code of the model that lies in a folder.

    Args:
        labels: of a classifier, where its configuration does not hold them.
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
    return {"task": task, "library": library, "loading": _loading(library, ending, task, labels)}


def _loading(library: str, ending: str | None, task: str | None, labels: list[str] | None) -> str:
    auto = "Auto" if library == "transformers" else "AutoPeft"
    kind = f"{auto}Model{AUTO_CLASSES.get(ending, ending or '')}"
    reader = "AutoImageProcessor" if task == "image-classification" else "AutoTokenizer"
    own = [kind, reader] if library == "transformers" else [reader]
    lines = [f"from transformers import {', '.join(sorted(own))}"]
    lines += [] if library == "transformers" else [f"from peft import {kind}"]
    lines += ["", 'folder = "."  # where this card lies, or its name on the Hub']
    if labels:
        lines += [f"labels = {labels}", f"model = {kind}.from_pretrained(folder, num_labels=len(labels))"]
    else:
        lines += [f"model = {kind}.from_pretrained(folder)"]
    lines += [f"{'processor' if reader == 'AutoImageProcessor' else 'tokenizer'} = {reader}.from_pretrained(folder)"]
    if task == "text-classification" and labels:
        lines += [
            'scores = model.eval()(**tokenizer(["A sentence."], return_tensors="pt")).logits',
            "print(labels[scores.argmax().item()])",
        ]
    return "\n".join(lines)


def comparison(facts: CardFacts, others: Sequence[CardFacts]) -> dict[str, Any]:
    """The fields of `CardFacts` that compare one run with others, in the metrics that all of them have."""
    everyone = [facts, *others]
    shared = [name for name, _ in facts.metrics if all(name in dict(each.metrics) for each in others)]
    rows = []
    for each in everyone:
        values, results = dict(each.metrics), dict(each.results)
        measured = [f"{values[name]:.4f}" for name in shared]
        rows.append((each.name, METHODS.get(each.method, each.method), str(each.num_workers), *measured))
        rows[-1] += (results.get("Bytes exchanged", "-"),)
    header = ("run", "method", "workers", *(_capital(name) for name in shared), "exchanged")
    differ = [
        f"`{each.name}` differs in "
        + ", ".join(
            f"{key} ({each.configuration.get(key)})"
            for key in sorted(facts.configuration.keys() & each.configuration.keys())
            if key not in NOT_TOLD and each.configuration[key] != facts.configuration[key]
        )
        for each in others
    ]
    return {"compared": (header, rows), "against": f"{'; '.join(differ)}." if differ else ""}


# --- tables ---


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value) rows of the results of a script."""
    if "metric" not in results:
        return _image_rows(results)
    asynchronous = results["method"] == "lsam"
    workers = results["num_workers"]
    steps = ", ".join(map(str, results["steps_per_worker"]))
    seconds = ", ".join(f"{median:.3f}" for median in results["median_step_s"])
    where = "at the anchor" if asynchronous else "after"
    key, name = f"eval_{results['metric']}", _capital(results["metric"])
    rows = [
        ("Method", results["method"]),
        ("Workers", f"{workers} on {results['device']}; steps {steps}; median step {seconds} s"),
        ("Training time", f"{results['train_runtime_s']:.0f} s"),
        ("Trained parameters", f"{results['trainable_parameters']:,}"),
        ("Held-out examples", f"{results['eval_examples']:,}"),
        (f"{name} before", f"{results[f'{key}_before']:.4f}"),
        (f"{name} {where}", f"{results[key]:.4f}"),
    ]
    exchanged = _megabytes(exchanged_bytes(results))
    if not asynchronous:
        return [*rows, ("Bytes exchanged", f"{exchanged} (computed, ring all-reduce)")]
    return [
        *rows,
        (f"{name} at the workers", ", ".join(f"{value:.4f}" for value in results[f"{key}_workers"])),
        ("Server updates", f"{results['anchor_version']} from {sum(results['pushes_per_worker'])} pushes"),
        ("Staleness", f"mean {results['staleness']['mean']:.2f}, max {results['staleness']['max']} anchor versions"),
        ("Bytes exchanged", exchanged),
        ("  data-parallel SAM", f"{_megabytes(results['bytes_data_parallel'])} for the same steps"),
    ]


def _image_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("Method", results["method"]),
        ("Workers", f"{results['num_workers']} on {results['device']}; {results['steps_per_worker']} steps each"),
        ("Training time", f"{results['seconds']:.0f} s"),
        ("Held-out images", f"{results['eval_images']:,} of the {results['evaluated_on']}"),
        ("Accuracy", f"{results['accuracy']:.4f}"),
        ("Bytes exchanged", _megabytes(results["bytes"])),
    ]


def exchanged_bytes(results: dict[str, Any]) -> int:
    """Bytes that all workers of a run sent and received."""
    if results["bytes_pushed"] is None:
        return results["bytes_data_parallel"]
    return sum(results["bytes_pushed"]) + sum(results["bytes_pulled"])


def provenance_line(origin: dict[str, Any]) -> str:
    """Hardware, versions, commit and date in one line, as far as they are known."""
    hardware = origin["hardware"]
    parts = [
        ", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]),
        ", ".join(f"{package} {number}" for package, number in origin["versions"].items()),
        f"commit {origin['commit']}" if origin.get("commit") else None,
        origin.get("date"),
    ]
    return "; ".join(filter(None, parts))


def is_hub_name(name: str | None) -> bool:
    """Whether a name may be that of a repository on the Hub, and is no path here."""
    return bool(name and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def told(value: Any) -> Any:
    """Of a file on this machine its name alone: cards and reports are published."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _capital(metric: str) -> str:
    name = metric.replace("_", " ")
    return name[0].upper() + name[1:]


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"
