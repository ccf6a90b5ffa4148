"""Reports of a run: results.json, a plot of its curves, a model card, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lsam.card import model_card, save_facts
from hf_lsam.files import write_atomically
from recipes.common.card import facts_of_results, result_rows
from recipes.common.results import write_json
from recipes.common.tables import text_table


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Writes results.json, and from the results the plot of the curves and the Hub's card."""
    write_json(folder / "results.json", results, indent=2)
    plot_curves(results, folder / "curves.png")
    write_card(folder, results)


def write_card(folder: Path, results: dict[str, Any]) -> None:
    """Writes the Hub's card, and the facts from which `hf-lsam card` can make it again."""
    facts = facts_of_results(folder, results)
    save_facts(folder, facts)
    write_atomically(folder / "README.md", str(model_card(facts)))


def result_table(results: dict[str, Any], folder: str) -> str:
    """The results of a run as a table, printed at the end."""
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
