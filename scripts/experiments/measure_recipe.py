"""The methods of a recipe, with the settings of its YAML files, over seeds: JSON, and a table in its README.

    python scripts/experiments/measure_recipe.py causal_lm [--seeds 3] [--key value ...]

Two workers on this machine: LSAM and data-parallel training, with SAM's gradient and without it. The keys are those of
the recipe's script and hold for all methods; nothing is tuned (compare_text.py does that, for sentences). A run that
has finished is kept in `--runs_dir` and not made again. The JSON is recipes/RECIPE/results/methods.json; the table
replaces what stands between the markers `methods` of recipes/RECIPE/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recipes.common.configuration import parse_configuration
from recipes.common.progress import add_quiet
from recipes.common.recipe import load, names
from recipes.common.results import REPOSITORY, write_json
from scripts.common.launches import add_runs, finished, in_folder_of_its_own, make_runs
from scripts.tools.summarize_results import summarize, table, write_between

# A YAML file of the recipe, and what is changed in it.
VARIANTS = (("lsam", {}), ("lsam", {"sam_rho": 0.0}), ("ddp_sam", {}), ("ddp", {}))


def results(recipe: str, seeds: int, words: list[str], runs_dir: Path, quiet: bool) -> list[dict[str, Any]]:
    """Of all runs, method by method; those that are missing are made."""
    keys, runs = load(recipe).KEYS, []
    defaults = parse_configuration(keys, [])
    for method, changes in VARIANTS:
        values = parse_configuration(keys, ["--config", str(REPOSITORY / f"recipes/{recipe}/{method}.yaml"), *words])
        values |= changes
        for seed in range(seeds):
            each = {"recipe": recipe, **values, "num_workers": 2, "seed": seed}
            runs.append(in_folder_of_its_own(each, runs_dir, defaults))
    return finished(__file__, runs, quiet, with_trainer=True)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """A run of the recipe that `values` names."""
    return load(values["recipe"]).run({k: v for k, v in values.items() if k != "recipe"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=names())
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method, with seeds 0, 1, ...")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/measure_recipe")
    parser.add_argument("--recipes", type=Path, default=REPOSITORY / "recipes", help="whose README and JSON to write")
    add_runs(parser)
    arguments, words = parser.parse_known_args()
    if arguments.runs is not None:
        make_runs(arguments.runs, run, arguments.quiet, keep_model=False)
        return
    if arguments.recipe is None:
        parser.error("name a recipe")
    if not hasattr(load(arguments.recipe), "TRAINERS"):
        parser.error(f"{arguments.recipe} does not train through Trainer; reproduce.py compares its methods")
    summaries = summarize(results(arguments.recipe, arguments.seeds, words, arguments.runs_dir, arguments.quiet))
    folder = arguments.recipes / arguments.recipe
    write_json(folder / "results/methods.json", summaries)
    write_between(folder / "README.md", "methods", table(summaries))
    print(table(summaries))


if __name__ == "__main__":
    main()
