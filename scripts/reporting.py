"""What the scripts report with: where a result comes from, tables, plots and model cards."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_lsam.card import facts_of_results, model_card, result_rows
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


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, and from it the plot of the curves and the Hub's card."""
    partial = folder / "results.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(folder / "results.json")
    plot_curves(results, folder / "curves.png")
    (folder / "README.md").write_text(str(model_card(facts_of_results(folder, results))))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def result_table(results: dict[str, Any], folder: str) -> str:
    """What a run came to, for the end of its output."""
    return text_table([("", ""), *result_rows(results), ("Saved in", folder)])


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
    name = results["metric"].replace("_", " ").lower()
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
