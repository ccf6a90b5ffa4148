"""What the scripts report with: where a result comes from, tables, plots and model cards."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_lsam.record import hardware, versions

REPOSITORY = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Where and with what a result was measured.

    Returns:
        `commit` (with "-dirty" where files differ from it; None outside a git checkout), `versions` (of Python and of
        the packages that matter), `hardware` (`cpu`, `cores` that this process may use, `memory_gib`, `gpus`) and
        `date` (UTC, ISO 8601).
    """
    git = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": git.stdout.strip() or None,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def data_parallel_bytes(steps_per_worker: Sequence[int], trainable_parameters: int) -> int:
    """Bytes that data-parallel training sends and receives for as many steps, all workers together.

    A ring all-reduce of d float32 gradients among n workers makes each send 2 (n - 1) / n * 4 d bytes a step, and
    receive as many. Data-parallel SAM reduces the second gradient alone, so it exchanges no more than SGD.
    """
    workers = len(steps_per_worker)
    return 2 * sum(steps_per_worker) * 2 * (workers - 1) * 4 * trainable_parameters // workers


def exchanged_bytes(results: dict[str, Any]) -> int:
    """Bytes that all workers of a run sent and received."""
    if results["bytes_pushed"] is None:
        return results["bytes_data_parallel"]
    return sum(results["bytes_pushed"]) + sum(results["bytes_pulled"])


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, and from it the plot of the curves."""
    partial = folder / "results.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(folder / "results.json")
    plot_curves(results, folder / "curves.png")


def write_model_card(folder: Path, results: dict[str, Any]) -> None:
    """Writes the Hub's card of a classifier of sentences."""
    (folder / "README.md").write_text(str(model_card(results)))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without a final newline."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def result_table(results: dict[str, Any], folder: str) -> str:
    """What a run came to, for the end of its output."""
    return text_table([("", ""), *_result_rows(results), ("Saved in", folder)])


def _result_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    asynchronous = results["method"] == "lsam"
    workers = results["num_workers"]
    steps = ", ".join(map(str, results["steps_per_worker"]))
    seconds = ", ".join(f"{median:.3f}" for median in results["median_step_s"])
    where = "at the anchor" if asynchronous else "after"
    key, name = f"eval_{results['metric']}", _metric_name(results)
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


def _metric_name(results: dict[str, Any]) -> str:
    name = results["metric"].replace("_", " ")
    return name[0].upper() + name[1:]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Training loss of each worker, the held-out metric and, for LSAM, the distance to the anchor, against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = results["curves"]
    asynchronous = curves["drift"] is not None
    figure = Figure(figsize=(13.5 if asynchronous else 9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if asynchronous else 2)
    for worker, points in enumerate(curves["loss"]):
        axes[0].plot(*_columns(points), label=f"worker {worker}" if asynchronous else "mean of workers")
    axes[0].set(title="Training loss", xlabel="local step", ylabel="loss")
    axes[0].legend()
    name = _metric_name(results).lower()
    axes[1].plot(*_columns(curves[f"eval_{results['metric']}"]), marker="o")
    axes[1].set(title=f"Held-out {name}{' at the anchor' if asynchronous else ''}", xlabel="local step", ylabel=name)
    if asynchronous:
        for worker, points in enumerate(curves["drift"]):
            axes[2].plot(*_columns(points), label=f"worker {worker}")
        axes[2].set(title="Drift", xlabel="local step", ylabel="||x - y|| / ||y||")
        axes[2].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def model_card(results: dict[str, Any]) -> ModelCard:
    """The Hub's model card of a run, from its results alone (model_cards/template.md)."""
    configuration = results["configuration"]
    source = configuration["dataset_name"] or configuration["train_file"]
    name = Path(configuration["output_dir"]).resolve().name
    base = configuration["base_model_id"]
    if base is None and not Path(configuration["model_name_or_path"]).exists():
        base = configuration["model_name_or_path"]
    on_hub = configuration["dataset_name"] and not Path(configuration["dataset_name"]).exists()
    data = ModelCardData(
        base_model=base,
        datasets=[configuration["dataset_name"]] if on_hub else None,
        library_name="peft" if configuration["use_lora"] else "transformers",
        metrics=["accuracy"],
        model_name=name,
        pipeline_tag="text-classification",
        tags=["lsam", "sharpness-aware-minimization"] if results["method"] == "lsam" else [results["method"]],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=configuration["dataset_name"] if on_hub else Path(source).stem.lower(),
                dataset_name=Path(source).name,
                metric_type="accuracy",
                metric_value=results["eval_accuracy"],
            )
        ],
    )
    hardware = results["hardware"]
    return ModelCard.from_template(
        data,
        template_path=str(REPOSITORY / "model_cards/template.md"),
        name=name,
        base=base or configuration["model_name_or_path"],
        source=source,
        results=results,
        table=markdown_table(("", ""), _result_rows(results)),
        configuration=json.dumps(
            {key: value for key, value in configuration.items() if value is not None}, indent=2, sort_keys=True
        ),
        hardware=", ".join([hardware["cpu"], f"{hardware['cores']} cores", *hardware["gpus"]]),
        versions=", ".join(f"{package} {number}" for package, number in results["versions"].items()),
        lora=configuration["use_lora"],
    )
