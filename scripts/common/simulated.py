"""Simulated runs: sets one up, and makes many, each once, several at a time."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lsam.files import write_atomically
from hf_lsam.loop import LoopArguments
from hf_lsam.simulation import Cluster, DataParallel, Gradient, Loss, Machine
from recipes.common.progress import Progress
from scripts.common.names import names_of


def make_run(
    arguments: LoopArguments | None,
    model: nn.Module,
    make_optimizer: Callable,
    loss: Loss,
    machines: Sequence[Machine],
    gradient: Gradient,
    make_scheduler: Callable,
    seed: int,
    barrier: bool = False,
    push_seconds: float = 0.0,
) -> tuple[Cluster | DataParallel, int | None]:
    """A run with these arguments of LSAM, or a data-parallel one if they are None, and its sync_steps.

    Args:
        arguments: what they say about SAM gives way to `gradient`.
        barrier: whether workers wait for their anchor; otherwise they share the steps of the run.
        model, make_optimizer, loss, machines, gradient, make_scheduler, push_seconds, seed: see `Cluster`.
    """
    if arguments is None:
        return DataParallel(model, make_optimizer, loss, machines, gradient, make_scheduler, seed), None
    # Where the momentum lies, and what a worker keeps of the anchor, depend on the perturbation.
    arguments = replace(
        arguments,
        sam_rho=gradient.sam_rho,
        sam_adaptive=gradient.sam_adaptive,
        sam_direction=gradient.sam_direction,
    )
    sync_steps, workers = arguments.steps_between_pushes(len(machines)), len(machines)
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))])
    momentum = arguments.shared_momentum(optimizer, workers)
    cluster = Cluster(
        model,
        make_optimizer,
        loss,
        machines,
        arguments.worker_settings(sync_steps),
        arguments.server_settings(sync_steps, momentum),
        gradient,
        make_scheduler,
        arguments.learning_rate_factor(sync_steps, optimizer, workers),
        momentum,
        barrier,
        share_steps=not barrier,
        push_seconds=push_seconds,
        seed=seed,
    )
    return cluster, sync_steps


class SimulatedRuns:
    """Makes the runs that do not exist yet, and keeps them.

    Attributes:
        data: what all runs share, as JSON.

    Args:
        simulate: takes a run (a dataclass with `method` and `seed`) and `data` as JSON, and returns the result, a
            mapping that has the run under "run". It must be a module-level function, because other processes call it.
        figure: takes a result and returns the text shown for it on the screen.
        methods: what the methods are, by name, if that is not all in the run's own fields.
        data: what all runs share. A kept run is identified by these fields, its own, those of its method and LSAM's
            defaults, and by the contents of the files that they name.
        runs_dir: the folder in which results are kept.
        processes: how many runs to make at a time, one per core; 1 makes them in this process.
        quiet: do not show progress.
    """

    def __init__(
        self,
        simulate: Callable[[Any, str], dict[str, Any]],
        figure: Callable[[dict[str, Any]], str],
        methods: Mapping[str, Any],
        data: dict[str, Any],
        runs_dir: Path,
        processes: int,
        quiet: bool,
    ):
        self._simulate, self._figure, self._methods, self.data = simulate, figure, methods, json.dumps(data)
        self._runs_dir, self._processes, self._quiet = runs_dir, processes, quiet

    def results(self, runs: Sequence[Any]) -> list[dict[str, Any]]:
        """The results, in the order of `runs`."""
        data, defaults = json.loads(self.data), LoopArguments().lsam_fields()
        wholes = [
            {"run": asdict(run), "method": self._methods.get(run.method), "defaults": defaults, "data": data}
            for run in runs
        ]
        paths = [self._runs_dir / f"{name}.json" for name in names_of(wholes)]
        missing = {path: run for path, run in zip(paths, runs, strict=True) if not path.exists()}
        self._runs_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            make: Callable[..., Iterator[dict[str, Any]]] = map
            if self._processes > 1:
                context = multiprocessing.get_context("spawn")
                make = stack.enter_context(ProcessPoolExecutor(self._processes, context)).map
            bar = stack.enter_context(Progress(len(missing), "runs", self._quiet))
            made = make(self._simulate, missing.values(), itertools.repeat(self.data))
            for path, result in zip(missing, made, strict=True):
                write_atomically(path, json.dumps(result) + "\n")
                bar.say(f"{result['run']['method']}, seed {result['run']['seed']}: {self._figure(result)}")
                bar.advance()
        return [json.loads(path.read_text()) for path in paths]
