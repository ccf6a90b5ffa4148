"""One run of a contestant: its processes, their faults, and their output."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import tempfile
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from recipes.common.image_data import ImageSet
from scripts.benchmarks.contest.contestants import PERIOD, Contestant, TorchftDiLoCo
from scripts.benchmarks.contest.place import Place
from scripts.benchmarks.contest.tasks import WORKERS
from tests.launch import free_port
from tests.netns import Machine

GLOO_PLACE = re.compile(r" *\[[^]]*\]:?\d* *")  # a line of Gloo's source, or an address
forked = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Job:
    """One run of a contestant.

    Args:
        task: `Images` or `Sentences`.
        points: how many times the loss is measured.
        pause: seconds that worker 1 sleeps at each step.
        fault: what happens to worker 1 after half of its steps: "killed", "cut", or None.
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
    """The body of a worker: sends (step, time) at each step of a job with a fault, and its report at the end."""
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
    """The processes of a job, and what they have sent.

    Args:
        job: what they do.
        hosts: the machines of the workers; if there are none, all workers run on this machine.
        workers: how many workers there are.
    """

    def __init__(self, job: Job, data: ImageSet | nn.Module, hosts: list[Machine], workers: int = WORKERS):
        self.job, self._hosts = job, hosts
        self._folder = tempfile.TemporaryDirectory(prefix="peers-of-hf_lsam-", dir="/dev/shm")
        addresses = [host.address for host in hosts] or ["127.0.0.1"] * workers
        port = free_port()
        self._barrier = forked.Barrier(workers)  # kept, because its shared memory is freed with it
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
        """Receives one message from a worker; returns whether more may come."""
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
        """Whether no process of the run has to be waited for any longer; see `finish`."""
        if self.job.fault is None:
            return any("error" in report for report in self.reports if report)
        silent = self.steps[0] and time.monotonic() - self.steps[0][-1][1] > timeout
        return self.reports[0] is not None or bool(silent)

    def end(self) -> str:
        """Ends the remaining processes; returns what all processes have printed."""
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
    """Waits until every worker has ended or, in a run with a fault, until worker 0 has, or has made no step for
    `timeout` seconds.

    Returns:
        for each run, what its processes have printed.
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
