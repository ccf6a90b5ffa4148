"""ResNet-20 on CIFAR-10, or any network on any images, by five methods in a plain PyTorch loop.

    accelerate launch --config_file recipes/accelerate.yaml --num_processes 4 recipes/cifar10_resnet20/train.py \\
        --config recipes/cifar10_resnet20/lsam.yaml --data_dir FOLDER [--key value ...]

The keys are the fields of `RunArguments`, `ImageDataArguments` (recipes/common/image_data.py) and `LSAMArguments`. How
the methods differ is defined in `METHODS` (methods.py) and, for the three with a server, in `hf_lsam.algorithms`:

    lsam       asynchronous, SAM's gradient, the smoothed anchor
    easgd      asynchronous, plain gradient, elastic averaging
    lsgd       asynchronous, plain gradient, the anchor is the leading worker
    ddp_sam    data-parallel (DDP), SAM's gradient
    ddp        data-parallel (DDP), plain gradient

The model is kept at `eval_points` points of the run and evaluated after training, so that no worker pauses for it.
Afterwards `output_dir` holds model.safetensors (the anchor, if there is one), results.json and a model card.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hf_lsam import LSAMArguments, vision
from hf_lsam.batchnorm import keep_variances_positive, reestimate, running_statistics, tracking_layers
from hf_lsam.identity import Identity, LaunchStore
from hf_lsam.loop import NOT_IN_A_LOOP
from hf_lsam.record import usable_cores
from recipes.cifar10_resnet20.methods import METHODS, Asynchronous, DataParallel
from recipes.common.arguments import pick
from recipes.common.configuration import parse_configuration
from recipes.common.image_batches import Batches, channel_statistics
from recipes.common.image_data import ImageDataArguments, ImageSet, load_images
from recipes.common.report import write_card
from recipes.common.results import provenance, write_json


@dataclass
class RunArguments:
    """What is trained, for how long, and with which settings of the optimizer (SGD with momentum)."""

    method: str = field(default="lsam", metadata={"help": f"One of {', '.join(METHODS)}."})
    ascent_sync: bool = field(
        default=False,
        metadata={"help": "For ddp_sam: perturb along the gradient of all workers (two all-reduces a step)."},
    )
    model: str = field(default="resnet20", metadata={"help": "A network of hf_lsam.vision, or any timm model."})
    model_width: int | None = field(default=None, metadata={"help": "Channels after its first convolution."})
    epochs: float = field(default=150, metadata={"help": "Passes over the training set, all workers together."})
    batch_size: int = field(default=128, metadata={"help": "Images a batch of one worker."})
    learning_rate: float = field(default=0.2, metadata={"help": "The highest, after the warm-up."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of SGD."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay."})
    lr_schedule: str = field(default="cosine", metadata={"help": "'cosine' (to zero) or 'constant'."})
    warmup_fraction: float = field(default=0.05, metadata={"help": "Share of the run with a growing learning rate."})
    rho_schedule: str = field(
        default="constant", metadata={"help": "'constant', or 'learning_rate': rho decays as the learning rate does."}
    )
    slow_worker: int | None = field(default=None, metadata={"help": "Rank of a worker that is held up."})
    slow_factor: float = field(default=1.0, metadata={"help": "It pauses for this many of its own steps after each."})
    slow_steps: int | None = field(default=None, metadata={"help": "It does so in its first steps only."})
    bf16: bool = field(default=False, metadata={"help": "Autocast to bfloat16."})
    channels_last: bool = field(default=False, metadata={"help": "Keep images and weights channels last."})
    seed: int = field(default=0, metadata={"help": "Of the initial weights, the order of the images, augmentation."})
    eval_points: int = field(default=20, metadata={"help": "Evaluate at so many points of the run."})
    log_steps: int = field(default=20, metadata={"help": "Note loss and drift every so many steps."})
    save_model: bool = field(default=True, metadata={"help": "Leave model.safetensors in output_dir."})
    use_cpu: bool = field(default=False, metadata={"help": "Train on CPU even where there is a GPU."})
    output_dir: str = field(default="runs/images", metadata={"help": "Folder for everything that the run leaves."})


KEYS = (RunArguments, ImageDataArguments, LSAMArguments)
PIPELINE_TAG = "image-classification"


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings that hf_lsam logs inside."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("hf_lsam").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("hf_lsam").removeHandler(handler)


def check(values: dict[str, Any], identity: Identity) -> None:
    """Raises ValueError for settings that the script does not support."""
    if values["method"] not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {values['method']!r}.")
    for key, choices in (
        ("lr_schedule", ("cosine", "constant")),
        ("rho_schedule", ("constant", "learning_rate")),
        ("data_distribution", ("sharded", "independent")),
    ):
        if values[key] not in choices:
            raise ValueError(f"`{key}` must be one of {', '.join(choices)}, got {values[key]!r}.")
    for key in ("batch_size", "eval_points", "log_steps"):
        if values[key] < 1:
            raise ValueError(f"`{key}` must be >= 1, got {values[key]}.")
    if values["ascent_sync"] and values["method"] != "ddp_sam":
        raise ValueError(
            f"ascent_sync is for method ddp_sam: a worker of {values['method']} never waits for the gradients of "
            "others. Take it out."
        )
    identity.require_workers(values["num_workers"])
    algorithm = METHODS[values["method"]]["algorithm"]
    if values["algorithm"] not in (algorithm, LSAMArguments.algorithm):
        raise ValueError(
            f"algorithm={values['algorithm']} would have no effect: method {values['method']} decides. Take it out, or "
            f"set method to {values['algorithm']}."
        )
    if values["sam_ascent_fraction"] != 1.0:
        raise ValueError("sam_ascent_fraction is for LSAMTrainer; here pass 1 takes the whole batch. Set it to 1.")
    if values["landscape_points"] != 0:
        raise ValueError("landscape_points is for LSAMTrainer; here nothing would be measured. Set it to 0.")
    for key, only in (("sam_interval", 1), ("sam_direction", "gradient")):
        if values["method"] != "lsam" and values[key] != only:
            raise ValueError(
                f"method {values['method']} perturbs along the gradient at every step, or never: {key}={values[key]} "
                f"would have no effect. Set {key} to {only}, or use method lsam."
            )


def pick_device(identity: Identity, use_cpu: bool) -> torch.device:
    """The worker's GPU, or the CPU; if there are more workers than GPUs, they share them."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", identity.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def train_batches(values: dict[str, Any], images: ImageSet, identity: Identity, device: torch.device) -> Batches:
    """This worker's endless source of training batches."""
    mean, std = channel_statistics(images.train_images)
    independent = values["data_distribution"] == "independent"
    return Batches(
        images.train_images,
        images.train_labels,
        values["batch_size"],
        mean,
        std,
        seed=values["seed"] + 1_000_003 * identity.rank * independent,
        rank=0 if independent else identity.rank,
        world_size=1 if independent else identity.num_workers,
        device=device,
        flip=values["dataset"] != "svhn",  # a mirrored digit is not the same digit
    )


@dataclass
class Point:
    """The model at one point of a run, to be evaluated later.

    Args:
        step: local steps of worker 0.
        seconds: time since the first step began.
        bytes: bytes sent and received until then by all workers together.
        vector: the model, in the layout of the method.
        statistics: worker 0's BatchNorm running means and variances.
    """

    step: int
    seconds: float
    bytes: int
    vector: Tensor
    statistics: list[Tensor]


def evaluate(model: nn.Module, batches: Batches, autocast: Callable) -> tuple[float, float]:
    """(accuracy, mean cross-entropy) over all batches."""
    model.eval()
    right, loss, seen = 0, 0.0, 0
    with torch.no_grad():
        for images, labels in batches:
            with autocast():
                logits = model(images)
            right += (logits.argmax(1) == labels).sum().item()
            loss += cross_entropy(logits.float(), labels, reduction="sum").item()
            seen += len(labels)
    model.train()
    return right / seen, loss / seen


@lru_cache(maxsize=2)
def images_of(arguments: tuple[tuple[str, Any], ...]) -> ImageSet:
    """The images, cached so that a process that makes several runs reads them once."""
    return load_images(ImageDataArguments(**dict(arguments)))


class ImageRun:
    """This worker's part in a run: what it trains, on which images, and by which method.

    Args:
        values: the value of every key, already checked.
        identity: this process among the workers.
    """

    def __init__(self, values: dict[str, Any], identity: Identity):
        self.values, self.identity = values, identity
        self.device = pick_device(identity, values["use_cpu"])
        if self.device.type == "cpu" and identity.num_workers > 1:
            torch.set_num_threads(max(1, usable_cores() // identity.num_workers))
        self.output_dir = Path(values["output_dir"])
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.images = images_of(tuple((each.name, values[each.name]) for each in fields(ImageDataArguments)))
        together = values["batch_size"] * identity.num_workers
        self.steps = max(1, int(values["epochs"] * len(self.images.train_labels) / together))
        torch.manual_seed(values["seed"])
        options = {} if values["model_width"] is None else {"width": values["model_width"]}
        self.memory_format = torch.channels_last if values["channels_last"] else torch.contiguous_format
        model = vision.create(values["model"], len(self.images.labels), **options)
        self.model = model.to(self.device, memory_format=self.memory_format)
        optimizer = torch.optim.SGD(
            model.parameters(), values["learning_rate"], values["momentum"], weight_decay=values["weight_decay"]
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.share_of_learning_rate)
        self.batches = train_batches(values, self.images, identity, self.device)
        lsam = {each.name: values[each.name] for each in fields(LSAMArguments) if each.name not in NOT_IN_A_LOOP}
        self.asynchronous = METHODS[values["method"]]["algorithm"] is not None
        self.method: Asynchronous | DataParallel = (
            Asynchronous(model, optimizer, lsam, self.output_dir)
            if self.asynchronous
            else DataParallel(model, optimizer, identity, lsam, values["ascent_sync"])
        )

    def share_of_learning_rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        constant = self.values["lr_schedule"] == "constant"
        decay = 1.0 if constant else (1 + math.cos(math.pi * step / self.steps)) / 2
        warmup = max(1, int(self.values["warmup_fraction"] * self.steps))
        return min(1.0, (step + 1) / warmup) * decay

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.values["bf16"] else nullcontext()

    def train(self) -> tuple[list[Point], dict[str, Any]]:
        """Trains; returns the points that worker 0 is to evaluate, and this worker's figures."""
        values, rank = self.values, self.identity.rank
        points: list[Point] = []
        curve: list[tuple[int, float, float | None]] = []
        due = {round(self.steps * (index + 1) / values["eval_points"]) for index in range(values["eval_points"])}
        buffers = [buffer for _, buffer in running_statistics(self.model)]
        stream = itertools.chain.from_iterable(self.batches.epoch(number) for number in itertools.count())
        bar = tqdm(total=self.steps, disable=rank != 0 or not sys.stderr.isatty(), unit="step")
        self.model.train()
        with self.method, bar:
            start, slept = time.perf_counter(), 0.0
            for step, (images, labels) in enumerate(itertools.islice(stream, self.steps)):
                begun = time.perf_counter()
                images = images.contiguous(memory_format=self.memory_format)

                def compute_loss(images=images, labels=labels) -> Tensor:
                    with self.autocast():
                        return cross_entropy(self.method.forward(images), labels)

                decays = values["rho_schedule"] == "learning_rate"
                rho = values["sam_rho"] * (self.share_of_learning_rate(step) if decays else 1.0)
                loss = self.method.step(compute_loss, rho)
                self.scheduler.step()
                bar.update()
                if rank == values["slow_worker"] and step < (values["slow_steps"] or self.steps):
                    pause = values["slow_factor"] * (time.perf_counter() - begun)
                    time.sleep(pause)
                    slept += pause
                if (step + 1) % values["log_steps"] == 0:
                    measured = loss.item()
                    curve.append((step + 1, measured, self.method.drift(measured)))
                if rank == 0 and step + 1 in due:
                    sent = self.method.bytes(self.identity.num_workers)
                    vector, kept = self.method.vector(), [buffer.cpu().clone() for buffer in buffers]
                    points.append(Point(step + 1, time.perf_counter() - start, sent, vector, kept))
                    if bar.disable:
                        tqdm.write(f"step {step + 1} of {self.steps}, loss {loss.item():.4f}", file=sys.stderr)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            own = {**self.method.metrics(), "seconds": seconds, "slept": slept, "curve": curve}
        if points and self.asynchronous:
            # Evaluated last is the final anchor, to which all workers have contributed everything.
            layout, tensors = self.method.layout, [tensor.cpu() for tensor in self.method.tensors]
            points[-1] = replace(points[-1], vector=layout.read(tensors, torch.empty(layout.numel)))
        return points, own

    def evaluate(self, points: list[Point]) -> Iterator[dict[str, float]]:
        """Yields accuracy and loss at every point; the model is left at the last one."""
        values, train = self.values, self.images.train_images
        held_out = Batches(
            self.images.eval_images,
            self.images.eval_labels,
            4 * values["batch_size"],
            *channel_statistics(train),
            device=self.device,
            train=False,
        )
        layers = tracking_layers(self.model)
        buffers = [buffer for _, buffer in running_statistics(self.model)]

        def forward(batch):
            with self.autocast():
                self.model(batch[0])

        for point in points:
            for buffer, value in zip(buffers, point.statistics, strict=True):
                buffer.copy_(value)
            self.method.layout.write(point.vector.to(self.device), self.method.tensors)
            keep_variances_positive(layers)
            if values["batchnorm_statistics"] == "reestimate" and layers:
                reestimate(self.model, itertools.islice(self.batches.epoch(0), values["batchnorm_batches"]), forward)
            accuracy, loss = evaluate(self.model, held_out, self.autocast)
            yield {
                "step": point.step,
                "epoch": point.step * self.batches.batch_size * self.identity.num_workers / len(train),
                "seconds": point.seconds,
                "bytes": point.bytes,
                "accuracy": accuracy,
                "loss": loss,
            }

    def publish(self, points: list[Point], workers: list[dict[str, Any]]) -> dict[str, Any]:
        """Evaluates and saves what the workers have trained; returns the results.

        Args:
            points: of `train`, at worker 0.
            workers: the figures of all workers.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(usable_cores())  # the other workers have finished
        seconds = max(worker["seconds"] for worker in workers)
        if points:
            of_workers = (worker["bytes_pushed"] + worker["bytes_pulled"] for worker in workers)
            sent = int(sum(of_workers)) if self.asynchronous else points[-1].bytes
            points[-1] = replace(points[-1], step=self.steps, seconds=seconds, bytes=sent)
        curves = list(self.evaluate(points))
        if self.asynchronous:
            self.method.log_points(curves)
        if self.values["save_model"]:
            save_model(self.model, str(self.output_dir / "model.safetensors"))
        held_out = pick(ImageDataArguments, self.values).held_out_shares
        rates = (worker["steps"] * self.values["batch_size"] / worker["seconds"] for worker in workers)
        results = {
            "method": self.values["method"],
            "num_workers": self.identity.num_workers,
            "device": self.device.type,
            "steps_per_worker": self.steps,
            "train_images": len(self.images.train_labels),
            "eval_images": len(self.images.eval_labels),
            "evaluated_on": "validation split" if held_out else "test split",
            "accuracy": curves[-1]["accuracy"],
            "eval_loss": curves[-1]["loss"],
            "seconds": seconds,
            "images_per_second": sum(rates),
            "bytes": curves[-1]["bytes"],
            "points": curves,
            "workers": workers,
            "configuration": self.values,
            **provenance(),
        }
        write_json(self.output_dir / "results.json", results)
        write_card(self.output_dir, results)
        return results


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains and evaluates; returns the results at worker 0, None at the others.

    Raises:
        ValueError: for values out of range, or missing files.
    """
    identity = Identity.from_environment()
    check(values, identity)
    of_method = {key: value for key, value in METHODS[values["method"]].items() if value is not None}
    this = ImageRun({**values, **of_method}, identity)
    with collected_warnings() as warnings:
        points, own = this.train()
    workers = [{**own, "warnings": warnings}]
    if identity.num_workers > 1:
        workers = LaunchStore(identity).gather(f"results/{this.output_dir}", workers[0])
    return this.publish(points, workers) if identity.rank == 0 else None


def main() -> None:
    values = parse_configuration(KEYS, sys.argv[1:])
    results = run(values)
    if results is not None:
        print(
            f"{results['method']}: accuracy {results['accuracy']:.4f} on {results['eval_images']:,} images of the "
            f"{results['evaluated_on']}, {results['seconds']:.1f} s, {results['images_per_second']:.0f} images/s, "
            f"{results['bytes'] / 1e6:.1f} MB; saved in {values['output_dir']}"
        )


if __name__ == "__main__":
    main()
