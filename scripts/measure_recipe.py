"""The three methods of a recipe, with the settings of its YAML files, over seeds: JSON, and a table in its README.

    python scripts/measure_recipe.py causal_lm [--seeds 3] [--key value ...]

Two workers on this machine. The keys are those of the recipe's script and hold for all methods; nothing is tuned
(compare_text.py does that, for sentences). A run that has finished is kept in `--runs_dir` and not made again. The
JSON is recipes/RECIPE/results/methods.json; the table replaces what stands between the markers `methods` of
recipes/RECIPE/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from configuration import parse_configuration
from launches import add_runs, finished, in_folder_of_its_own, make_runs
from progress import add_quiet
from reporting import REPOSITORY
from summarize_results import summarize, table, write_between

SCRIPTS = {
    "causal_lm": "train_causal_lm",
    "sft": "train_sft",
    "seq2seq": "train_seq2seq",
    "token_classification": "train_token_classification",
    "image_classification": "train_vision_trainer",
}
METHODS = ("lsam", "sam", "sgd")


def results(recipe: str, seeds: int, words: list[str], runs_dir: Path, quiet: bool) -> list[dict[str, Any]]:
    """Of all runs, method by method; those that are missing are made."""
    keys = importlib.import_module(SCRIPTS[recipe]).KEYS
    runs = []
    for method in METHODS:
        values = parse_configuration(keys, ["--config", str(REPOSITORY / f"recipes/{recipe}/{method}.yaml"), *words])
        for seed in range(seeds):
            each = {"recipe": recipe, **values, "num_workers": 2, "seed": seed}
            runs.append(in_folder_of_its_own(each, runs_dir))
    return finished(__file__, runs, quiet, with_trainer=True)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """A run of the recipe that `values` names."""
    return importlib.import_module(SCRIPTS[values["recipe"]]).run({k: v for k, v in values.items() if k != "recipe"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", choices=SCRIPTS)
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
    summaries = summarize(results(arguments.recipe, arguments.seeds, words, arguments.runs_dir, arguments.quiet))
    folder = arguments.recipes / arguments.recipe
    (folder / "results").mkdir(parents=True, exist_ok=True)
    (folder / "results/methods.json").write_text(json.dumps(summaries, indent=1, ensure_ascii=False) + "\n")
    write_between(folder / "README.md", "methods", table(summaries))
    print(table(summaries))


if __name__ == "__main__":
    main()
