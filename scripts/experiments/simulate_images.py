"""Methods, numbers of workers and uneven clusters, simulated on images: see `hf_lsam.simulation`.

    python scripts/experiments/simulate_images.py EXPERIMENT --dataset parquet \\
        --train_file train.parquet --eval_file test.parquet

    methods   n = 4, every method with the same four trials over its learning rate
    long      three times as many steps, with trials of their own
    epochs    thirty times all images of the training set, in batches of 128
    overfit   a hundred and fifty times a few images, which the network learns by heart
    wrong     a hundred times a few images, two fifths of them with a wrong label
    workers   error against n, once with each worker's batch fixed, and once with the batch of all workers fixed
    batches   error against n with wrong labels: the same number of epochs, in fewer and larger steps
    sam       what SAM's gradient gains or costs when workers drift apart and when anchors arrive late
    clock     virtual time of a run, its error, and the time until LSAM is level: a slow worker, slow links, a pause

ResNet-20 with half the width, on images of 16x16 pixels. Trials are judged on a held-out tenth of the training images;
the tables are for the test images. Finished runs are kept in `--runs_dir` and not made again. `--output_dir` receives
EXPERIMENT.json and EXPERIMENT.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hf_lsam import vision
from hf_lsam.batchnorm import reestimate
from hf_lsam.compression import encoded_bytes
from hf_lsam.files import write_atomically
from hf_lsam.loop import LoopArguments
from hf_lsam.simulation import Gradient, Machine
from recipes.common.configuration import parse_configuration
from recipes.common.image_batches import Batches, channel_statistics
from recipes.common.image_data import ImageDataArguments, ImageSet, load_images
from recipes.common.progress import add_quiet
from recipes.common.results import REPOSITORY, provenance, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.simulated import SimulatedRuns, make_run

# How the methods differ. `data_parallel` has no server; with a `barrier` workers wait for their anchor; with `nesterov`
# the momentum follows Nesterov's rule, as at LSAM's anchor. An exchange every 8 steps takes as many bytes as one every
# 2 steps in 8 bits.
AT_WORKERS = {"lsam": {"momentum_at": "worker"}}
METHODS: dict[str, dict[str, Any]] = {
    "LSAM": {"sam": True},
    "LSAM without SAM": {},
    "LSAM, momentum at the workers": {"sam": True, **AT_WORKERS},
    "LSAM without SAM, momentum at the workers": AT_WORKERS,
    "LSAM without SAM, 32 bits": {"lsam": {"exchange_bits": 32}},
    "LSAM without SAM, 4 bits": {"lsam": {"exchange_bits": 4}},
    "LSAM, 32 bits, tau = 8": {"sam": True, "lsam": {"sync_steps": 8, "exchange_bits": 32}},
    "LSAM as in the paper": {
        "sam": True,
        "lsam": {
            "coupling": "score",
            "coupling_strength": 0.1,
            "compensate_coupling": False,
            "anchor_momentum_correction": 0.3,
            "sync_steps": 16,
            "exchange_bits": 32,
        },
    },
    "data-parallel SAM": {"sam": True, "data_parallel": True},
    "data-parallel SGD": {"data_parallel": True},
    "data-parallel Nesterov SGD": {"data_parallel": True, "nesterov": True},
    "local SGD": {"barrier": True, **AT_WORKERS},
    "local SGD with SAM": {"sam": True, "barrier": True, **AT_WORKERS},
    "DiLoCo": {
        "barrier": True,
        "lsam": {
            "sync_steps": 8,
            "exchange_bits": 32,
            "anchor_optimizer": "nesterov",
            "anchor_lr": 0.7,
            "anchor_momentum": 0.9,
        },
    },
    "EASGD": {"lsam": {"sync_steps": 8, "exchange_bits": 32, "algorithm": "easgd", "coupling_strength": 0.225}},
    "LSGD": {"lsam": {"sync_steps": 8, "exchange_bits": 32, "algorithm": "lsgd", "coupling_strength": 0.9}},
}
# The methods of the experiments with fewer of them.
FIVE = ("LSAM", "LSAM without SAM", "data-parallel SAM", "data-parallel Nesterov SGD", "data-parallel SGD")
# What trials try, the same for each method.
RATES = tuple({"learning_rate": rate} for rate in (0.05, 0.1, 0.2, 0.4))
TRIAL_SEEDS = (100, 101)
SHORT, LONG = 480, 1440
MOMENTUM = 0.9
SMALL_IMAGES = ("--image_size=16", "--max_train_images=7680")


@dataclass(frozen=True)
class Run:
    """One simulated run.

    Args:
        method: a key of `METHODS`.
        steps: steps per worker; if workers share the steps (all methods without a barrier), n times as many in total.
        learning_rate: the peak, after a warm-up of 5 % of the run, followed by a cosine to zero.
        sam_rho: radius of the methods with SAM's gradient.
        wrong_labels: share of the training images whose label is replaced by another one.
        batch_size: batch size of one worker.
        seed: seed of weights, order and augmentation.
        validation: evaluate on a part of the training images (a tenth, or validation_fraction), not trained on.
        machines: one per worker, as fields of `hf_lsam.simulation.Machine`.
        moments: how many times the model is evaluated.
        sync_steps: steps between two pushes; None for the method's own.
    """

    method: str
    steps: int = SHORT
    learning_rate: float = 0.1
    sam_rho: float = 0.02
    wrong_labels: float = 0.0
    batch_size: int = 32
    seed: int = 0
    validation: bool = False
    machines: list[dict[str, Any]] = field(default_factory=lambda: [{}] * 4)
    moments: int = 1
    sync_steps: int | None = None


@lru_cache(maxsize=2)
def images_of(data: str, validation: bool, wrong_labels: float = 0.0) -> ImageSet:
    values = json.loads(data)
    images = load_images(ImageDataArguments(**values | {"tuning": validation}))
    labels, wrong = images.train_labels, torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=wrong)[: round(wrong_labels * len(labels))]
    others = torch.randint(1, len(images.labels), (len(chosen),), generator=wrong)
    labels[chosen] = (labels[chosen] + others) % len(images.labels)
    return images


class Task:
    """What the workers of a run train, and how it is judged.

    Args:
        run: the settings of the run; the number of its machines is the number of workers.
        data: the fields of `ImageDataArguments`, as JSON.

    Attributes:
        model: the model before the first step.
    """

    def __init__(self, run: Run, data: str):
        self._run, self._images = run, images_of(data, run.validation, run.wrong_labels)
        self._mean, self._std = channel_statistics(self._images.train_images)
        self._held_out = self._plain(self._images.eval_images, self._images.eval_labels)
        self._trained_on = self._plain(self._images.train_images, self._images.train_labels)
        torch.manual_seed(run.seed)
        self.model = vision.create("resnet20", len(self._images.labels), width=8).to(memory_format=torch.channels_last)

    def _plain(self, images: torch.Tensor, labels: torch.Tensor) -> Batches:
        """Batches without augmentation, for evaluation."""
        return Batches(images, labels, 500, self._mean, self._std, train=False)

    def batches(self, rank: int, workers: int) -> Batches:
        """A worker's share of every epoch."""
        images, labels, seed = self._images.train_images, self._images.train_labels, self._run.seed
        return Batches(
            images, labels, self._run.batch_size, self._mean, self._std, seed=seed, rank=rank, world_size=workers
        )

    def stream(self, rank: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """A worker's batches, epoch after epoch."""
        batches = self.batches(rank, len(self._run.machines))
        return itertools.chain.from_iterable(map(batches.epoch, itertools.count()))

    def optimizer(self, parameters: Sequence[nn.Parameter], nesterov: bool = False) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self._run.learning_rate, MOMENTUM, weight_decay=5e-4, nesterov=nesterov)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """The schedule of the whole run: a warm-up of 5 %, then a cosine to zero."""
        steps = self._run.steps

        def share(step: int) -> float:
            return min(1.0, (step + 1) / (0.05 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2

        return torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    @torch.no_grad()
    def errors(self, model: nn.Module) -> dict[str, float]:
        """Errors of `model` in % on the held-out images and on its training images, with BatchNorm's statistics
        re-estimated."""
        reestimate(model, itertools.islice(self.batches(0, 1).epoch(0), 32), lambda batch: model(batch[0]))
        model.eval()
        wrong = [
            sum((model(x).argmax(1) != labels).sum().item() for x, labels in batches) / len(batches.labels)
            for batches in (self._held_out, self._trained_on)
        ]
        model.train()
        return {"error": 100 * wrong[0], "train_error": 100 * wrong[1]}


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, labels = batch
    return cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), labels)


def simulate(run: Run, data: str, method: dict[str, Any] | None = None) -> dict[str, Any]:
    """Error, bytes and virtual seconds at the moments of a run.

    Args:
        run: the settings of the run.
        data: the fields of `ImageDataArguments`, as JSON.
        method: a value like those of `METHODS`; if None, that of the run's method.
    """
    torch.set_num_threads(1)
    task, method = Task(run, data), METHODS[run.method] if method is None else method
    streams = [task.stream(rank) for rank in range(len(run.machines))]
    lsam = method.get("lsam", {}) | ({} if run.sync_steps is None else {"sync_steps": run.sync_steps})

    def loss(model, rank):
        batch = next(streams[rank])
        return lambda: loss_of(model, batch)

    made, sync_steps = make_run(
        None if method.get("data_parallel") else LoopArguments(**lsam),
        task.model,
        partial(task.optimizer, nesterov=method.get("nesterov", False)),
        loss,
        [Machine(**fields) for fields in run.machines],
        Gradient(run.sam_rho if method.get("sam") else 0.0),
        task.scheduler,
        seed=run.seed,
        barrier=method.get("barrier", False),
    )
    parameters = [p for p in task.model.parameters() if p.requires_grad]

    def errors(anchor: torch.Tensor) -> dict[str, float]:
        made.layout.write(anchor, parameters)
        return task.errors(task.model)

    begin = time.perf_counter()
    points = [
        {
            "step": moment.steps,
            "virtual_seconds": moment.seconds,
            "bytes": moment.bytes,
            **errors(moment.anchor),
            "staleness": moment.staleness,
            "dispersion": moment.dispersion,
        }
        for moment in made.run(run.steps, run.moments)
    ]
    return {
        "run": asdict(run),
        "sync_steps": sync_steps,
        "points": points,
        "seconds": time.perf_counter() - begin,
        "parameters": made.layout.numel,
        **provenance(),
    }


def error_of(result: dict[str, Any]) -> str:
    """The text shown for a finished run."""
    return f"error {result['points'][-1]['error']:.2f} %"


def tuned(
    runs: SimulatedRuns,
    names: Sequence[str] = tuple(METHODS),
    steps: int = SHORT,
    settings: Callable[[str], Sequence[dict[str, Any]]] = lambda name: RATES,
    seeds: Sequence[int] = TRIAL_SEEDS,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The trials and, for each method, the settings (fields of `Run`) with the lowest mean error over the seeds."""
    plan = [(name, each) for name in names for each in settings(name)]
    tried = runs.results(
        [Run(name, steps, **each, seed=seed, validation=True) for name, each in plan for seed in seeds]
    )
    errors = [mean_error(tried[index : index + len(seeds)]) for index in range(0, len(tried), len(seeds))]
    ranked = sorted(zip(errors, plan, strict=True), key=itemgetter(0))
    return tried, {name: next(each for _, (other, each) in ranked if other == name) for name in names}


def bits_of(method: str) -> int:
    """The bits of a value that a worker sends or receives."""
    fields = METHODS[method]
    return 32 if fields.get("data_parallel") else LoopArguments(**fields.get("lsam", {})).exchange_bits


def table_of(runs: SimulatedRuns, plans: dict[str, list[Run]]) -> tuple[list[dict[str, Any]], str]:
    """One line per label: error over the seeds, bytes and tau."""
    made = runs.results([run for several in plans.values() for run in several])
    rows, left = [], iter(made)
    for label, several in plans.items():
        own = [next(left) for _ in several]
        last = [result["points"][-1] for result in own]
        rows.append(
            (
                label,
                f"{several[0].learning_rate:g}",
                str(own[0]["sync_steps"] or "-"),
                str(bits_of(several[0].method)),
                mean_and_spread([point["error"] for point in last]),
                f"{last[0]['bytes'] / 1e6:,.0f}",
                str(len(own)),
            )
        )
    return made, markdown_table(("", "learning rate", "tau", "bits", "test error, %", "MB exchanged", "seeds"), rows)


def methods(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Short runs of every method, with the learning rate of its best trial."""
    tried, best = tuned(runs)
    made, table = table_of(
        runs, {name: [Run(name, **best[name], seed=seed) for seed in range(seeds)] for name in METHODS}
    )
    return [*tried, *made], table


def long(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Runs three times as long, after three trials of that length with one seed, at higher rates than short runs."""
    higher = [{"learning_rate": rate} for rate in (0.1, 0.2, 0.4)]
    tried, best = tuned(runs, FIVE, LONG, lambda name: higher, seeds=TRIAL_SEEDS[:1])
    made, table = table_of(
        runs, {name: [Run(name, LONG, **best[name], seed=seed) for seed in range(seeds)] for name in FIVE}
    )
    return [*tried, *made], table


def epochs(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Thirty epochs of the images in batches of 128, evaluated after every sixth; one rate for all, without trials."""
    images, batch_size = len(images_of(runs.data, False).train_labels), 128
    plan = [
        Run(name, 30 * images // (4 * batch_size), learning_rate=0.2, batch_size=batch_size, seed=seed, moments=5)
        for name, seed in itertools.product(FIVE, range(seeds))
    ]
    made = runs.results(plan)
    rows = []
    for index, name in enumerate(FIVE):
        own = [result["points"] for result in made[index * seeds : (index + 1) * seeds]]
        errors = (mean_and_spread([point["error"] for point in moment]) for moment in zip(*own, strict=True))
        rows.append((name, *errors, f"{own[0][-1]['bytes'] / 1e6:,.0f}"))
    return made, markdown_table(("error, % after epoch", "6", "12", "18", "24", "30", "MB exchanged"), rows)


def overfit(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """150 epochs of a few images; six trials per method, which for SAM's gradient cover the radius as well."""
    plan = [(name, 150) for name in FIVE]
    return by_heart(runs, seeds, plan, (0.1, 0.2, 0.4), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4), (0.05, 0.1))


def wrong(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """100 epochs of a few images with 40 % of the labels wrong; six trials per method.

    The plain gradient also trains for half as long, in which time it learns fewer of the wrong labels.
    """
    plan = [*((name, 100) for name in FIVE), (FIVE[-1], 50)]
    rates = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    return by_heart(runs, seeds, plan, (0.2, 0.4, 0.8), rates, (0.1, 0.2), wrong_labels=0.4)


def by_heart(
    runs: SimulatedRuns,
    seeds: int,
    plan: Sequence[tuple[str, int]],
    rates_with_sam: Sequence[float],
    rates_without: Sequence[float],
    radii: Sequence[float],
    **fields: float,
) -> tuple[list[dict[str, Any]], str]:
    """Runs that are long enough for the network to know most of its images by heart.

    Args:
        plan: methods, with the number of epochs of all workers together; labels show it only if it differs from that of
            the first method.
        rates_with_sam, rates_without: the learning rates to try; those with SAM are tried with each of the `radii`.
        fields: fields of all runs.
    """

    def settings(name: str) -> list[dict[str, float]]:
        if METHODS[name].get("sam"):
            pairs = itertools.product(rates_with_sam, radii)
            return [{"learning_rate": rate, "sam_rho": rho, **fields} for rate, rho in pairs]
        return [{"learning_rate": rate, **fields} for rate in rates_without]

    images, everything, rows = len(images_of(runs.data, False).train_labels), [], []
    finished: dict[str, list[dict[str, Any]]] = {}
    for name, epochs in plan:
        steps = epochs * images // (4 * Run.batch_size)
        tried, best = tuned(runs, [name], steps, settings, TRIAL_SEEDS[:1])
        made = runs.results([Run(name, steps, **best[name], seed=seed) for seed in range(seeds)])
        everything += [*tried, *made]
        finished[name if epochs == plan[0][1] else f"{name}, {epochs} epochs"] = made
    errors = {label: [run["points"][-1]["error"] for run in made] for label, made in finished.items()}
    for label, made in finished.items():
        run, points = made[0]["run"], [each["points"][-1] for each in made]
        ahead = mean_and_spread([b - a for a, b in zip(errors[label], errors[FIVE[-1]], strict=True)])
        rows.append(
            (
                label,
                f"{run['learning_rate']:g}",
                f"{run['sam_rho']:g}" if METHODS[run["method"]].get("sam") else "-",
                mean_and_spread([point["train_error"] for point in points]),
                mean_and_spread(errors[label]),
                "-" if label == FIVE[-1] else ahead,
                f"{points[0]['bytes'] / 1e6:,.0f}",
                str(seeds),
            )
        )
    heads = ("", "learning rate", "rho", "training error, %", "test error, %", f"ahead of {FIVE[-1]}", "MB exchanged")
    return everything, markdown_table((*heads, "seeds"), rows)


def workers(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Each worker makes 480 steps whatever n is, of 32 images or of 128 / n, with the learning rate of n = 4."""
    _, best = tuned(runs)
    numbers = (1, 2, 4, 8, 16)
    batch_sizes = {"32 a worker": lambda n: 32, "128 in all": lambda n: 128 // n}
    plan = [
        Run(name, **best[name], seed=seed, batch_size=batch_size(n), machines=[{}] * n)
        for batch_size, name, n, seed in itertools.product(batch_sizes.values(), FIVE, numbers, range(seeds))
    ]
    made = runs.results(plan)
    errors = (result["points"][-1]["error"] for result in made)
    rows = [
        (f"{name}, {label}", *(mean_and_spread(list(itertools.islice(errors, seeds))) for _ in numbers))
        for label, name in itertools.product(batch_sizes, FIVE)
    ]
    return made, markdown_table(("error, %", *(f"n = {n}" for n in numbers)), rows)


def batches(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Like `wrong`, with 4, 8 and 16 workers, each with 32 images per step and an n-th of the images of 100 epochs.

    Three trials per method and number of workers, over the learning rate; the radius is 0.1, which the trials of
    `wrong` chose.
    """
    numbers, names = (4, 8, 16), ("LSAM", "LSAM, momentum at the workers", "data-parallel SAM", "data-parallel SGD")
    images, everything = len(images_of(runs.data, False).train_labels), []
    cells: dict[str, list[str]] = {name: [name] for name in names}
    for n in numbers:
        steps = 100 * images // (n * Run.batch_size)

        def settings(name: str, n: int = n) -> list[dict[str, Any]]:
            rates = (0.2, 0.4, 0.8) if METHODS[name].get("sam") else (0.05, 0.2, 0.8)
            radius = {"sam_rho": 0.1} if METHODS[name].get("sam") else {}
            return [{"learning_rate": rate, **radius, "wrong_labels": 0.4, "machines": [{}] * n} for rate in rates]

        tried, best = tuned(runs, names, steps, settings, TRIAL_SEEDS[:1])
        made = runs.results([Run(name, steps, **best[name], seed=seed) for name in names for seed in range(seeds)])
        everything += [*tried, *made]
        errors = (result["points"][-1]["error"] for result in made)
        for name in names:
            error = mean_and_spread(list(itertools.islice(errors, seeds)))
            cells[name].append(f"{error}, rate {best[name]['learning_rate']:g}")
    heads = (f"n = {n}, {n * Run.batch_size} images" for n in numbers)
    return everything, markdown_table(("error, %", *heads), list(cells.values()))


# Without and with SAM's gradient: workers that act as one, that drift apart for two steps, and that wait for nobody.
PAIRS = {
    "data-parallel": ("data-parallel SGD", "data-parallel SAM"),
    "local SGD": ("local SGD", "local SGD with SAM"),
    "LSAM": ("LSAM without SAM", "LSAM"),
}


def sam(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Errors at equal rates, without and with SAM's gradient, and their difference seed by seed."""
    rates = (0.1, 0.2)
    plan = [
        Run(name, learning_rate=rate, seed=seed)
        for pair, rate in itertools.product(PAIRS.values(), rates)
        for name, seed in itertools.product(pair, range(seeds))
    ]
    made = runs.results(plan)
    errors = (result["points"][-1]["error"] for result in made)
    rows = []
    for label, rate in itertools.product(PAIRS, rates):
        without, with_sam = list(itertools.islice(errors, seeds)), list(itertools.islice(errors, seeds))
        costs = [b - a for a, b in zip(without, with_sam, strict=True)]
        rows.append((label, f"{rate:g}", *map(mean_and_spread, (without, with_sam, costs)), str(seeds)))
    return made, markdown_table(("error, %", "learning rate", "without SAM", "with SAM", "difference", "seeds"), rows)


# A step takes 0.1 s. The model is charged as if it had 22.7 M parameters (MiniLM), so links are slowed down by the
# factor by which this network is smaller.
STEP, PARAMETERS, OWN = 0.1, 22.7e6, 68_074
CLUSTERS = {
    "four alike on one machine": [{"step_seconds": STEP}] * 4,
    "one at half speed": [{"step_seconds": STEP}] * 3 + [{"step_seconds": 2 * STEP}],
    "one pauses for a minute": [{"step_seconds": STEP}] * 3 + [{"step_seconds": STEP, "pauses": [[20.0, 60.0]]}],
    "links of 1 Gb/s": [{"step_seconds": STEP, "latency": 5e-4, "bandwidth": 125e6 * OWN / PARAMETERS}] * 4,
    "links of 0.1 Gb/s": [{"step_seconds": STEP, "latency": 5e-4, "bandwidth": 12.5e6 * OWN / PARAMETERS}] * 4,
}
CLOCKED = ("LSAM without SAM", "data-parallel SGD", "DiLoCo", "EASGD")


def machines_of(cluster: str, method: str) -> list[dict[str, Any]]:
    """The machines of a cluster, as a method uses their links.

    A ring's bytes cross every link alike. A server is on the first worker's machine, and the exchange of all others
    shares that machine's link: each has an equal part of it, as if all were on their way at once.
    """
    machines = CLUSTERS[cluster]
    if METHODS[method].get("data_parallel") or "bandwidth" not in machines[0]:
        return machines
    beside_the_server, *others = machines
    return [
        {"step_seconds": beside_the_server["step_seconds"]},
        *({**each, "bandwidth": each["bandwidth"] / len(others)} for each in others),
    ]


# A run is level with data-parallel training if its error is not higher by more than this. The shortest run, of these
# lengths, that is level gives the time until level. Each is a separate run, with a whole learning rate schedule.
TOLERANCE = 0.5


def sync_steps_of(cluster: str, method: str) -> int | None:
    """The steps that a worker makes while its push is on its way to the server, if these are more than the method's
    own sync_steps: where the link decides how often workers exchange, sync_steps should say so, because the anchor's
    momentum is set by it."""
    if METHODS[method].get("data_parallel"):
        return None
    lsam = METHODS[method].get("lsam", {})
    size = encoded_bytes(OWN, lsam.get("exchange_bits", 8))
    slowest = max(Machine(**fields).transfer(size) for fields in machines_of(cluster, method))
    steps = math.ceil(slowest / STEP)
    return steps if steps > lsam.get("sync_steps", 2) else None


LENGTHS = (SHORT, 600, 720, LONG, 2 * LONG)


def clock(runs: SimulatedRuns, seeds: int) -> tuple[list[dict[str, Any]], str]:
    """Virtual seconds until all have finished, the error at that point, and the number of steps until LSAM is level."""
    _, best = tuned(runs, CLOCKED)

    def made(name: str, label: str, steps: int) -> list[dict[str, Any]]:
        cluster = {"machines": machines_of(label, name), "sync_steps": sync_steps_of(label, name)}
        return runs.results([Run(name, steps, **best[name], seed=seed, **cluster) for seed in range(seeds)])

    everything, rows = [], []
    for label in CLUSTERS:
        columns = {name: made(name, label, SHORT) for name in CLOCKED}
        everything += itertools.chain.from_iterable(columns.values())
        for steps in LENGTHS:
            longer = made("LSAM without SAM", label, steps)
            everything += longer if steps > SHORT else []
            if is_level(longer, columns["data-parallel SGD"]):
                break
        texts = [time_and_error(results) for results in columns.values()]
        at_last = f"{time_and_error(longer)}, {steps:,} steps"
        if not is_level(longer, columns["data-parallel SGD"]):
            at_last += ", not level"
        rows.append((label, texts[0], at_last, *texts[1:]))
    return everything, markdown_table(("", CLOCKED[0], "the same until level", *CLOCKED[1:]), rows)


def is_level(results: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> bool:
    """Whether the mean error over seeds is at most `TOLERANCE` above that of `reference`."""
    return mean_error(results) <= mean_error(reference) + TOLERANCE


def mean_error(results: Sequence[dict[str, Any]]) -> float:
    """The mean error at the end, over seeds, in %."""
    return statistics.fmean(result["points"][-1]["error"] for result in results)


def time_and_error(results: Sequence[dict[str, Any]]) -> str:
    """Virtual seconds at the end, and the mean and spread of the error over seeds."""
    points = [result["points"][-1] for result in results]
    seconds = statistics.fmean(point["virtual_seconds"] for point in points)
    return f"{seconds:,.0f} s, {mean_and_spread([point['error'] for point in points], 1)} %"


EXPERIMENTS = {each.__name__: each for each in (methods, long, epochs, overfit, wrong, workers, batches, sam, clock)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--runs_dir", type=Path, default=REPOSITORY / "runs/simulate_images")
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/simulate_images/tables")
    arguments, words = parser.parse_known_args()
    data = parse_configuration((ImageDataArguments,), [*SMALL_IMAGES, *words])
    runs = SimulatedRuns(simulate, error_of, METHODS, data, arguments.runs_dir, arguments.processes, arguments.quiet)
    found, table = EXPERIMENTS[arguments.experiment](runs, arguments.seeds)
    report = {"experiment": arguments.experiment, "runs": found}
    write_json(arguments.output_dir / f"{arguments.experiment}.json", report)
    write_atomically(arguments.output_dir / f"{arguments.experiment}.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
