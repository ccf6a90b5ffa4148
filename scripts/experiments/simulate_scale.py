"""From 1 to 1,024 workers, simulated: error, staleness, distance between workers, and a server that cannot keep up.

    python scripts/experiments/simulate_scale.py --dataset parquet --train_file train.parquet --eval_file test.parquet

A perceptron with one hidden layer (6,506 parameters) on CIFAR-10 at 8x8 pixels, batches of 8, SGD with momentum 0.9; a
step takes one second, give or take a fifth. LSAM uses the plain gradient and float32 exchanges, so that only n changes.
There is one table per question:

    steps     each worker makes the same number of steps, whatever n is
    samples   all workers together see the same number of samples: the more workers, the fewer steps each
    knobs     64 workers, with other values of sync_steps, coupling_strength, anchor_lr and momentum_at, one at a time
    server    64 workers and a server that needs some time for each push, at their learning rate in `steps`
    adamw     the same with AdamW, at many rates: which rate does LSAM need to match data-parallel training?

In the first three, LSAM and data-parallel SGD have the same trials over the learning rate at every n (and each knob the
same number of trials), judged on a held-out tenth of the training images; the tables are for the test images. Finished
runs are kept in `--runs_dir` and not made again. `--output_dir` receives scale.json and scale.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lsam.files import write_atomically
from hf_lsam.loop import LoopArguments
from hf_lsam.simulation import Cluster, Gradient, Machine
from recipes.common.configuration import parse_configuration
from recipes.common.image_data import ImageDataArguments, load_images
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, provenance, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.simulated import SimulatedRuns, make_run

LSAM, DATA_PARALLEL = METHODS = ("LSAM", "data-parallel SGD")
WORKERS = (1, 4, 16, 64, 256, 1024)
STEPS, SAMPLES, BATCH, MOMENTUM = 64, 32_768, 8, 0.9
RATES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
TRIAL_SEED = 100
FEW_SEEDS = 1024  # with this many workers or more, there is only one seed
MANY = 64  # workers in the questions `knobs` and `server`
# Why these: exchanges at every step should help if distance between workers costs accuracy, and rarer ones should not
# hurt otherwise; half the coupling strength leaves workers further apart; and the anchor may take longer steps, because
# the mean of many is less noisy.
KNOBS: tuple[dict[str, Any], ...] = (
    {"sync_steps": 1},
    {"sync_steps": 8},
    {"coupling_strength": 0.5},
    {"anchor_lr": 1.5},
    {"momentum_at": "worker"},
)
# With AdamW, at every rate; errors on held-out training images.
WITH_ADAM = ("LSAM, AdamW", "data-parallel AdamW")
ADAM_WORKERS, ADAM_SEEDS = (1, 4, 16, 64), (100, 101, 102)
ADAM_RATES = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
LOADS = (0.0, 0.5, 1.0, 2.0, 4.0)  # time that the server needs for the pushes of a period, divided by the period


@dataclass(frozen=True)
class Run:
    """One simulated run.

    Args:
        method: one of `METHODS` or `WITH_ADAM`.
        workers: n.
        steps: steps per worker; LSAM's workers share n times as many.
        learning_rate: the peak, after a warm-up of 5 % of the run, followed by a cosine to zero.
        seed: seed of weights, order and step times.
        validation: evaluate on a part of the training images (a tenth, or validation_fraction), not trained on.
        lsam: fields of `LoopArguments` that differ from the defaults.
        load: time that the server needs for one push of every worker, divided by the time of sync_steps steps.
    """

    method: str
    workers: int
    steps: int
    learning_rate: float = 0.0
    seed: int = 0
    validation: bool = False
    lsam: dict[str, Any] = field(default_factory=dict)
    load: float = 0.0


@lru_cache(maxsize=2)
def tensors_of(data: str, validation: bool) -> tuple[torch.Tensor, ...]:
    """Training images and labels, held-out images and labels; images are float32 [N, pixels], normalised to mean 0 and
    standard deviation 1."""
    values = json.loads(data)
    images = load_images(ImageDataArguments(**values | {"tuning": validation}))
    train, held_out = (each.flatten(1).float() for each in (images.train_images, images.eval_images))
    mean, std = train.mean(0), train.std(0)
    return (train - mean) / std, images.train_labels, (held_out - mean) / std, images.eval_labels


def simulate(run: Run, data: str) -> dict[str, Any]:
    """The result of a run.

    Args:
        run: the settings of the run.
        data: the fields of `ImageDataArguments`, as JSON.
    """
    torch.set_num_threads(1)
    x, labels, held_out, their_labels = tensors_of(data, run.validation)
    draws = [torch.Generator().manual_seed(run.seed * 1_000_003 + worker) for worker in range(run.workers)]
    torch.manual_seed(run.seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, int(labels.max()) + 1))

    def loss(model: nn.Module, worker: int) -> Callable[[], torch.Tensor]:
        rows = torch.randint(len(labels), (BATCH,), generator=draws[worker])
        return lambda: cross_entropy(model(x[rows]), labels[rows])

    def optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if run.method in WITH_ADAM:
            return torch.optim.AdamW(parameters, run.learning_rate)
        return torch.optim.SGD(parameters, run.learning_rate, momentum=MOMENTUM)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / (0.05 * run.steps)) * (1 + math.cos(math.pi * step / run.steps)) / 2

    arguments = None
    if run.method.startswith(LSAM):  # not scaled: the learning rate is what is tried
        arguments = LoopArguments(**{"exchange_bits": 32, "scale_learning_rate": False, **run.lsam})
    begin = time.perf_counter()
    made, sync_steps = make_run(
        arguments,
        model,
        optimizer,
        loss,
        [Machine(jitter=0.2)] * run.workers,
        Gradient(),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share),
        seed=run.seed,
        push_seconds=run.load * arguments.steps_between_pushes(run.workers) / run.workers if arguments else 0.0,
    )
    middle, end = made.run(run.steps, moments=2)
    made.layout.write(end.anchor, list(model.parameters()))
    with torch.no_grad():
        wrong = (model(held_out).argmax(1) != their_labels).double().mean().item()
    server = made.server.core if isinstance(made, Cluster) else None
    return {
        "run": asdict(run),
        "sync_steps": sync_steps,
        "error": 100 * wrong,
        "staleness": end.staleness,
        "dispersion": middle.dispersion,
        "bytes": end.bytes,
        "steps_in_all": end.steps_in_all,
        "pushes": server.accepted_pushes if server else 0,
        "anchors": server.anchor.version if server else run.steps,
        "virtual_seconds": end.seconds,
        "seconds": time.perf_counter() - begin,
        "parameters": made.layout.numel,
        **provenance(),
    }


def error_of(result: dict[str, Any]) -> str:
    """The text shown for a finished run."""
    return f"n = {result['run']['workers']}, error {result['error']:.2f} % in {result['seconds']:.0f} s"


def steps_of(question: str, most_workers: int) -> dict[int, int]:
    """Steps per worker, for every n."""
    numbers = [n for n in WORKERS if n <= most_workers]
    return {n: STEPS if question == "steps" else SAMPLES // (BATCH * n) for n in numbers}


def compared(most_workers: int) -> list[Run]:
    """The runs of `steps`, `samples` and `knobs`, without rate and seed, and without duplicates."""
    plans = [
        Run(method, n, steps)
        for question, method in itertools.product(("steps", "samples"), METHODS)
        for n, steps in steps_of(question, most_workers).items()
    ]
    plans += [Run(LSAM, MANY, STEPS, lsam=knob) for knob in KNOBS]
    return [plan for index, plan in enumerate(plans) if plan not in plans[:index]]


def seeds_of(plan: Run, seeds: int) -> range:
    return range(1 if plan.workers >= FEW_SEEDS else seeds)


def trials_of(plan: Run) -> list[Run]:
    return [replace(plan, learning_rate=rate, seed=TRIAL_SEED, validation=True) for rate in RATES]


def make(runs: SimulatedRuns, seeds: int, most_workers: int) -> list[dict[str, Any]]:
    """All runs: the trials, those at the best rates, and those with a slow server."""
    plans = sorted(compared(most_workers), key=lambda plan: plan.workers * plan.steps)
    tried = runs.results([trial for plan in plans for trial in trials_of(plan)])
    of_plan = zip(*[iter(tried)] * len(RATES), strict=True)
    best = [min(trials, key=lambda result: result["error"])["run"]["learning_rate"] for trials in of_plan]
    chosen = [replace(plan, learning_rate=rate) for plan, rate in zip(plans, best, strict=True)]
    loaded = next(plan for plan in chosen if plan == Run(LSAM, MANY, STEPS, plan.learning_rate))
    chosen += [replace(loaded, load=load) for load in LOADS if load]
    made = tried + runs.results([replace(plan, seed=seed) for plan in chosen for seed in seeds_of(plan, seeds)])
    return made + runs.results([run for several in with_adam().values() for run in several])


def with_adam() -> dict[tuple[str, int, float], list[Run]]:
    """For every method, n and rate, the runs over seeds."""
    return {
        (method, n, rate): [Run(method, n, STEPS, rate, seed, validation=True) for seed in ADAM_SEEDS]
        for method, n, rate in itertools.product(WITH_ADAM, ADAM_WORKERS, ADAM_RATES)
    }


def of_plan(runs: Sequence[dict[str, Any]], plan: Run) -> list[dict[str, Any]]:
    """The runs on the test images that differ from a plan only in rate and seed."""
    fields = {**asdict(plan), "validation": False}
    del fields["learning_rate"], fields["seed"]
    return [result for result in runs if fields.items() <= result["run"].items()]


def error(results: Sequence[dict[str, Any]]) -> str:
    return mean_and_spread([result["error"] for result in results], 1)


def mean(results: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(result[name] for result in results)


def with_rate_of(runs: Sequence[dict[str, Any]], workers: int, plan: Run) -> str:
    """The trial of a plan at the rate that trials chose with `workers` workers."""
    chosen = of_plan(runs, replace(plan, workers=workers))[0]["run"]["learning_rate"]
    trial = asdict(replace(plan, learning_rate=chosen, seed=TRIAL_SEED, validation=True))
    return next(f"{result['error']:.1f}" for result in runs if result["run"] == trial)


def most_of(runs: Sequence[dict[str, Any]]) -> int:
    return max(result["run"]["workers"] for result in runs)


def comparison(runs: Sequence[dict[str, Any]], question: str) -> str:
    """One column per n: errors and rates of both methods, and what LSAM's workers and anchors did."""
    steps = steps_of(question, most_of(runs))
    rows = [["steps a worker", *(f"{each:,}" for each in steps.values())]]
    for method in METHODS:
        own = [of_plan(runs, Run(method, n, each)) for n, each in steps.items()]
        rows.append([f"{method}: test error, %", *map(error, own)])
        rows.append(["its learning rate", *(f"{results[0]['run']['learning_rate']:g}" for results in own)])
        if question == "steps":
            held = [with_rate_of(runs, 4, Run(method, n, each)) if n > 4 else "" for n, each in steps.items()]
            rows.append(["trial error with the rate of n = 4, %", *held])
        if method == LSAM:
            rows.append(["staleness, anchors", *(f"{mean(each, 'staleness'):.3f}" for each in own)])
            rows.append(["pushes an anchor", *(f"{mean(each, 'pushes') / mean(each, 'anchors'):,.1f}" for each in own)])
            rows.append(
                ["distance between workers, % of the norm", *(f"{100 * mean(each, 'dispersion'):.1f}" for each in own)]
            )
    return markdown_table(("", *(f"n = {n:,}" for n in steps)), rows)


def knobs(runs: Sequence[dict[str, Any]]) -> str:
    """One line per knob."""
    plan = Run(LSAM, MANY, STEPS)
    lines = [("the defaults", plan)]
    lines += [
        (", ".join(f"{key} = {value}" for key, value in knob.items()), replace(plan, lsam=knob)) for knob in KNOBS
    ]
    rows = []
    for label, each in [*lines, (DATA_PARALLEL, replace(plan, method=DATA_PARALLEL))]:
        own = of_plan(runs, each)
        apart = f"{100 * mean(own, 'dispersion'):.1f}" if each.method == LSAM else ""
        rows.append((label, f"{own[0]['run']['learning_rate']:g}", error(own), apart))
    return markdown_table((f"n = {MANY:,}", "learning rate", "test error, %", "distance between workers, %"), rows)


def server(runs: Sequence[dict[str, Any]]) -> str:
    """One line per load of the server."""
    rows = []
    for load in LOADS:
        own = of_plan(runs, Run(LSAM, MANY, STEPS, load=load))
        rows.append(
            (
                f"{load:g}",
                error(own),
                f"{mean(own, 'staleness'):.2f}",
                f"{mean(own, 'steps_in_all') / mean(own, 'pushes'):.1f}",
                f"{mean(own, 'virtual_seconds'):.0f}",
            )
        )
    header = ("load of the server", "test error, %", "staleness, anchors", "steps a push", "seconds of the run")
    return markdown_table((f"n = {MANY}: {header[0]}", *header[1:]), rows)


def adamw(runs: Sequence[dict[str, Any]]) -> str:
    """One line per method and n, one column per rate: means over seeds."""
    errors = {json.dumps(result["run"]): result["error"] for result in runs}
    cells = {
        key: f"{statistics.fmean(errors[json.dumps(asdict(run))] for run in several):.1f}"
        for key, several in with_adam().items()
    }
    rows = [
        (f"{method}, n = {n}", *(cells[method, n, rate] for rate in ADAM_RATES))
        for n, method in itertools.product(ADAM_WORKERS, WITH_ADAM)
    ]
    return markdown_table(("error, %, at the learning rate", *(f"{rate:g}" for rate in ADAM_RATES)), rows)


def tables(runs: Sequence[dict[str, Any]]) -> str:
    """The tables of all questions."""
    said = {
        f"Each worker makes {STEPS} steps:": comparison(runs, "steps"),
        f"All together see {SAMPLES:,} samples:": comparison(runs, "samples"),
        f"Other settings, {MANY} workers, {STEPS} steps each:": knobs(runs),
        "A server that takes a time for each push (1: as long as workers take from push to push):": server(runs),
        f"AdamW, {STEPS} steps each, on held-out training images:": adamw(runs),
    }
    return "\n\n".join(f"{title}\n\n{table}" for title, table in said.items())


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws error against n as SVG, one panel per question: the mean over seeds, and their range."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    titles = {"steps": f"{STEPS} steps a worker", "samples": f"{SAMPLES:,} samples in all"}
    for axis, (question, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        numbers = steps_of(question, most_of(runs))
        for method, marker in zip(METHODS, "os", strict=True):
            own = [of_plan(runs, Run(method, n, steps)) for n, steps in numbers.items()]
            errors = [[result["error"] for result in results] for results in own]
            (line,) = axis.plot([*numbers], [*map(statistics.fmean, errors)], marker=marker, label=method)
            axis.fill_between([*numbers], [*map(min, errors)], [*map(max, errors)], color=line.get_color(), alpha=0.2)
        axis.set(xscale="log", xlabel="workers", title=title)
        axis.set_xticks([*numbers], [f"{n:,}" for n in numbers])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test error, %")
    figure.axes[0].legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--most_workers",
        type=int,
        choices=[n for n in WORKERS if n >= MANY],  # which the other questions are about
        default=WORKERS[-1],
        help="leave out the larger numbers of workers",
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/simulate_scale")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/simulate_scale/tables")
    arguments, words = parser.parse_known_args()
    data = parse_configuration((ImageDataArguments,), ["--image_size=8", *words])
    runs = SimulatedRuns(simulate, error_of, {}, data, arguments.runs_dir, arguments.processes, arguments.quiet)
    made = make(runs, arguments.seeds, arguments.most_workers)
    write_json(arguments.output_dir / "scale.json", {"experiment": "scale", "runs": made})
    write_atomically(arguments.output_dir / "scale.md", tables(made) + "\n")
    print(tables(made))


if __name__ == "__main__":
    main()
