"""Two workers of hf_lsam beside two of what else averages workers, in one run.

    python scripts/benchmarks/peers.py --dataset parquet --train_file train.parquet --eval_file test.parquet \\
        --output benchmarks/peers.json

Contestants, with SAM's gradient or the plain one; those whose package is not installed are left out:

    ddp         torch's DistributedDataParallel over Gloo; SAM is pytorch_optimizer's, its first pass without reduction
    local sgd   accelerate's LocalSGD
    diloco      torchft's DiLoCo, with the outer step of its paper (arXiv 2311.08105): Nesterov, 0.7, momentum 0.9
    hf_lsam     `LSAM` as a launch of two machines starts it, or of one, with its defaults but the radius
    32 bits     the same with exchange_bits=32; on one machine vectors are float32 anyway

All have the same model, batches, optimizer, learning rate and number of steps; who averages now and then does so
every 4 steps, hf_lsam's default for two workers. A worker is a process with one thread, forked; each link is that of a
network namespace (root and iproute2 are needed), and its bytes are those that the kernel has counted there.
Parts, of which `--parts` chooses:

    race       ResNet-20, CIFAR-10 at 16x16 pixels, SGD with momentum: the held-out loss by the clock, on this machine
               and over links
    links      MiniLM, 22.7 M parameters, AdamW, random tokens: the same without a loss
    straggler  the race on this machine, worker 1 sleeping at each step for as long as one process's own step takes
    killed     worker 1 kills itself in the middle (SIGKILL): what worker 0 does
    cut        the link of worker 1's machine goes silent in the middle: what worker 0 does, for `--timeout` seconds

A step's time is the median over periods of 4 steps, a fourth of each, as most steps of a period exchange nothing. It
is compared with one process's own step of the same kind, made alone in the same run. Two workers have two cores, so
servers and TLS take their time from them.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import itertools
import math
import multiprocessing
import os
import re
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hf_lsam import LSAM, vision
from hf_lsam.batchnorm import reestimate
from recipes.common.image_batches import Batches, channel_statistics
from recipes.common.image_data import ImageDataArguments, ImageSet, load_images
from recipes.common.progress import Progress, add_quiet
from recipes.common.tables import markdown_table
from scripts.benchmarks.step import SyntheticTokens, load_minilm
from scripts.common.benchmark import write_benchmark
from tests.launch import free_port
from tests.netns import Machine, machines, why_not

NAME = "peers"  # of benchmarks/peers.json
PARTS = ("race", "links", "straggler", "killed", "cut")
PERIOD = 4  # steps between two averages
WORKERS = 2
RHO = 0.02
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
CLONE_NEWNET = 0x40000000
GLOO_PLACE = re.compile(r" *\[[^]]*\]:?\d* *")  # a line of its source, an address
forked = multiprocessing.get_context("fork")


# --- what is trained ---


class Images:
    """ResNet-20 on images; the rate rises for 5 % of the run and then falls as a cosine."""

    def __init__(self, images: ImageSet, steps: int, batch: int, rate: float, rank: int, workers: int):
        torch.manual_seed(0)
        self.model = vision.create("resnet20", len(images.labels)).to(memory_format=torch.channels_last)
        self.optimizer = (torch.optim.SGD, {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4})
        self.steps = steps
        mean, std = channel_statistics(images.train_images)
        self._train = Batches(
            images.train_images, images.train_labels, batch, mean, std, seed=0, rank=rank, world_size=workers
        )
        self._whole = Batches(images.train_images, images.train_labels, batch, mean, std, seed=0)
        self._held_out = Batches(images.eval_images, images.eval_labels, 250, mean, std, train=False)

    def batches(self) -> Iterator[Any]:
        for x, labels in itertools.chain.from_iterable(map(self._train.epoch, itertools.count())):
            yield x.contiguous(memory_format=torch.channels_last), labels

    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(forward(batch[0]), batch[1])

    def share_of_rate(self, step: int) -> float:
        warmup = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * min(step, self.steps) / self.steps)) / 2

    @torch.no_grad()
    def evaluate(self, parameters: list[Tensor]) -> dict[str, float]:
        """Loss and accuracy at these parameters, with BatchNorm's statistics of the same 16 batches for everybody."""
        for parameter, value in zip(self.model.parameters(), parameters, strict=True):
            parameter.copy_(value)
        reestimate(self.model, itertools.islice(self._whole.epoch(0), 16), lambda batch: self.model(batch[0]))
        self.model.eval()
        logits, labels = map(torch.cat, zip(*((self.model(x), y) for x, y in self._held_out), strict=True))
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": cross_entropy(logits, labels).item(), "accuracy": accuracy}


class Sentences:
    """MiniLM on random tokens: what is measured is time."""

    def __init__(self, minilm: nn.Module, steps: int, batch: int, rate: float, rank: int, workers: int):
        torch.manual_seed(0)
        self.model = minilm
        self.optimizer = (torch.optim.AdamW, {"lr": rate})
        self.steps = steps
        rows = SyntheticTokens(batch * WORKERS, 32)
        own = [rows[index] for index in range(rank * batch, (rank + 1) * batch)]
        self._batch = {name: torch.stack([row[name] for row in own]) for name in own[0]}

    def batches(self) -> Iterator[Any]:
        return itertools.repeat(self._batch)

    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        return forward(**batch).loss

    def share_of_rate(self, step: int) -> float:
        return 1.0


# --- who trains it ---


class DataParallel:
    """DDP, with pytorch_optimizer's SAM or without; one worker has nothing to reduce."""

    def __init__(self, task: Images | Sentences, place: Place, sam: bool):
        self.forward: nn.Module = task.model
        if place.workers > 1:
            dist.init_process_group("gloo")
            self.forward = DistributedDataParallel(task.model)
        optimizer, options = task.optimizer
        self._sam = sam
        if sam:
            from pytorch_optimizer import SAM

            self._optimizer = SAM(task.model.parameters(), optimizer, rho=RHO, **options)
            self.stepped = self._optimizer.base_optimizer
        else:
            self._optimizer = self.stepped = optimizer(task.model.parameters(), **options)
        self._parameters = list(task.model.parameters())

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *error) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def step(self, loss: Callable[[], Tensor]) -> None:
        if self._sam:
            with self.forward.no_sync() if dist.is_initialized() else nullcontext():
                loss().backward()
            self._optimizer.step(lambda: loss().backward())
        else:
            loss().backward()
            self._optimizer.step()
        self._optimizer.zero_grad()

    def batches(self, stream: Iterable, steps: int) -> Iterable:
        return itertools.islice(stream, steps)

    def schedule(self, scheduler: LambdaLR) -> Any:
        return scheduler

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]


class AccelerateLocalSGD(DataParallel):
    """accelerate's LocalSGD; it averages once more at the end."""

    def __init__(self, task: Images | Sentences, place: Place):
        optimizer, options = task.optimizer
        self.stepped = optimizer(task.model.parameters(), **options)
        self._parameters = list(task.model.parameters())
        self._accelerator = Accelerator(cpu=True)
        self.forward, self._optimizer = self._accelerator.prepare(task.model, self.stepped)
        self._local_sgd = LocalSGD(self._accelerator, self.forward, PERIOD)

    def __enter__(self) -> AccelerateLocalSGD:
        self._local_sgd.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self._local_sgd.__exit__(kind, error, traceback)
        super().__exit__()

    def step(self, loss: Callable[[], Tensor]) -> None:
        self._accelerator.backward(loss())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._local_sgd.step()


class TorchftDiLoCo(DataParallel):
    """torchft's DiLoCo: each worker a replica group of its own; worker 0's machine has the lighthouse."""

    def __init__(self, task: Images | Sentences, place: Place):
        from torchft import Manager, ProcessGroupGloo
        from torchft.local_sgd import DiLoCo

        optimizer, options = task.optimizer
        self.forward = task.model
        self._parameters = list(task.model.parameters())
        self._optimizer = self.stepped = optimizer(task.model.parameters(), **options)
        self._store = dist.TCPStore(place.address, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(),
            load_state_dict=task.model.load_state_dict,
            state_dict=task.model.state_dict,
            min_replica_size=1,
            use_async_quorum=False,
            rank=0,
            world_size=1,
            store_addr=place.address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{place.first}:{place.port}",
            replica_id=f"worker_{place.rank}",
            hostname=place.address,
            init_sync=False,  # all begin with the same weights
        )
        outer = torch.optim.SGD(task.model.parameters(), **OUTER)
        self._diloco = DiLoCo(self._manager, [task.model], self.stepped, outer, PERIOD)

    def __enter__(self) -> TorchftDiLoCo:
        self._diloco.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._diloco.__exit__(*error)
        self._manager.shutdown(wait=False)

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.stepped.step()
        self.stepped.zero_grad()


class Asynchronous:
    """hf_lsam's loop."""

    def __init__(self, task: Images | Sentences, place: Place, sam: bool, **lsam: Any):
        optimizer, options = task.optimizer
        self.forward = task.model
        self.stepped = optimizer(task.model.parameters(), **options)
        budget = {"max_steps": task.steps} if lsam.get("share_steps") else {}
        self._lsam = LSAM(
            task.model,
            self.stepped,
            sam_rho=RHO if sam else 0.0,
            output_dir=place.folder,
            shared_memory_dir=place.folder,
            **lsam,
            **budget,
        )
        self._shares = bool(budget)

    def __enter__(self) -> Asynchronous:
        self._lsam.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._lsam.__exit__(*error)

    def step(self, loss: Callable[[], Tensor]) -> None:
        self._lsam.step(loss)

    def batches(self, stream: Iterable, steps: int) -> Iterable:
        return self._lsam.batches(stream) if self._shares else itertools.islice(stream, steps)

    def schedule(self, scheduler: LambdaLR) -> Any:
        return self._lsam.schedule(scheduler) if self._shares else scheduler

    def parameters(self) -> list[Tensor]:
        """The newest anchor that has come, and after the run the final one."""
        if self._lsam.session.finished:
            return [parameter.detach().clone() for parameter in self.forward.parameters()]
        worker = self._lsam.worker
        held = [torch.empty_like(parameter) for parameter in worker.parameters]
        worker.layout.write(worker.anchor, held)
        return held


@dataclass(frozen=True)
class Contestant:
    """Who trains, with SAM's gradient or not, and where it takes part.

    Args:
        make: of a task and a place.
        sam: whether `make` is given `sam`, and a step has two passes.
        package: without which it is left out.
        fields: what `make` is given besides.
        parts: of the script.
        on_links_only: on one machine it is the same as another one.
    """

    label: str
    make: Callable
    sam: bool = False
    package: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PARTS
    on_links_only: bool = False

    @property
    def gradient(self) -> str:
        return "SAM" if self.sam else "plain"


WITH_SAM = ("race", "straggler")  # SAM or not, the links carry as much, and what a worker's death does is the same
CONTESTANTS = [
    Contestant(
        "ddp, SAM of pytorch_optimizer",
        DataParallel,
        True,
        "pytorch_optimizer",
        {"sam": True},
        WITH_SAM,
    ),
    Contestant("hf_lsam", Asynchronous, True, fields={"sam": True}, parts=WITH_SAM),
    Contestant(
        "hf_lsam, 32 bits",
        Asynchronous,
        True,
        fields={"sam": True, "exchange_bits": 32},
        parts=("race",),
        on_links_only=True,
    ),
    Contestant("ddp", DataParallel, fields={"sam": False}),
    Contestant("local sgd of accelerate", AccelerateLocalSGD),
    Contestant("diloco of torchft", TorchftDiLoCo, package="torchft"),
    Contestant("hf_lsam", Asynchronous, fields={"sam": False}),
    Contestant(
        "hf_lsam, 32 bits",
        Asynchronous,
        fields={"sam": False, "exchange_bits": 32},
        parts=("race", "links"),
        on_links_only=True,
    ),
    Contestant("hf_lsam, share_steps", Asynchronous, fields={"sam": False, "share_steps": True}, parts=("straggler",)),
]


# --- one run ---


@dataclass(frozen=True)
class Place:
    """Where a worker is.

    Args:
        machine: its own, or None for this one.
        address: of its machine.
        first: address of worker 0's machine, at whose `port` whoever needs a first meeting has it.
        folder: of the run, on this machine's shared memory.
    """

    rank: int
    workers: int
    machine: Machine | None
    address: str
    first: str
    port: int
    folder: Path

    def enter(self) -> None:
        """Moves this process, which must have one thread, to its machine, and says in the environment who it is."""
        interface = "lo"
        if self.machine is not None:
            enter(self.machine)
            interface = "eth0"
        here = 1 if self.machine is not None else self.workers
        group = {"RANK": self.rank, "WORLD_SIZE": self.workers, "MASTER_ADDR": self.first, "MASTER_PORT": self.port}
        group |= {"LOCAL_RANK": self.rank % here, "LOCAL_WORLD_SIZE": here}
        group |= {"GROUP_RANK": self.rank // here, "GROUP_WORLD_SIZE": self.workers // here}
        group |= {"GLOO_SOCKET_IFNAME": interface}
        os.environ.update({name: str(value) for name, value in group.items()})

    def print_into(self, log: str) -> None:
        """What this process says from now on goes there."""
        for stream in (1, 2):
            os.dup2(os.open(self.folder / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)

    def sent(self) -> int:
        """Bytes that this worker's machine has sent over its link; 0 on this machine, which is not theirs alone."""
        if self.machine is None:
            return 0
        lines = Path("/proc/self/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("eth0:"))


def enter(machine: Machine) -> None:
    """The calling thread, and what it starts, is on this machine from now on."""
    descriptor = os.open(f"/run/netns/{machine.name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"network namespace {machine.name} cannot be entered")
    os.close(descriptor)


@dataclass(frozen=True)
class Job:
    """One run of a contestant.

    Args:
        task: `Images` or `Sentences`.
        points: how many times the loss is measured.
        pause: seconds that worker 1 sleeps at each step.
        fault: what befalls worker 1 after half of its steps: "killed", "cut", or None.
    """

    contestant: Contestant
    task: type
    steps: int
    batch: int
    rate: float
    points: int = 0
    pause: float = 0.0
    fault: str | None = None


def work(job: Job, place: Place, data: ImageSet | nn.Module, barrier: Any, pipe: Connection) -> None:
    """The body of a worker: sends (step, time) at each step of a job with a fault, and at last its report."""
    place.enter()
    place.print_into(f"worker_{place.rank}.log")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        pipe.send(report_of(job, place, data, barrier, pipe))
    except Exception as error:
        pipe.send(
            {
                "error": f"{type(error).__name__}: {GLOO_PLACE.sub('', str(error)).split('. ')[0]}",
                "at": time.monotonic(),
            }
        )
        raise


def report_of(job: Job, place: Place, data: ImageSet | nn.Module, barrier: Any, pipe: Connection) -> dict[str, Any]:
    task = job.task(data, job.steps, job.batch, job.rate, place.rank, place.workers)
    contestant = job.contestant.make(task, place, **job.contestant.fields)
    scheduler = LambdaLR(contestant.stepped, task.share_of_rate)
    due = {job.steps * (number + 1) // job.points // PERIOD * PERIOD for number in range(job.points)}
    points, seconds = [], []
    with contestant:
        scheduler = contestant.schedule(scheduler)
        barrier.wait()
        sent, begun = [place.sent()], time.monotonic()
        for step, batch in enumerate(contestant.batches(task.batches(), job.steps), 1):
            contestant.step(lambda batch=batch: task.loss(contestant.forward, batch))
            scheduler.step()
            if place.rank == 1 and job.pause:
                time.sleep(job.pause)
            seconds.append(time.monotonic() - begun)
            sent.append(place.sent())
            if place.rank == 0 and step in due and step < job.steps:
                points.append((step, seconds[-1], contestant.parameters()))
            if job.fault:
                pipe.send((step, time.monotonic()))
                if place.rank == 1 and step == job.steps // 2:
                    if job.fault == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    pipe.recv()  # until the link is cut
    whole = time.monotonic() - begun
    report = {"steps": len(seconds), "seconds": seconds, "whole_s": whole, "sent": sent[-1] - sent[0], "points": []}
    if place.rank == 0 and job.points:
        points.append((len(seconds), whole, contestant.parameters()))
        report["points"] = [{"step": step, "s": at, **task.evaluate(parameters)} for step, at, parameters in points]
    return report


def light(place: Place) -> None:
    """The body of torchft's lighthouse."""
    place.enter()
    place.print_into("lighthouse.log")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind=f"0.0.0.0:{place.port}", min_replicas=1)
    while server:
        time.sleep(60)


class Run:
    """The processes of a job, and what they have said.

    Args:
        job: what they do.
        hosts: the machines of its workers, or none for as many workers on this one.
        workers: how many.
    """

    def __init__(self, job: Job, data: ImageSet | nn.Module, hosts: list[Machine], workers: int = WORKERS):
        self.job, self._hosts = job, hosts
        self._folder = tempfile.TemporaryDirectory(prefix="peers-of-hf_lsam-", dir="/dev/shm")
        addresses = [host.address for host in hosts] or ["127.0.0.1"] * workers
        port = free_port()
        self._barrier = forked.Barrier(workers)  # kept: its shared memory is given away with it
        self.pipes: list[Connection] = []
        self._processes = []
        self.reports: list[dict[str, Any] | None] = [None] * workers
        self.steps: list[list[tuple[int, float]]] = [[] for _ in range(workers)]
        places = [
            Place(rank, workers, host, address, addresses[0], port, Path(self._folder.name))
            for rank, (host, address) in enumerate(zip(hosts or [None] * workers, addresses, strict=True))
        ]
        self._lighthouse = None
        if job.contestant.make is TorchftDiLoCo:
            self._lighthouse = forked.Process(target=light, args=(places[0],))
            self._lighthouse.start()
        for place in places:
            near, far = forked.Pipe()
            process = forked.Process(target=work, args=(job, place, data, self._barrier, far))
            process.start()
            far.close()
            self.pipes.append(near)
            self._processes.append(process)

    def hear(self, rank: int) -> bool:
        """Takes one message of a worker; whether more may come."""
        try:
            said = self.pipes[rank].recv()
        except (EOFError, ConnectionResetError):
            return False
        if isinstance(said, dict):
            self.reports[rank] = said
            return False
        self.steps[rank].append(said)
        if self.job.fault == "cut" and rank == 1 and said[0] == self.job.steps // 2:
            self._hosts[1].cut()
            self.pipes[1].send("cut")
        return True

    def is_over(self, timeout: float) -> bool:
        """Whether nobody of it is waited for any longer: see `finish`."""
        if self.job.fault is None:
            return any("error" in report for report in self.reports if report)
        silent = self.steps[0] and time.monotonic() - self.steps[0][-1][1] > timeout
        return self.reports[0] is not None or bool(silent)

    def end(self) -> str:
        """Ends what is left of it; returns what its processes have printed."""
        for process in self._processes:
            if not all(self.reports):
                process.kill()
            process.join()
        if self._lighthouse is not None:
            self._lighthouse.kill()
            self._lighthouse.join()
        logs = sorted(Path(self._folder.name).glob("worker_*.log"))
        printed = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in logs)
        self._folder.cleanup()
        return printed


def finish(runs: list[Run], timeout: float = math.inf) -> list[str]:
    """Waits until every worker has ended; of a run with a fault worker 0 alone, or `timeout` seconds after its step.

    Returns:
        what the processes of each have printed.
    """
    waiting = {pipe: (run, rank) for run in runs for rank, pipe in enumerate(run.pipes)}
    while waiting:
        for pipe in wait(list(waiting), timeout=1.0):
            run, rank = waiting[pipe]
            if not run.hear(rank):
                del waiting[pipe]
        for pipe, (run, _) in list(waiting.items()):
            if run.is_over(timeout):
                del waiting[pipe]
    return [run.end() for run in runs]


# --- what is measured ---


def of_period(seconds: list[float]) -> float:
    """A step's time: the median over periods of `PERIOD` steps but the first, a part of each; of few steps the mean."""
    ends = seconds[PERIOD - 1 :: PERIOD]
    periods = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return statistics.median(periods) / PERIOD if periods else seconds[-1] / len(seconds)


def measured(run: Run, printed: str, alone: float | None = None) -> dict[str, Any]:
    """The figures of a run without a fault.

    Args:
        printed: what its processes have said, for errors.
        alone: seconds of one process's own step.

    Raises:
        RuntimeError: if a worker failed.
    """
    reports = run.reports
    if any(report is None or "error" in report for report in reports):
        raise RuntimeError(f"{run.job.contestant.label} failed: {reports}\n{printed}")
    step = of_period(reports[0]["seconds"])
    return {
        "gradient": run.job.contestant.gradient,
        "contestant": run.job.contestant.label,
        "step_s": step,
        "ratio": step / (alone or step),
        "steps": [report["steps"] for report in reports],
        "sent_a_step": sum(report["sent"] for report in reports) / sum(report["steps"] for report in reports),
        "whole_s": max(report["whole_s"] for report in reports),
        "end_s": max(report["whole_s"] - report["seconds"][-1] for report in reports[:1]),
        "points": reports[0]["points"],
    }


def after_fault(run: Run, printed: str) -> dict[str, Any]:
    """What worker 0 did once worker 1 was gone."""
    at = run.steps[1][-1][1]
    before = [when for _, when in run.steps[0] if when <= at]
    after = [at, *(when for _, when in run.steps[0] if when > at)]
    report = run.reports[0]
    row = {
        "fault": run.job.fault,
        "contestant": run.job.contestant.label,
        "step_s": statistics.median(later - earlier for earlier, later in itertools.pairwise(before)),
        "steps_after": len(after) - 1,
        "longest_pause_s": max((later - earlier for earlier, later in itertools.pairwise(after)), default=0.0),
    }
    if report is None:
        return {**row, "outcome": "waits", "after_s": time.monotonic() - after[-1]}
    if "error" in report:
        return {**row, "outcome": "error", "after_s": report["at"] - after[-1], "error": report["error"]}
    return {**row, "outcome": "finished", "loss": report["points"][-1]["loss"]}


def seconds_to(loss: float, points: list[dict[str, Any]]) -> float | None:
    """When a run's held-out loss was first that low, between two points as on a straight line; None if it never was."""
    for number, point in enumerate(points):
        if point["loss"] <= loss:
            if number == 0:
                return point["s"]
            before = points[number - 1]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["s"] + share * (point["s"] - before["s"])
    return None


class Measurement:
    """All parts of the script, one run after the other."""

    def __init__(self, arguments: argparse.Namespace, images: ImageSet):
        self._arguments, self._data = arguments, {Images: images, Sentences: load_minilm().train()}
        self._contestants = [
            each for each in CONTESTANTS if each.package is None or importlib.util.find_spec(each.package)
        ]
        self._alone: dict[tuple[type, bool], float] = {}
        self._undisturbed: dict[tuple[str, bool], dict[str, Any]] = {}  # races on this machine

    def of_part(self, part: str, on_links: bool = False) -> list[Contestant]:
        return [each for each in self._contestants if part in each.parts and (on_links or not each.on_links_only)]

    @property
    def rows(self) -> int:
        """Of all parts together."""
        parts, links = self._arguments.parts, len(self._arguments.megabits)
        on_links = sum(links * len(self.of_part(part, on_links=True)) for part in parts if part in ("race", "links"))
        return on_links + sum(len(self.of_part(part)) for part in parts)

    def of(self, part: str) -> Iterator[dict[str, Any]]:
        """A part's rows."""
        return self.faults(part) if part in ("killed", "cut") else getattr(self, part)()

    def job(self, contestant: Contestant, task: type, **further: Any) -> Job:
        if task is Images:
            return Job(contestant, task, self._arguments.steps, self._arguments.batch, self._arguments.rate, **further)
        return Job(contestant, task, self._arguments.link_steps, 8, 2e-5, **further)

    def run(self, job: Job, hosts: list[Machine], workers: int = WORKERS) -> dict[str, Any]:
        alone = None if workers == 1 else self.alone(job.task, job.contestant.sam)
        run = Run(job, self._data[job.task], hosts, workers)
        (printed,) = finish([run])
        return measured(run, printed, alone)

    def alone(self, task: type, sam: bool) -> float:
        """Seconds of a step of one process."""
        if (task, sam) not in self._alone:
            one = Contestant("one process", DataParallel, sam, fields={"sam": sam})
            job = self.job(one, task)
            self._alone[task, sam] = self.run(job, [], workers=1)["step_s"]
        return self._alone[task, sam]

    def over(self, part: str, task: type, points: int) -> Iterator[dict[str, Any]]:
        """Rows of the race, and of the links."""
        for megabits in (None, *self._arguments.megabits):
            with ExitStack() as stack:
                hosts = stack.enter_context(machines(WORKERS)) if megabits else []
                for host in hosts:
                    host.throttle(megabits)
                for contestant in self.of_part(part, on_links=bool(megabits)):
                    row = self.run(self.job(contestant, task, points=points), hosts)
                    if part == "race" and not megabits:
                        self._undisturbed[contestant.label, contestant.sam] = row
                    yield {"megabits": megabits, **row}

    def race(self) -> Iterator[dict[str, Any]]:
        yield from self.over("race", Images, self._arguments.points)

    def links(self) -> Iterator[dict[str, Any]]:
        yield from self.over("links", Sentences, 0)

    def straggler(self) -> Iterator[dict[str, Any]]:
        for contestant in self.of_part("straggler"):
            without = self._undisturbed.get((contestant.label, contestant.sam))
            if without is None:
                without = self.run(self.job(contestant, Images, points=1), [])
            slowed = self.run(self.job(contestant, Images, points=1, pause=self.alone(Images, contestant.sam)), [])
            yield {
                **slowed,
                "without": without,
                "step_ratio": slowed["step_s"] / without["step_s"],
                "whole_ratio": slowed["whole_s"] / without["whole_s"],
            }

    def faults(self, fault: str) -> Iterator[dict[str, Any]]:
        """All contestants beside each other: most of the time is waiting."""
        contestants = self.of_part(fault)
        with ExitStack() as stack:
            hosts = stack.enter_context(machines(WORKERS * len(contestants))) if fault == "cut" else []
            runs = [
                Run(
                    self.job(contestant, Images, points=1, fault=fault),
                    self._data[Images],
                    hosts[WORKERS * number : WORKERS * (number + 1)],
                )
                for number, contestant in enumerate(contestants)
            ]
            for run, printed in zip(runs, finish(runs, self._arguments.timeout), strict=True):
                yield after_fault(run, printed)


def tables(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    def place(row: dict[str, Any]) -> str:
        return "this machine" if row["megabits"] is None else f"{row['megabits']:,} Mbit/s"

    def sent(row: dict[str, Any]) -> str:
        return "" if row["megabits"] is None else f"{row['sent_a_step'] / 1e6:.3g} MB"

    if rows := results.get("race"):
        worst = {
            kind: max(row["points"][-1]["loss"] for row in rows if row["gradient"] == kind)
            for kind in dict.fromkeys(row["gradient"] for row in rows)
        }
        lines = []
        for row in rows:
            last, first = row["points"][-1], seconds_to(worst[row["gradient"]], row["points"])
            lines.append(
                [
                    place(row),
                    row["gradient"],
                    row["contestant"],
                    f"{row['ratio']:.2f}",
                    sent(row),
                    f"{first:.1f} s",
                    f"{row['whole_s']:.1f} s",
                    f"{last['loss']:.3f}",
                    f"{100 * last['accuracy']:.1f} %",
                ]
            )
        reached = ", ".join(f"{loss:.3f} ({kind})" for kind, loss in worst.items())
        header = ["ResNet-20 over", "gradient", "contestant", "step, of one process's", "sent a step and worker"]
        header += [f"to the loss {reached}", "whole run", "held-out loss", "accuracy"]
        yield markdown_table(header, lines)
    if rows := results.get("links"):
        yield markdown_table(
            ["MiniLM over", "gradient", "contestant", "step, of one process's", "sent a step and worker", "end of run"],
            [
                [
                    place(row),
                    row["gradient"],
                    row["contestant"],
                    f"{row['ratio']:.2f}",
                    sent(row),
                    f"{row['end_s']:.1f} s",
                ]
                for row in rows
            ],
        )
    if rows := results.get("straggler"):
        yield markdown_table(
            [
                "beside a straggler",
                "gradient",
                "worker 0's step, of that without",
                "whole run, of that without",
                "loss",
            ],
            [
                [
                    row["contestant"],
                    row["gradient"],
                    f"{row['step_ratio']:.2f}",
                    f"{row['whole_ratio']:.2f}",
                    f"{row['points'][-1]['loss']:.3f}, without {row['without']['points'][-1]['loss']:.3f}",
                ]
                for row in rows
            ],
        )
    if rows := results.get("killed", []) + results.get("cut", []):
        # hf_lsam's worker 0 makes its steps and then waits for the other machine; the others wait within a step.
        said = {
            "finished": "goes on to the end; longest pause {longest_pause_s:.1f} s",
            "error": "ends with an error after {after_s:.1f} s: {error}",
            "waits": "makes {steps_after} more steps, and then waits: still after {after_s:.0f} s, when it was ended",
        }
        yield markdown_table(
            ["worker 1", "contestant", "worker 0"],
            [[row["fault"], row["contestant"], said[row["outcome"]].format(**row)] for row in rows],
        )


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    return "\n\n".join(tables(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(ImageDataArguments):
        if each.name in ("dataset", "data_dir", "train_file", "eval_file"):
            parser.add_argument(f"--{each.name}", default=each.default, help=each.metadata["help"])
    parser.add_argument("--train_images", type=int, default=7680)
    parser.add_argument("--eval_images", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--megabits", type=int, nargs="*", default=[1000, 100], help="a second, of the links")
    parser.add_argument("--steps", type=int, default=96, help="of the race, a worker")
    parser.add_argument("--link_steps", type=int, default=8, help="of MiniLM, a worker")
    parser.add_argument("--batch", type=int, default=32, help="of the race, a worker")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the race, at its highest")
    parser.add_argument("--points", type=int, default=6, help="at which the race measures the loss")
    parser.add_argument("--timeout", type=float, default=75.0, help="seconds without a step before a run is ended")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    arguments = parser.parse_args()
    if (arguments.megabits or "cut" in arguments.parts) and (reason := why_not()):
        parser.error(f"--megabits and the part cut need networks of their own: {reason}. Leave both out.")
    torch.set_num_threads(1)  # before processes are forked
    data = {name: getattr(arguments, name) for name in ("dataset", "data_dir", "train_file", "eval_file")}
    images = load_images(
        ImageDataArguments(
            **data, image_size=16, max_train_images=arguments.train_images, max_eval_images=arguments.eval_images
        )
    )
    measurement = Measurement(arguments, images)
    names = ("megabits", "steps", "link_steps", "batch", "rate", "points", "timeout", "train_images", "eval_images")
    parameters = {
        **{name: getattr(arguments, name) for name in names},
        "sam_rho": RHO,
        "averages_every": PERIOD,
        "threads_per_worker": 1,
        **{each: version(each) for each in ("pytorch_optimizer", "torchft") if importlib.util.find_spec(each)},
    }
    results: dict[str, list[dict[str, Any]]] = {}
    with Progress(measurement.rows, "rows", arguments.quiet) as progress:
        for part in arguments.parts:
            results[part] = []
            for row in measurement.of(part):
                results[part].append(row)
                progress.advance()
            write_benchmark(arguments.output, NAME, parameters, results)  # whoever breaks off keeps whole parts
    print(table(results))


if __name__ == "__main__":
    main()
