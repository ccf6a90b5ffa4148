"""The model card of a run for the Hub, made from the files of the run: its record and the saved model.

A script that knows more about its run saves it as `card.json` (`save_facts`), which then takes precedence over the
record. The template is model_card.md, next to this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import write_atomically
from .loading import saved_model
from .parameters import data_parallel_bytes
from .record import BYTES, Record, read_record

TEMPLATE = Path(__file__).with_name("model_card.md")
FACTS = "card.json"  # in the folder of a run
MARK = "<!-- written by hf-lsam -->"  # in every card; one without it was written by hand
# Fields of a configuration that say nothing about how the model was trained.
UNPUBLISHED = ("output_dir", "shared_memory_dir", "server_address", "server_port")


@dataclass(frozen=True)
class CardFacts:
    """The contents of a card.

    Args:
        name: name of the model.
        method: short name of the method; used as a tag of the card, except for "lsam", which has tags of its own.
        num_workers: n.
        metrics: (name, value) pairs of the held-out results.
        results: (label, value) rows of the table of results.
        compared: header and rows of the table that compares the model with others, or None if there is no comparison.
        against: one sentence below that table, or in its place.
        base: the pretrained model it was fine-tuned from, or None.
        data: what it was trained on, or None.
        on_hub: whether `data` is the name of a dataset on the Hub.
        examples: number of training examples, or None.
        task: the pipeline tag, or None.
        library: one of the Hub's library names, or None.
        loading: Python source that loads the model, or None if no model was published.
        configuration: the configuration it was trained with.
        provenance: one line: hardware, versions, commit, date.
        curves: whether curves.png lies next to the card.
        seeds: the seeds over which the results are averaged.
        method_name: the method in words.
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
    method_name: str = "LSAM"


def model_card(facts: CardFacts, **metadata: Any) -> ModelCard:
    """Renders the card.

    Args:
        metadata: further fields of the card's YAML header, such as `license` and `language`; `tags` are added to
            LSAM's.
    """
    tags = ["lsam", "sharpness-aware-minimization"] if facts.method == "lsam" else [facts.method]
    data: dict[str, Any] = {
        "base_model": facts.base if facts.base and is_hub_name(facts.base) else None,
        "datasets": [facts.data] if facts.on_hub else None,
        "library_name": facts.library,
        "metrics": [name for name, _ in facts.metrics if name != "loss"] or None,
        "model_name": facts.name,
        "pipeline_tag": facts.task,
        "eval_results": [
            EvalResult(
                task_type=facts.task or "other",
                dataset_type=(facts.data if facts.on_hub else None) or "other",
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
    known = {key: without_folder(value) for key, value in configuration if value is not None and key not in UNPUBLISHED}
    return ModelCard.from_template(
        ModelCardData(**data),
        template_path=str(TEMPLATE),
        mark=MARK,
        facts=facts,
        base=without_folder(facts.base),
        configuration=json.dumps(known, indent=2, sort_keys=True, default=str),
    )


# --- what a run has left ---


def save_facts(run_dir: Path, facts: CardFacts) -> None:
    """Saves `facts` in the folder of a run, for `facts_of_run`."""
    write_atomically(run_dir / FACTS, json.dumps(asdict(facts), indent=1, default=str) + "\n")


def facts_of_run(run_dir: Path) -> CardFacts:
    """What a script saved about its run with `save_facts`, or else what the run's record and the saved model say.

    Args:
        run_dir: the run's output_dir.

    Raises:
        FileNotFoundError: if it holds neither such facts nor a record.
        ValueError: if what it holds is damaged or of an unknown format.
    """
    path = run_dir / FACTS
    if not path.exists():
        return facts_of_record(run_dir, read_record(run_dir))
    try:
        return CardFacts(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a results file that a card can be made from ({error!r}). Move it away to make the "
            "card from the run's record alone, or let the script write it again."
        ) from error


def facts_of_record(run_dir: Path, record: Record) -> CardFacts:
    """What the record of a run and the model in `run_dir` say."""
    record = record.made_once()
    run, workers = record.run, record.workers
    evaluated_at, measured = record.latest_evaluation()
    metrics = [(name.removeprefix("eval_"), value) for name, value in measured.items()]
    last: dict[int, dict[str, Any]] = {rank: next(reversed(record.points(rank)), {}) for rank in workers}
    steps = [point.get("step", 0) for point in last.values()]
    at = "the anchor" if evaluated_at == last.get(0, {}).get("step", 0) else f"the anchor of step {evaluated_at:,}"
    exchanged = sum(point.get(name, 0) for point in last.values() for name in BYTES)
    parallel = data_parallel_bytes(steps, run["model"]["trainable_parameters"])
    rows = [
        ("Method", "LSAM"),
        ("Workers", f"{run['num_workers']}; steps {', '.join(map(str, steps))}"),
        ("Trained parameters", f"{run['model']['trainable_parameters']:,}"),
        *((f"{titled(name)} at {at}", f"{value:.4f}") for name, value in metrics),
        ("Server updates", f"{max((point.get('lsam/anchor_version', 0) for point in last.values()), default=0)}"),
        ("Bytes exchanged", megabytes(exchanged)),
        ("  data-parallel SAM", f"{megabytes(parallel)} for the same steps"),
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
        **saved_model(run_dir, run["model"].get("labels"), run["model"].get("class")),
    )


def comparison(facts: CardFacts, others: Sequence[CardFacts]) -> dict[str, Any]:
    """The fields of `CardFacts` that compare one run with others, on the metrics that all of them have."""
    everyone = [facts, *others]
    shared = [name for name, _ in facts.metrics if all(name in dict(each.metrics) for each in others)]
    rows = []
    for each in everyone:
        values, results = dict(each.metrics), dict(each.results)
        measured = [f"{values[name]:.4f}" for name in shared]
        rows.append((each.name, each.method_name, str(each.num_workers), *measured))
        rows[-1] += (results.get("Bytes exchanged", "-"),)
    header = ("run", "method", "workers", *(titled(name) for name in shared), "exchanged")
    differ = [
        f"`{each.name}` differs in "
        + ", ".join(
            f"{key} ({each.configuration.get(key)})"
            for key in sorted(facts.configuration.keys() & each.configuration.keys())
            if key not in UNPUBLISHED and each.configuration[key] != facts.configuration[key]
        )
        for each in others
    ]
    return {"compared": (header, rows), "against": f"{'; '.join(differ)}." if differ else ""}


# --- how numbers and names are written ---


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
    """Whether a name could be that of a repository on the Hub, and is not a path on this machine."""
    if not name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return False
    return not Path(name).exists()


def without_folder(value: Any) -> Any:
    """Strips the folder from an absolute path, because cards and reports are published."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def titled(metric: str) -> str:
    """The name of a metric as it appears at the beginning of a table cell."""
    name = metric.replace("_", " ")
    return name[0].upper() + name[1:]


def megabytes(count: float) -> str:
    """A number of bytes, in MB."""
    return f"{count / 1e6:,.1f} MB"
