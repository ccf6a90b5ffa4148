"""n simulated workers and their server."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..algorithms import ServerSettings, WorkerSettings
from ..batchnorm import tracking_layers
from ..budget import RunSchedule, StepBudget
from ..compression import encoded_bytes
from ..optimizers import StepHooks, known_direction
from ..parameters import ParameterLayout, trainable_parameters
from ..server.core import ServerCore
from ..worker import Worker
from .exchange import Clock, SimulatedLink, SimulatedServer
from .gradient import PLAIN, Gradient
from .setting import Loss, Machine, MakeOptimizer, MakeScheduler, Moment


class Cluster:
    """n simulated workers and their server.

    Args:
        model: the model that every worker starts from; it is copied.
        make_optimizer: makes the optimizer of one worker from its parameters.
        loss: see `Loss`.
        machines: one per worker.
        worker, server: settings (see `algorithms`).
        gradient: see `Gradient`.
        make_scheduler: makes the learning rate schedule of an optimizer, which is stepped once per step.
        learning_rate_factor: see `LSAMArguments.learning_rate_factor`.
        shared_momentum: see `StepHooks`.
        share_steps: whether the workers share the steps of the run (see `budget`); schedules then follow the run.
        barrier: whether, after a push, a worker waits for the anchor that counts it, as in local SGD and DiLoCo.
        push_seconds: time that the server takes for each push; pushes that arrive in the meantime queue.
        seed: seed of the jitter, and of what workers draw from torch's generator (dropout, noise): worker r draws from
            seed + r.

    State: everything; a run cannot be saved.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        loss: Loss,
        machines: Sequence[Machine],
        worker: WorkerSettings,
        server: ServerSettings,
        gradient: Gradient = PLAIN,
        make_scheduler: MakeScheduler | None = None,
        learning_rate_factor: float = 1.0,
        shared_momentum: float = 0.0,
        barrier: bool = False,
        share_steps: bool = False,
        push_seconds: float = 0.0,
        seed: int = 0,
    ):
        named = trainable_parameters(model)
        self.layout = ParameterLayout(named)
        self.model, self.make_optimizer, self.loss, self.make_scheduler = model, make_optimizer, loss, make_scheduler
        self.worker_settings, self.gradient, self.barrier = worker, gradient, barrier
        self.learning_rate_factor, self.shared_momentum = learning_rate_factor, shared_momentum
        self.share_steps = share_steps
        start = self.layout.read([parameter for _, parameter in named], torch.empty(self.layout.numel))
        longest = max(machine.transfer(encoded_bytes(self.layout.numel, server.exchange_bits)) for machine in machines)
        self.machines, self.seed = machines, seed
        self.clock = Clock()
        self.server = SimulatedServer(self.clock, ServerCore(start, server), longest, push_seconds)
        self._before = (0, 0)  # accepted pushes and the sum of their staleness, at the last moment
        self._workers: list[SimulatedWorker] = []  # those that have joined

    def run(self, steps: int, moments: int = 1) -> Iterator[Moment]:
        """Runs until every worker has made `steps` steps, or has died; with `share_steps`, `steps` is their average.

        Args:
            moments: how many moments to yield, evenly spaced in the steps of the worker that has made the most, or with
                `share_steps` in their mean; the last is when all have finished.

        Raises:
            RuntimeError: if nothing is left to happen, and a worker still has steps to make.
        """
        due = [round(steps * (index + 1) / moments) for index in range(moments - 1)]
        for number, machine in enumerate(self.machines):
            join = functools.partial(self._join, number, steps)
            if machine.joins_at:
                self.clock.at(machine.joins_at, number, join)
            else:  # workers that start together must all be counted before the first step
                join()
        for _ in self.clock.run():
            if due and self._steps_done >= due[0]:
                due.pop(0)
                yield self._moment()
        if stuck := [str(number) for number, each in enumerate(self._workers) if not each.ended]:
            raise RuntimeError(f"Nothing is left to happen, but workers {', '.join(stuck)} still have steps to make.")
        self.server.core.flush()
        yield self._moment()

    def _join(self, number: int, steps: int) -> None:
        self._workers.append(SimulatedWorker(self, number, steps))

    @property
    def _steps_done(self) -> float:
        done = [each.done for each in self._workers]
        return sum(done) / len(self.machines) if self.share_steps else max(done)

    @property
    def anchor(self) -> Tensor:
        """y, float32 [d]."""
        return self.server.core.anchor.vector

    @property
    def workers(self) -> list[Tensor]:
        """A copy of each worker's x, float32 [d]."""
        return [each.worker.own_parameters for each in self._workers]

    def _moment(self) -> Moment:
        x = torch.stack(self.workers)
        statuses = [each.link.status for each in self._workers]
        pushes, staleness = sum(s.accepted for s in statuses), sum(s.staleness_sum for s in statuses)
        before, self._before = self._before, (pushes, staleness)
        spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
        return Moment(
            seconds=self.clock.now,
            steps=max(each.done for each in self._workers),
            steps_in_all=sum(each.done for each in self._workers),
            bytes=sum(status.bytes_pushed + status.bytes_pulled for status in statuses),
            anchor=self.anchor.clone(),
            staleness=(staleness - before[1]) / max(1, pushes - before[0]),
            dispersion=(spread / self.anchor.norm()).item(),
        )


class SimulatedWorker:
    """One worker of a `Cluster`, created when it joins; takes a step whenever the clock reaches the end of one."""

    def __init__(self, cluster: Cluster, number: int, steps: int):
        self._cluster, self._number, self._machine, self._steps = cluster, number, cluster.machines[number], steps
        self._jitter = torch.Generator().manual_seed(cluster.seed + 1_000_003 * (number + 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cluster.seed + number)
            self._random_state = torch.get_rng_state()
        self.done = 0
        self.ended = False
        self._model = copy.deepcopy(cluster.model)
        named = trainable_parameters(self._model)
        self.link = SimulatedLink(cluster.clock, cluster.server, self._machine, number, cluster.layout.numel)
        self.worker = Worker(named, self.link, cluster.worker_settings)
        self.worker.adopt_anchor()
        self._parameters = [parameter for _, parameter in named]
        self._optimizer = cluster.make_optimizer(self._parameters)
        self._hooks = StepHooks(self._optimizer, self.worker, cluster.learning_rate_factor, cluster.shared_momentum)
        scheduler = cluster.make_scheduler(self._optimizer) if cluster.make_scheduler else None
        self._scheduler: LRScheduler | RunSchedule | None = scheduler
        self._batchnorm = tracking_layers(self._model)
        self._budget: StepBudget | None = None  # the steps of the run, if workers share them
        if cluster.share_steps:
            self._budget = budget = StepBudget(self.link, steps, len(cluster.machines))
            budget.begin_step()
            if scheduler is not None:
                self._scheduler = schedule = RunSchedule(scheduler, lambda: budget.position)
                schedule.catch_up()
        self._go_on()

    def _schedule(self) -> None:
        clock = self._cluster.clock
        end = self._machine.end_of_step(clock.now, torch.randn((), generator=self._jitter).item())
        if end > self._machine.dies_at:
            clock.at(self._machine.dies_at, self._number, self._die)
        else:
            clock.at(end, self._number, self._step)

    def _die(self) -> None:
        self._cluster.server.leave(self._number)
        self.ended = True

    def _step(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            self._optimize()
            self._random_state = torch.get_rng_state()
        self.done += 1
        if self._has_steps_left and self._cluster.barrier and self.done % self._cluster.worker_settings.sync_steps == 0:
            self._look_for_anchor()
        else:
            self._go_on()

    @property
    def _has_steps_left(self) -> bool:
        return self.done < self._steps if self._budget is None else not self._budget.is_spent

    def _go_on(self) -> None:
        if self._has_steps_left:
            self._schedule()
        else:
            self.worker.finish()
            self.ended = True

    def _optimize(self) -> None:
        cluster, parameters = self._cluster, self._parameters
        along = known_direction(cluster.gradient.sam_direction, self.worker, self._optimizer)
        loss = cluster.gradient.add_to(parameters, cluster.loss(self._model, self._number), self._batchnorm, *along)
        self.worker.note_loss(loss, 1.0)
        cluster.gradient.clip(parameters)
        self._hooks.before_step()
        self._optimizer.step()
        if self._budget is not None:
            self._budget.begin_step()
        self._hooks.after_step()
        self._optimizer.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()

    def _look_for_anchor(self) -> None:
        """With a barrier: continues once the anchor that counts its last push has arrived."""
        self.worker.pull_newest()
        counted_at = self.link.status.counted_at
        if counted_at is not None and counted_at < self.worker.version:
            self._schedule()
        else:
            self._cluster.server.await_anchor(self.link.transfer, self._number, self._look_for_anchor)
