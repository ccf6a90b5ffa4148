"""The methods of a recipe, with the settings of its YAML files, over seeds: JSON, and a table in its README.

    python scripts/experiments/measure_recipe.py causal_lm [--learning_rates R ...] [--methods NAME ...] [--key ...]

Two workers on this machine: LSAM and data-parallel training, with SAM's gradient and without it; without it, both also
with NesterovAdamW, and data-parallel training with the second decay rate of LSAM's workers. The keys are those of the
recipe's script and apply to all methods. With `--learning_rates`, each method tries all of them, judged on a held-out
part of the training data, and uses its best; otherwise all methods use the recipe's. With `--methods`, the tables have
these rows only. Finished runs are kept in `--runs_dir` and not made again. The JSON, methods.json and trials.json, is
written to recipes/RECIPE/results, and the tables replace the text between the markers `methods` and `trials` in the
recipe's README.md. For data of your own, name an `--output_dir`, which need not have a README.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from recipes.common.configuration import parse_configuration
from recipes.common.progress import add_quiet
from recipes.common.recipe import load, names
from recipes.common.results import REPOSITORY, write_json
from scripts.common.launches import add_runs, finished, in_folders_of_their_own, make_runs
from scripts.tools.summarize_results import around, method_label, summarize, table, write_between

# The YAML file of the recipe that each method uses, and the changes to it.
VARIANTS = (
    ("lsam", {}),
    ("lsam", {"sam_rho": 0.0}),
    ("lsam", {"sam_rho": 0.0, "nesterov": True}),
    ("ddp_sam", {}),
    ("ddp", {}),
    ("ddp", {"adam_beta2": 0.99}),  # as for LSAM's workers that leave their momentum to the anchor
    ("ddp", {"nesterov": True}),
)
LABELS = {method_label({"method": each[0], "configuration": each[1]}): each for each in VARIANTS}
TRIAL_SEED = 100  # and those after it


def configurations(recipe: str, labels: list[str], words: list[str]) -> list[dict[str, Any]]:
    """The value of every key, for each method of `LABELS` that is asked for."""
    keys, several = load(recipe).KEYS, []
    for method, changes in (LABELS[label] for label in labels):
        yaml = str(REPOSITORY / f"recipes/{recipe}/{method}.yaml")
        several.append({**parse_configuration(keys, ["--config", yaml, *words]), **changes, "num_workers": 2})
    return several


def best_rate(results: list[dict[str, Any]]) -> float:
    """The learning rate whose trials had the lowest mean loss, or the highest mean of another metric. Trials that have
    diverged, to NaN, lose."""
    metric = results[0]["metric"]
    sign = 1.0 if metric == "loss" else -1.0
    reached: dict[float, list[float]] = {}
    for result in results:
        rate, value = result["configuration"]["learning_rate"], sign * result[f"eval_{metric}"]
        reached.setdefault(rate, []).append(math.inf if math.isnan(value) else value)
    return min(reached, key=lambda rate: statistics.fmean(reached[rate]))


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Makes a run of the recipe that `values` names."""
    return load(values["recipe"]).run({k: v for k, v in values.items() if k != "recipe"})


def main() -> None:
    # Unabbreviated: the key --learning_rate must not be taken for --learning_rates.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", nargs="?", choices=names())
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, with seeds 0, 1, ...")
    parser.add_argument("--learning_rates", type=float, nargs="+", help="tried with each method before")
    parser.add_argument("--trial_seeds", type=int, default=1, help="runs of each method with each of these rates")
    parser.add_argument("--methods", nargs="+", choices=LABELS, default=[*LABELS], metavar="NAME", help="default: all")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/measure_recipe")
    parser.add_argument("--output_dir", type=Path, help="default: the folder of the recipe")
    add_runs(parser)
    arguments, words = parser.parse_known_args()
    if arguments.runs is not None:
        make_runs(arguments.runs, run, arguments.quiet, keep_model=False)
        return
    if arguments.recipe is None:
        parser.error("name a recipe")
    if not hasattr(load(arguments.recipe), "TRAINERS"):
        parser.error(f"{arguments.recipe} does not train through Trainer; reproduce.py compares its methods")
    recipe, rates = arguments.recipe, arguments.learning_rates
    folder = arguments.output_dir or REPOSITORY / "recipes" / recipe
    readme = folder / "README.md"

    def results(planned: list[dict[str, Any]]) -> list[dict[str, Any]]:
        runs = in_folders_of_their_own([{"recipe": recipe, **each} for each in planned], arguments.runs_dir)
        return finished(__file__, runs, arguments.quiet, with_trainer=True)

    def publish(made: list[dict[str, Any]], name: str) -> None:
        summaries = summarize(made)
        write_json(folder / f"results/{name}.json", summaries)
        if readme.exists():
            write_between(readme, name, table(summaries))
        print(table(summaries))

    for name in ("trials", "methods") if rates else ("methods",):
        if readme.exists():
            around(readme, name)  # so that a missing marker is an error now and not an hour later
    methods = configurations(recipe, arguments.methods, words)
    if rates:
        seeds = range(TRIAL_SEED, TRIAL_SEED + arguments.trial_seeds)
        trials = [{"tuning": True, "learning_rate": rate, "seed": seed} for rate in rates for seed in seeds]
        made = results([{**method, **trial} for method in methods for trial in trials])
        publish(made, "trials")
        for index, method in enumerate(methods):
            method["learning_rate"] = best_rate(made[index * len(trials) : (index + 1) * len(trials)])
    publish(results([{**method, "seed": seed} for method in methods for seed in range(arguments.seeds)]), "methods")


if __name__ == "__main__":
    main()
