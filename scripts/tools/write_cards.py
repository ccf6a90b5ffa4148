"""Writes the cards of the published results, model_cards/, from their JSON.

python scripts/tools/write_cards.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_lsam.card import CardFacts, model_card, provenance_line
from hf_lsam.files import write_atomically
from recipes.common.card import METHOD_NAMES
from recipes.common.recipe import load
from recipes.common.results import REPOSITORY
from recipes.common.tables import mean_and_spread
from scripts.common.results import load_results
from scripts.tools.summarize_results import method_label

RECIPES = REPOSITORY / "recipes"
SHARES = ("accuracy", "f1")  # shown in percent
Compared = tuple[Sequence[str], Sequence[Sequence[str]]]  # a header, and rows


def score(row: dict[str, Any]) -> str:
    """The metric of a summary's runs, as text."""
    values = [run[f"eval_{row['metric']}"] for run in row["runs"]]
    return mean_and_spread(values, scale=100) if row["metric"] in SHARES else mean_and_spread(values, digits=4)


def title(metric: str) -> str:
    return f"{metric}, %" if metric in SHARES else metric


def side_by_side(summaries: Sequence[dict[str, Any]]) -> Compared:
    """A table with one row per method."""
    rows = [
        (
            method_label(row),
            score(row),
            f"{row['bytes_exchanged'] / 1e6:,.0f}",
            f"{row['train_runtime_s']['mean']:,.0f}",
            str(len(row["runs"])),
        )
        for row in summaries
    ]
    return ("", f"held-out {title(summaries[0]['metric'])}", "MB exchanged", "seconds", "seeds"), rows


def of_summary(name: str, row: dict[str, Any], compared: Compared, against: str, task: str | None) -> CardFacts:
    """The card of one row of summarize_results.py: a method's runs with several seeds.

    Args:
        name: name of the result, to which the method is added.
        row: the summary.
        compared, against, task: see `CardFacts`.
    """
    runs, configuration, metric = row["runs"], row["configuration"], row["metric"]
    at = "at the anchor" if row["method"] == "lsam" else "of the model"
    rows = [
        ("Workers", f"{row['num_workers']}, of {runs[0]['steps_per_worker'][0]} steps each"),
        ("Trained parameters", f"{row['trainable_parameters']:,}"),
        ("Held-out examples", f"{row['eval_examples']:,}"),
        (f"{metric.capitalize()} {at}{', %' if metric in SHARES else ''}", score(row)),
        ("Training time, s", mean_and_spread([run["train_runtime_s"] for run in runs])),
        ("Bytes exchanged", f"{row['bytes_exchanged'] / 1e6:,.0f} MB"),
    ]
    means = {name: statistics.fmean(run[f"eval_{name}"] for run in runs) for name in (metric, "loss")}
    return CardFacts(
        f"{name}-{row['method']}",
        row["method"],
        row["num_workers"],
        list(means.items()),
        rows,
        configuration,
        provenance_line({**row, "commit": runs[0]["commit"], "date": runs[-1]["date"]}),
        compared=compared,
        against=against,
        base=configuration.get("base_model_id") or configuration.get("model_name_or_path"),
        data=Path(configuration["train_file"]).name,
        task=task,
        library="peft" if configuration.get("use_lora") else "transformers",
        seeds=[run["seed"] for run in runs],
        method_name=METHOD_NAMES[row["method"]],
    )


def of_quickstart(path: Path) -> Iterator[CardFacts]:
    """One card per method of the quickstart."""
    for row in load_results(path):
        runs = row["runs"]
        own = [value for run in runs for value in run["eval_accuracy_workers"]]
        parallel = statistics.fmean(run["bytes_data_parallel"] for run in runs)
        exchanged = f"{row['bytes_exchanged'] / 1e6:,.0f}"
        compared = [
            ("the anchor", mean_and_spread([run["eval_accuracy"] for run in runs], scale=100), exchanged),
            ("the workers' own parameters", mean_and_spread(own, scale=100), "-"),
            (
                "the model before training",
                mean_and_spread([run["eval_accuracy_before"] for run in runs], scale=100),
                "-",
            ),
            ("data-parallel training, as many steps", "not measured", f"{parallel / 1e6:,.0f}"),
        ]
        header = ("", "held-out accuracy, %", "MB exchanged")
        against = "The bytes of data-parallel training are computed, for a ring all-reduce of the same gradients."
        yield of_summary("quickstart", row, (header, compared), against, "text-classification")


def of_recipe(path: Path) -> Iterator[CardFacts]:
    """One card per method that measure_recipe.py has measured."""
    recipe, summaries = path.parents[1].name, load_results(path)
    tried = (path.parent / "trials.json").exists()
    against = (
        "All were trained for as many steps of as many examples, with the settings of the recipe"
        + (", each with the best of the learning rates that all had tried" if tried else ", tuned for none of them")
        + ". `ddp` is plain data parallelism with the same AdamW."
    )
    for row in summaries:
        if method_label(row) == row["method"]:
            yield of_summary(recipe, row, side_by_side(summaries), against, load(recipe).PIPELINE_TAG)


def main(folder: Path = REPOSITORY / "model_cards") -> None:
    """Writes all cards.

    Args:
        folder: the folder to write to.
    """
    found = [*of_quickstart(RECIPES / "text_classification/results/quickstart.json")]
    for path in sorted(RECIPES.glob("*/results/methods.json")):
        found += of_recipe(path)
    for facts in found:
        write_atomically(folder / f"{facts.name}.md", str(model_card(facts)))


if __name__ == "__main__":
    main()
