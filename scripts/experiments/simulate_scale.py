"""From 1 to 1,024 workers, simulated: what they reach, how stale their anchors are, and what wants to follow n.

    python scripts/experiments/simulate_scale.py --dataset parquet --train_file train.parquet --eval_file test.parquet

A perceptron with one hidden layer (13,002 parameters) on CIFAR-10 at 8x8 pixels, batches of 8, SGD with momentum; a
step takes one second on average, give or take a fifth. Four questions, a table each:

    steps     each worker makes as many steps, whatever their number
    samples   all together see as many samples: the more workers, the fewer steps each
    adamw     as `steps`, with AdamW
    knobs     with 256 workers, sync_steps, coupling_strength and anchor_lr one by one, beside the defaults

LSAM without SAM's gradient and data-parallel training have the same trials over the learning rate at every n, on a
tenth of the training images; the tables are of the test images. Runs are kept in `--runs_dir`, and one that has
finished is not made again. `--output_dir` receives scale.json, scale.md and scale.svg.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lsam.loop import LoopArguments
from hf_lsam.simulation import Gradient, Machine
from recipes.common.configuration import parse_configuration
from recipes.common.image_data import ImageDataArguments, load_images
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, provenance, write_atomically, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.simulated import SimulatedRuns, make_run

METHODS = ("LSAM", "data-parallel")
WORKERS = (1, 4, 16, 64, 256, 1024)
STEPS, SAMPLES, BATCH, MOMENTUM = 100, 204_800, 8, 0.9
QUESTIONS = {"steps": ("sgd", WORKERS), "samples": ("sgd", WORKERS), "adamw": ("adamw", WORKERS[:4])}
RATES = {"sgd": (0.01, 0.03, 0.1, 0.3, 1.0), "adamw": (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)}
TRIAL_SEED = 100
KNOBS: tuple[dict[str, float], ...] = (
    {},
    {"sync_steps": 1},
    {"sync_steps": 4},
    {"sync_steps": 8},
    {"sync_steps": 16},
    {"coupling_strength": 0.5},
    {"anchor_lr": 0.5},
    {"anchor_lr": 1.5},
)


@dataclass(frozen=True)
class Run:
    """One simulated run.

    Args:
        method: one of `METHODS`.
        workers: n.
        steps: of each.
        learning_rate: the highest, after a warm-up of 5 % of the run; cosine to zero.
        seed: of weights, order and the time of steps.
        validation: train on nine tenths of the training images and evaluate on the tenth.
        lsam: fields of `LoopArguments` that are not the defaults.
        optimizer: "sgd", with momentum, or "adamw".
    """

    method: str
    workers: int
    steps: int
    learning_rate: float
    seed: int = 0
    validation: bool = False
    lsam: dict[str, float] = field(default_factory=dict)
    optimizer: str = "sgd"


@lru_cache(maxsize=2)
def tensors_of(data: str, validation: bool) -> list[torch.Tensor]:
    """Training images, their labels, held-out images and theirs; images float32 [count, 192], normalised."""
    values = json.loads(data)
    if validation:
        values |= {"validation_fraction": 0.1, "eval_file": None}
    images = load_images(ImageDataArguments(**values))
    train, held_out = (each.flatten(1).float() for each in (images.train_images, images.eval_images))
    mean, std = train.mean(0), train.std(0)
    return [(train - mean) / std, images.train_labels, (held_out - mean) / std, images.eval_labels]


def simulate(run: Run, data: str) -> dict[str, Any]:
    """Error, bytes and staleness at the end of a run.

    Args:
        data: the fields of `ImageDataArguments`, as JSON.
    """
    torch.set_num_threads(1)
    x, labels, held_out, their_labels = tensors_of(data, run.validation)
    draws = [torch.Generator().manual_seed(run.seed * 100_003 + rank) for rank in range(run.workers)]
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, int(labels.max()) + 1))

    def loss(model, rank):
        rows = torch.randint(len(labels), (BATCH,), generator=draws[rank])
        return lambda: cross_entropy(model(x[rows]), labels[rows])

    def optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if run.optimizer == "sgd":
            return torch.optim.SGD(parameters, run.learning_rate, momentum=MOMENTUM)
        return torch.optim.AdamW(parameters, run.learning_rate)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / max(1.0, 0.05 * run.steps)) * (1 + math.cos(math.pi * step / run.steps)) / 2

    begin = time.perf_counter()
    made, sync_steps = make_run(
        None if run.method == "data-parallel" else LoopArguments(**run.lsam),
        model,
        optimizer,
        loss,
        [Machine(jitter=0.2, latency=0.01)] * run.workers,
        Gradient(),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share),
        momentum=MOMENTUM,
        seed=run.seed,
    )
    end = list(made.run(run.steps))[-1]
    made.layout.write(end.anchor, list(model.parameters()))
    with torch.no_grad():
        wrong = (model(held_out).argmax(1) != their_labels).float().mean().item()
    return {
        "run": asdict(run),
        "sync_steps": sync_steps,
        "error": 100 * wrong,
        "bytes": end.bytes,
        "staleness": end.staleness,
        "dispersion": end.dispersion,
        "virtual_seconds": end.seconds,
        "seconds": time.perf_counter() - begin,
        "parameters": made.layout.numel,
        **provenance(),
    }


def error_of(result: dict[str, Any]) -> str:
    """What is said of a run that is done."""
    return f"n = {result['run']['workers']}: error {result['error']:.2f} %"


def tuned(runs: SimulatedRuns, plans: Sequence[Run], seeds: int) -> tuple[list[dict[str, Any]], list[list[dict]]]:
    """The trials of each plan, and for each its runs over seeds with the learning rate of the best."""
    trials = [
        replace(plan, learning_rate=rate, seed=TRIAL_SEED, validation=True)
        for plan in plans
        for rate in RATES[plan.optimizer]
    ]
    tried = runs.results(trials)
    best, left = [], iter(tried)
    for plan in plans:
        own = itertools.islice(left, len(RATES[plan.optimizer]))
        chosen = min(own, key=lambda result: result["error"])["run"]["learning_rate"]
        best += [replace(plan, learning_rate=chosen, seed=seed) for seed in range(seeds)]
    made = runs.results(best)
    return tried, [made[index : index + seeds] for index in range(0, len(made), seeds)]


def error(results: Sequence[dict[str, Any]]) -> str:
    return mean_and_spread([result["error"] for result in results], 1)


def steps_of(question: str) -> dict[int, int]:
    """Of each worker, at every n."""
    return {n: SAMPLES // (BATCH * n) if question == "samples" else STEPS for n in QUESTIONS[question][1]}


def compare(runs: SimulatedRuns, question: str, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """A column an n: the errors of both methods with the rates that were chosen, and how stale LSAM's anchors were."""
    steps, (optimizer, workers) = steps_of(question), QUESTIONS[question]
    plans = [Run(method, n, steps[n], 0.0, optimizer=optimizer) for method, n in itertools.product(METHODS, workers)]
    tried, groups = tuned(runs, plans, seeds)
    rows = [("steps a worker", *(f"{each:,}" for each in steps.values()))]
    for index, method in enumerate(METHODS):
        own = groups[index * len(workers) : (index + 1) * len(workers)]
        rows.append((f"{method}, error, %", *map(error, own)))
        rows.append(("its learning rate", *(f"{results[0]['run']['learning_rate']:g}" for results in own)))
        if index == 0:
            stale = (statistics.fmean(result["staleness"] for result in results) for results in own)
            rows.append(("its staleness, anchors", *(f"{each:.2f}" for each in stale)))
    header = "AdamW" if optimizer == "adamw" else "SGD"
    tables = [markdown_table((header, *(f"n = {n:,}" for n in workers)), rows)]
    if optimizer == "adamw":
        tables.append(trials(tried))
    return [*tried, *itertools.chain.from_iterable(groups)], "\n\n".join(tables)


def trials(tried: Sequence[dict[str, Any]]) -> str:
    """A line a method and n: the errors on held-out training images at every learning rate that was tried."""
    lines: dict[str, dict[str, str]] = {}
    for result in tried:
        line = lines.setdefault(f"{result['run']['method']}, n = {result['run']['workers']}", {})
        line[f"{result['run']['learning_rate']:g}"] = f"{result['error']:.1f}"
    rates = list(next(iter(lines.values())))
    rows = [(name, *(line[rate] for rate in rates)) for name, line in lines.items()]
    return markdown_table(("trials, error, %", *rates), rows)


def knobs(runs: SimulatedRuns, seeds: int, workers: int = 256) -> tuple[list[dict[str, Any]], str]:
    """A line a knob, each with trials of its own over the learning rate."""
    tried, groups = tuned(runs, [Run(METHODS[0], workers, STEPS, 0.0, lsam=changed) for changed in KNOBS], seeds)
    rows = []
    for changed, results in zip(KNOBS, groups, strict=True):
        name = ", ".join(f"{key} = {value:g}" for key, value in changed.items()) or "the defaults"
        rate = f"{results[0]['run']['learning_rate']:g}"
        rows.append((name, rate, error(results), f"{results[0]['staleness']:.2f}", str(seeds)))
    table = markdown_table((f"n = {workers}", "learning rate", "error, %", "staleness, anchors", "seeds"), rows)
    return [*tried, *itertools.chain.from_iterable(groups)], table


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Error against n, a panel a question; the line is the mean over seeds, the band their range."""
    import matplotlib
    from matplotlib.figure import Figure

    def errors(method: str, workers: int, steps: int) -> list[float]:
        run = {
            "method": method,
            "workers": workers,
            "steps": steps,
            "validation": False,
            "lsam": {},
            "optimizer": "sgd",
        }
        return [result["error"] for result in runs if run.items() <= result["run"].items()]

    figure = Figure(figsize=(8, 3), layout="constrained")
    titles = {"steps": f"{STEPS} steps a worker", "samples": f"{SAMPLES:,} samples in all"}
    for axis, (question, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for method in METHODS:
            values = [errors(method, n, steps) for n, steps in steps_of(question).items()]
            (line,) = axis.plot(WORKERS, [statistics.fmean(each) for each in values], marker="o", label=method)
            axis.fill_between(WORKERS, [*map(min, values)], [*map(max, values)], color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", xlabel="workers", title=title)
        axis.set_xticks(WORKERS, [f"{n:,}" for n in WORKERS])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error, %")
    figure.axes[0].legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "scale", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/simulate_scale")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/simulate_scale/tables")
    arguments, words = parser.parse_known_args()
    data = parse_configuration((ImageDataArguments,), ["--image_size=8", *words])
    runs = SimulatedRuns(simulate, error_of, data, arguments.runs_dir, arguments.processes, arguments.quiet)
    answers = [compare(runs, question, arguments.seeds) for question in QUESTIONS]
    answers.append(knobs(runs, arguments.seeds))
    found = [*itertools.chain.from_iterable(made for made, _ in answers)]
    tables = "\n\n".join(table for _, table in answers)
    write_json(arguments.output_dir / "scale.json", {"experiment": "scale", "runs": found})
    write_atomically(arguments.output_dir / "scale.md", tables + "\n")
    draw(found, arguments.output_dir / "scale.svg")
    print(tables)


if __name__ == "__main__":
    main()
