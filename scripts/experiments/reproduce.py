"""The experiments of the paper's vision benchmarks, and others on what it leaves open, as tables, JSON and plots.

    python scripts/experiments/reproduce.py EXPERIMENT --budget {smoke,cpu,gpu,paper} [--key value ...]

    single_worker       n = 1: LSAM against SAM and SGD in one process
    sync_interval       n = 4, tau in {4, 8, 16, 32}
    async_vs_sync       LSAM against data-parallel SAM at the same total batch, without and with a slow worker
    methods             all five methods, each tuned with the same number of trials
    failure_signatures  failing runs can be recognised, cause a warning, and have a remedy; also the sources of
                        BatchNorm's statistics
    open_choices        choices that the paper leaves open, each against the default

Any key of recipes/cifar10_resnet20/train.py may follow, for example `--dataset cifar10 --data_dir FOLDER`. Finished
runs are kept in `--runs_dir` and not made again, so an interrupted experiment continues where it was. Tables are
written to `--output_dir`. Settings are chosen on a held-out 10 % of the training split, never on the test split.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_lsam.files import write_atomically
from recipes.cifar10_resnet20.train import KEYS, run
from recipes.common.configuration import parse_configuration
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, provenance, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.launches import add_runs, finished, in_folders_of_their_own, make_runs

# The paper's settings: 150 epochs, 4 workers, batch 128 each, eta 0.2, rho 0.1, tau 16, lambda0 0.1.
PAPER = {"epochs": 150, "batch_size": 128, "learning_rate": 0.2, "sam_rho": 0.1, "sync_steps": 16}
SMALL = {"use_cpu": True, "image_size": 16, "channels_last": True}
BUDGETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "gpu": {**PAPER, "epochs": 15, "bf16": True, "channels_last": True},
    "cpu": {
        **PAPER,
        **SMALL,
        "model_width": 8,
        "max_train_images": 7680,
        "epochs": 8,
        "batch_size": 32,
        "sam_rho": 0.05,
        "eval_points": 10,
    },
    "smoke": {
        **PAPER,
        **SMALL,
        "model_width": 4,
        "epochs": 2,
        "batch_size": 4,
        "sync_steps": 4,
        "eval_points": 2,
        "log_steps": 2,
        "batchnorm_batches": 2,
    },
}
SEEDS = {"paper": 5, "gpu": 3, "cpu": 2, "smoke": 1}
SEEDS_OF_METHODS = {**SEEDS, "cpu": 3}
WORKERS = {"paper": 4, "gpu": 4, "cpu": 4, "smoke": 2}
TUNING = {"tuning": True}


@dataclass(frozen=True)
class Plan:
    """One run to be made.

    Args:
        label: its line in tables and plots.
        settings: keys of recipes/cifar10_resnet20/train.py that differ from the budget's.
        seed: seed of the run.
        workers: how many processes it has, if not the budget's number.
    """

    label: str
    settings: dict[str, Any]
    seed: int
    workers: int | None = None


class Runner:
    """Makes the runs that do not exist yet.

    Args:
        budget: a key of `BUDGETS`.
        overrides: command line keys for every run, as `--key value` words.
        runs_dir: has one folder per run, named after what determines it.
        output_dir: the folder to which tables are written, and from which tuned settings are read.
        quiet: plain lines instead of a progress bar.
        methods: the methods that the experiment `methods` compares; if empty, all.
    """

    def __init__(
        self,
        budget: str,
        overrides: Sequence[str],
        runs_dir: Path,
        output_dir: Path,
        quiet: bool = False,
        methods: Sequence[str] = (),
    ):
        self.seeds = range(SEEDS[budget])
        self.seeds_of_methods = range(SEEDS_OF_METHODS[budget])
        self.workers = WORKERS[budget]
        self.methods = methods or tuple(TRIALS)
        self.output_dir = output_dir
        self._runs_dir = runs_dir
        self._quiet = quiet
        self.base = [f"--{key}={value}" for key, value in BUDGETS[budget].items()] + list(overrides)
        self.values({})  # so that unknown keys are errors before any time is spent

    def values(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All keys of a run."""
        words = [*self.base, *(f"--{key}={value}" for key, value in settings.items())]
        return parse_configuration(KEYS, words)

    def tuned(self, method: str) -> dict[str, Any]:
        """The settings that the experiment `methods` has chosen; empty if it has not been run with this method."""
        path = self.output_dir / "methods.json"
        return json.loads(path.read_text())["chosen"].get(method, {}) if path.exists() else {}

    def results(self, plans: Sequence[Plan]) -> list[dict[str, Any]]:
        """The results of the runs, in their order; missing runs are made."""
        runs = [
            {
                **self.values(plan.settings),
                "seed": plan.seed,
                "num_workers": plan.workers or self.workers,
                "save_model": False,
            }
            for plan in plans
        ]
        return finished(__file__, in_folders_of_their_own(runs, self._runs_dir), self._quiet)


def of_seeds(runner: Runner, label: str, settings: dict[str, Any], workers: int | None = None) -> list[Plan]:
    return [Plan(label, settings, seed, workers) for seed in runner.seeds]


# --- the experiments: each returns its plans and, in addition to the common table, what else it found ---


def single_worker(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    plans = []
    for label, settings in {
        "LSAM, n = 1": {"method": "lsam", **runner.tuned("lsam")},
        "SAM": {"method": "ddp_sam", **runner.tuned("ddp_sam")},
        "SGD": {"method": "ddp", **runner.tuned("ddp")},
    }.items():
        # With a quarter of the epochs, one worker makes as many steps as each of four.
        plans += of_seeds(runner, label, {**settings, "epochs": runner.values({})["epochs"] / 4}, workers=1)
    return plans, {}


def sync_interval(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    plans = []
    for steps in (4, 8, 16, 32):
        plans += of_seeds(runner, f"tau = {steps}", {**runner.tuned("lsam"), "method": "lsam", "sync_steps": steps})
    return plans, {}


def async_vs_sync(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    # Two workers: on two cores each has its own, so that time means something. The total batch stays that of four.
    common = {"batch_size": 2 * runner.values({})["batch_size"], "eval_points": 30}
    slow = {"slow_worker": 1, "slow_factor": 1.0}
    plans = []
    for label, settings in {
        "LSAM, tau = 16": {**runner.tuned("lsam"), "method": "lsam", "sync_steps": 16},
        "data-parallel SAM": {**runner.tuned("ddp_sam"), "method": "ddp_sam"},
    }.items():
        plans += of_seeds(runner, label, {**settings, **common}, workers=2)
        plans += of_seeds(runner, f"{label}, one worker at half speed", {**settings, **common, **slow}, workers=2)
    results = runner.results(plans)
    reference = [r["accuracy"] for p, r in zip(plans, results, strict=True) if p.label == "data-parallel SAM"]
    target = 0.9 * statistics.mean(reference)
    reached: dict[str, list[float | None]] = {}
    for plan, result in zip(plans, results, strict=True):
        seconds = next((point["seconds"] for point in result["points"] if point["accuracy"] >= target), None)
        reached.setdefault(plan.label, []).append(seconds)
    return plans, {"target_accuracy": target, "seconds_to_target": reached}


# Five trials each: three learning rates with the method's first setting, then two other settings with the best of them.
TRIALS: dict[str, tuple[dict[str, float], list[dict[str, float]]]] = {
    "ddp": ({}, [{"weight_decay": 1e-4}, {"weight_decay": 2e-3}]),
    "ddp_sam": ({}, [{"sam_rho": 0.02}, {"sam_rho": 0.1}]),
    "lsam": ({}, [{"sam_rho": 0.02}, {"coupling_strength": 0.5}]),
    "easgd": ({"coupling_strength": 0.225}, [{"coupling_strength": 0.1}, {"coupling_strength": 0.45}]),
    "lsgd": ({"coupling_strength": 0.1}, [{"coupling_strength": 0.9}, {"coupling_strength": 2.0}]),
}


def methods(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    first = runner.values({})["learning_rate"]
    rates = [first / 2, first, 2 * first]
    trials_of = {method: TRIALS[method] for method in runner.methods}
    chosen: dict[str, dict[str, float]] = {}
    trials = []

    def stage(candidates: dict[str, list[dict[str, float]]]) -> None:
        plans = [
            Plan(method, {**settings, **TUNING, "method": method, "eval_points": 1}, seed=100)
            for method, several in candidates.items()
            for settings in several
        ]
        for plan, result in zip(plans, runner.results(plans), strict=True):
            own = {k: v for k, v in plan.settings.items() if k not in ("method", "eval_points", *TUNING)}
            trials.append({"method": plan.label, "settings": own, "validation_accuracy": result["accuracy"]})
        for method in candidates:
            best = max((t for t in trials if t["method"] == method), key=lambda t: t["validation_accuracy"])
            chosen[method] = best["settings"]

    stage({m: [{**start, "learning_rate": rate} for rate in rates] for m, (start, _) in trials_of.items()})
    stage({m: [{**chosen[m], **other} for other in others] for m, (_, others) in trials_of.items()})
    plans = []
    for method in trials_of:
        plans += [Plan(method, {**chosen[method], "method": method}, seed) for seed in runner.seeds_of_methods]
    results = runner.results(plans)
    accuracy = {(p.label, p.seed): r["accuracy"] for p, r in zip(plans, results, strict=True)}
    paired = {
        f"lsam - {other}": [accuracy["lsam", seed] - accuracy[other, seed] for seed in runner.seeds_of_methods]
        for other in trials_of
        if "lsam" in trials_of and other != "lsam"
    }
    return plans, {"chosen": chosen, "trials": trials, "paired_differences": paired}


def failure_signatures(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    lsam = {**runner.tuned("lsam"), "method": "lsam"}
    free = {**lsam, "coupling_strength": 0.0, "sync_steps": 32, "lr_schedule": "constant", "log_steps": 32}
    # Slow only in its first steps; otherwise the others would have finished long before it.
    slow = {**lsam, "log_steps": 2, "slow_worker": runner.workers - 1, "slow_steps": 6, "slow_factor": 40.0}
    # Whether a signature shows takes only one seed to see; comparing BatchNorm's statistics takes all seeds.
    plans = [
        Plan(label, settings, seed=0)
        for label, settings in {
            "lambda0 = 0, tau = 32: nothing holds the workers": free,
            "remedy: lambda0 = 0.9, tau = 16": {**free, "coupling_strength": 0.9, "sync_steps": 16},
            "one worker 40 times slower at first, tau = 1": {**slow, "sync_steps": 1},
            "remedy: tau = 16": {**slow, "sync_steps": 16},
        }.items()
    ]
    for label, settings in {
        "BatchNorm statistics of worker 0": {**lsam, "batchnorm_statistics": "worker"},
        "remedy: re-estimated at the anchor": lsam,
        "or: averaged over the workers": {**lsam, "batchnorm_statistics": "average"},
    }.items():
        plans += of_seeds(runner, label, settings)
    signs = {}
    for plan, result in zip(plans, runner.results(plans), strict=True):
        drifts = [drift for worker in result["workers"] for _, _, drift in worker["curve"]]
        signs.setdefault(plan.label, []).append(
            {
                "largest_drift": max(drifts),
                "largest_mean_staleness": max(worker["staleness_mean"] for worker in result["workers"]),
                "warnings": sorted({message for worker in result["workers"] for message in worker["warnings"]}),
            }
        )
    return plans, {"signatures": signs}


def open_choices(runner: Runner) -> tuple[list[Plan], dict[str, Any]]:
    # The coupling strength that trials have chosen gives way to the default, with which all others are compared.
    lsam = {**runner.tuned("lsam"), "method": "lsam", "coupling_strength": 1.0, **TUNING}
    stepwise = {"coupling": "decoupled", "coupling_strength": 2.0, "anchor_lr": 1.5}
    plans = []
    for label, settings in {
        "merged, lambda0 = 1": {},
        "lambda0 = 0.5": {"coupling_strength": 0.5},
        "coupled at every step, lambda0 = 2, eta' = 1.5": stepwise,
        "the paper's: lambda0 = 0.1 in the score": {
            "coupling": "score",
            "coupling_strength": 0.1,
            "compensate_coupling": False,
            "anchor_momentum_correction": 0.3,
        },
        "Nesterov anchor": {"anchor_optimizer": "nesterov", "anchor_momentum": 0.5},
        "T = 1e-6": {"langevin_temperature": 1e-6},
        "rho decays with eta": {"rho_schedule": "learning_rate"},
    }.items():
        plans += of_seeds(runner, label, {**lsam, **settings})
    results = runner.results(plans)
    accuracy = {(p.label, p.seed): r["accuracy"] for p, r in zip(plans, results, strict=True)}
    default = plans[0].label
    differences = {
        label: [accuracy[label, seed] - accuracy[default, seed] for seed in runner.seeds]
        for label in dict.fromkeys(plan.label for plan in plans)
        if label != default
    }
    return plans, {"paired_differences": differences}


EXPERIMENTS = {
    each.__name__: each
    for each in (single_worker, sync_interval, async_vs_sync, methods, failure_signatures, open_choices)
}

TIMED = ("sync_interval", "async_vs_sync")  # the machine must be otherwise idle


# --- what is written ---


def summary_table(rows: dict[str, list[dict[str, Any]]], found: dict[str, Any], timed: bool) -> str:
    """One line per label: error, bytes, time if the experiment is about it, and what else it found."""
    header = ["", "test error, %", "lowest, %", "MB exchanged", "seeds"]
    if next(iter(rows.values()))[0]["evaluated_on"] != "test split":
        header[1] = "validation error, %"
    extra = {
        "seconds_to_target": f"s to {100 * found.get('target_accuracy', 0):.1f} % accuracy",
        "paired_differences": "paired difference in accuracy, points",
        "signatures": "largest drift; mean staleness of the slowest; runs that warned",
    }
    columns = [key for key in extra if key in found and key != "paired_differences"]
    if timed:
        header.append("training time, s")
    lines = []
    for label, results in rows.items():
        errors = [1 - result["accuracy"] for result in results]
        lowest = [min(1 - point["accuracy"] for point in result["points"]) for result in results]
        line = [label, mean_and_spread(errors, 2, 100), mean_and_spread(lowest, 2, 100)]
        line += [f"{results[0]['bytes'] / 1e6:.1f}", str(len(results))]
        if timed:
            line.append(mean_and_spread([result["seconds"] for result in results], 1))
        for key in columns:
            values = found[key][label]
            if key == "signatures":
                drift = max(value["largest_drift"] for value in values)
                stale = max(value["largest_mean_staleness"] for value in values)
                warned = sum(bool(value["warnings"]) for value in values)
                line.append(f"{drift:.3f}; {stale:.1f}; {warned} of {len(values)}")
            else:
                line.append("never" if None in values else mean_and_spread(values, 1))
        lines.append(line)
    table = markdown_table([*header, *(extra[key] for key in columns)], lines)
    if "paired_differences" in found:
        pairs = [[label, mean_and_spread(d, 2, 100), str(len(d))] for label, d in found["paired_differences"].items()]
        table += "\n\n" + markdown_table(["", extra["paired_differences"], "seeds"], pairs)
    return table


def plot(rows: dict[str, list[dict[str, Any]]], path: Path, timed: bool) -> None:
    """Error against epochs, bytes and time; the line is the mean over seeds, the band their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = "seconds" if timed else "seconds, with what else the machine had to do"
    against = [("epoch", "epoch", 1), ("bytes", "MB exchanged", 1e6), ("seconds", seconds, 1)]
    figure = Figure(figsize=(5 * len(against), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    what = next(iter(rows.values()))[0]["evaluated_on"].removesuffix(" split")
    for axis, (key, name, scale) in zip(figure.subplots(1, len(against)), against, strict=True):
        for label, results in rows.items():
            x, mean, low, high = [], [], [], []
            for points in zip(*(result["points"] for result in results), strict=True):
                errors = [100 * (1 - point["accuracy"]) for point in points]
                x.append(statistics.mean(point[key] for point in points) / scale)
                mean.append(statistics.mean(errors))
                low.append(min(errors))
                high.append(max(errors))
            (line,) = axis.plot(x, mean, label=label)
            axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xlabel=name, ylabel=f"{what} error, %")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def report(experiment: str, budget: str, runner: Runner, plans: Sequence[Plan], found: dict[str, Any]) -> str:
    """Writes EXPERIMENT.json, .md and .png; returns the table."""
    results = runner.results(plans)
    rows: dict[str, list[dict[str, Any]]] = {}
    for plan, result in zip(plans, results, strict=True):
        rows.setdefault(plan.label, []).append(result)
    common = runner.values({})
    files = ("data_dir", "train_file", "eval_file", "output_dir", "shared_memory_dir")  # of one machine only
    known = {field.name: common[field.name] for kind in KEYS for field in fields(kind) if field.name not in files}
    runs = [
        {
            "label": plan.label,
            "seed": plan.seed,
            "workers": result["num_workers"],
            "settings": plan.settings,
            **{key: result[key] for key in ("accuracy", "eval_loss", "seconds", "images_per_second", "bytes")},
            **{key: result[key] for key in ("steps_per_worker", "train_images", "eval_images", "evaluated_on")},
            "points": result["points"],
            "commit": result["commit"],
            "versions": result["versions"],
            "hardware": result["hardware"],
            "date": result["date"],
        }
        for plan, result in zip(plans, results, strict=True)
    ]
    table = summary_table(rows, found, timed=experiment in TIMED)
    contents = {"experiment": experiment, "budget": budget, **found, "configuration": known, "runs": runs}
    contents |= provenance()
    write_json(runner.output_dir / f"{experiment}.json", contents)
    write_atomically(runner.output_dir / f"{experiment}.md", table + "\n")
    plot(rows, runner.output_dir / f"{experiment}.png", timed=experiment in TIMED)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS)
    parser.add_argument("--methods", nargs="+", choices=TRIALS, default=(), help="of the experiment `methods`")
    parser.add_argument("--budget", choices=BUDGETS, default="smoke")
    add_quiet(parser)
    parser.add_argument("--runs_dir", type=Path, default=None, help="default: runs/reproduce/BUDGET")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: runs/reproduce/tables/BUDGET")
    add_runs(parser)
    args, overrides = parser.parse_known_args()
    if args.runs is not None:
        make_runs(args.runs, run, args.quiet)
        return
    if args.experiment is None:
        parser.error("name an experiment")
    runs_dir = args.runs_dir or REPOSITORY / "runs/reproduce" / args.budget
    output_dir = args.output_dir or REPOSITORY / "runs/reproduce/tables" / args.budget
    runner = Runner(args.budget, overrides, runs_dir, output_dir, args.quiet, args.methods)
    plans, found = EXPERIMENTS[args.experiment](runner)
    print(report(args.experiment, args.budget, runner, plans, found))


if __name__ == "__main__":
    main()
