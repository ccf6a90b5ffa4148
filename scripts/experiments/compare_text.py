"""LSAM against data-parallel SAM and plain data parallelism on sentences of your own, two workers, each tuned alike.

    python scripts/experiments/compare_text.py NAME --config recipes/text_classification/lsam.yaml \\
        --train_file train.csv --validation_file test.csv [--use_lora true --learning_rate 2e-3] [--key value ...]

The keys are those of recipes/text_classification/train.py. Three trials a method, on a part of the training file that
is held out for them, over the learning rate and, where there is one, the radius: LSAM and SAM try the given learning
rate, twice it, and twice it with a third of the given `sam_rho`; plain data parallelism once, twice and four times the
given learning rate. Then five seeds (`--seeds`) of the best, evaluated on the validation file. Runs are kept in
`--runs_dir`; one that has finished is not run again. `--output_dir` receives NAME.json; `--readme` a table between the
markers NAME.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lsam.spread import mean_and_deviation
from recipes.common.configuration import parse_configuration
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, write_json
from recipes.text_classification.train import KEYS, run
from scripts.common.launches import add_runs, finished, in_folder_of_its_own, make_runs
from scripts.tools.summarize_results import summarize, table, write_between

OF_SAM = ((1.0, 1.0), (2.0, 1.0), (2.0, 1 / 3))  # of the learning rate and of the radius that are given
RATES = (1.0, 2.0, 4.0)  # of the learning rate, without one
TRIAL = {"validation_file": None, "eval_size": 0.1, "seed": 100}


def trials(sam_rho: float, learning_rate: float) -> dict[str, list[dict[str, float]]]:
    """What each method tries."""
    both = [{"learning_rate": learning_rate * rate, "sam_rho": sam_rho * radius} for rate, radius in OF_SAM]
    return {"lsam": both, "ddp_sam": both, "ddp": [{"learning_rate": learning_rate * factor} for factor in RATES]}


def results(runs: list[dict[str, Any]], runs_dir: Path, quiet: bool) -> list[dict[str, Any]]:
    """The results of the runs, in their order; those that are missing are made."""
    defaults = parse_configuration(KEYS, [])
    several = [in_folder_of_its_own(values, runs_dir, defaults) for values in runs]
    return finished(__file__, several, quiet, with_trainer=True)


def compare(values: dict[str, Any], seeds: Sequence[int], runs_dir: Path, quiet: bool = False) -> dict[str, Any]:
    """Tunes, and runs the seeds; the summaries, the trials and the paired differences of LSAM to the others."""
    values = {**values, "num_workers": values["num_workers"] or 2}
    tried = trials(values["sam_rho"], values["learning_rate"])
    plans = [{**values, **TRIAL, "method": method, **own} for method, several in tried.items() for own in several]
    found = results(plans, runs_dir, quiet)
    report: dict[str, Any] = {"trials": [], "chosen": {}}
    for plan, result in zip(plans, found, strict=True):
        own = {key: plan[key] for key in tried[plan["method"]][0]}
        report["trials"].append({"method": plan["method"], **own, "accuracy": result["eval_accuracy"]})
    for method, several in tried.items():
        best = max((t for t in report["trials"] if t["method"] == method), key=lambda trial: trial["accuracy"])
        report["chosen"][method] = {key: best[key] for key in several[0]}
    final = [{**values, "method": m, **own, "seed": s} for m, own in report["chosen"].items() for s in seeds]
    runs = results(final, runs_dir, quiet)
    accuracy = {(run["method"], run["seed"]): run["eval_accuracy"] for run in runs}
    report["paired_differences"] = {
        f"lsam - {other}": [accuracy["lsam", seed] - accuracy[other, seed] for seed in seeds]
        for other in ("ddp_sam", "ddp")
    }
    report["train_examples"] = runs[0]["train_examples"]
    report["summaries"] = summarize(runs)
    return report


def text(report: dict[str, Any]) -> str:
    """The table, and in words what was chosen and how the methods differ seed by seed."""
    chosen = "; ".join(
        f"{method} {', '.join(f'{key} {value:.2g}' for key, value in own.items())}"
        for method, own in report["chosen"].items()
    )
    spreads = {name: mean_and_deviation(values) for name, values in report["paired_differences"].items()}
    differences = ", ".join(f"{name} {mean:+.4f} ± {deviation:.4f}" for name, (mean, deviation) in spreads.items())
    return f"{table(report['summaries'])}\n\nChosen: {chosen}. Paired by seed: {differences}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="of the comparison")
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method's best, 0, 1, ...")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/compare_text")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/compare_text/tables")
    parser.add_argument("--readme", type=Path, help="file to write the table into, between the markers NAME")
    add_runs(parser)
    arguments, words = parser.parse_known_args()
    if arguments.runs is not None:
        make_runs(arguments.runs, run, arguments.quiet, keep_model=False)
        return
    if arguments.name is None:
        parser.error("name the comparison")
    if arguments.seeds < 2:
        parser.error("--seeds is at least 2: one run has no deviation")
    values = parse_configuration(KEYS, words)
    if not (values["train_file"] and values["validation_file"]):
        parser.error(
            "name a train_file and a validation_file: what is held out of the training file chooses the settings, so "
            "accuracy is to be measured on others"
        )
    report = compare(values, range(arguments.seeds), arguments.runs_dir, arguments.quiet)
    write_json(arguments.output_dir / f"{arguments.name}.json", report)
    if arguments.readme is not None:
        write_between(arguments.readme, arguments.name, text(report))
    print(text(report))


if __name__ == "__main__":
    main()
