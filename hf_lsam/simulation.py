"""n workers in one process, under a virtual clock: experiments on clusters that are not there.

The workers, the server and their arithmetic are the product's own (`worker.Worker`, `server.core.ServerCore`,
`algorithms`, `sam`); only the exchange is virtual. Each worker takes a time a step, each of its links has a latency and
a bandwidth; workers may be slow, pause, join and die. Events happen in the order of the clock, ties in the order of the
workers, so staleness is real and a run is a function of its seed alone. With equal speeds and links that take no time,
n workers are n processes in lock step, bit for bit.

`DataParallel` is the baseline: every step waits for the slowest worker and for an all-reduce.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from . import sam
from .algorithms import ServerSettings, WorkerSettings
from .batchnorm import tracking_layers
from .budget import RunSchedule, StepBudget
from .compression import encoded_bytes, rounded
from .optimizers import StepHooks, known_direction, momentum_buffers
from .parameters import ParameterLayout, data_parallel_bytes, trainable_parameters
from .server.core import ServerCore
from .transport.base import FinalAnchor, Link, LinkStatus
from .worker import Worker

LAST = 1 << 32  # a rank behind all workers

Loss = Callable[[nn.Module, int], Callable[[], Tensor]]


@dataclass(frozen=True)
class Machine:
    """Where one simulated worker runs.

    Args:
        step_seconds: of one optimizer step, as virtual time.
        jitter: relative standard deviation of a step's time (log-normal, drawn from the run's seed).
        latency: seconds that a message takes to the server, and back.
        bandwidth: bytes a second in each direction; infinite on one machine.
        pauses: (from, for) pairs of virtual seconds in which it does nothing.
        joins_at: when it begins, virtual seconds.
        dies_at: when it is gone; what it has handed in stays.
    """

    step_seconds: float = 1.0
    jitter: float = 0.0
    latency: float = 0.0
    bandwidth: float = math.inf
    pauses: tuple[tuple[float, float], ...] = ()
    joins_at: float = 0.0
    dies_at: float = math.inf

    def transfer(self, size: int) -> float:
        """Seconds for one message of `size` bytes, one way."""
        return self.latency + size / self.bandwidth

    def end_of_step(self, begin: float, draw: Callable[[], float]) -> float:
        """When a step that begins at `begin` is done; `draw` gives a standard normal number."""
        end = begin + self.step_seconds * (math.exp(self.jitter * draw() - self.jitter**2 / 2) if self.jitter else 1.0)
        for start, seconds in self.pauses:
            if begin <= start < end or start <= begin < start + seconds:
                end += start + seconds - max(begin, start)
        return end


@dataclass(frozen=True)
class Gradient:
    """How a step's gradient is computed (see `sam`).

    Args:
        sam_rho: 0 is the plain gradient.
        sam_adaptive: ASAM.
        sam_direction: see `LSAMArguments`; "anchor" is for a `Cluster` whose workers keep the anchor's last move.
        max_grad_norm: clips the gradient that the optimizer steps with; None does not.
    """

    sam_rho: float = 0.0
    sam_adaptive: bool = False
    sam_direction: str = "gradient"
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class Moment:
    """What is known of a run at one time.

    Args:
        seconds: virtual time.
        steps: optimizer steps of the worker that has made the most.
        steps_in_all: of all workers together.
        bytes: sent and received, all workers together.
        anchor: y, float32 [d].
        staleness: mean anchor versions between reading y and handing in, since the last moment.
        dispersion: root mean square distance of the workers from their mean, over ||y||.
    """

    seconds: float
    steps: int
    steps_in_all: int
    bytes: int
    anchor: Tensor
    staleness: float = 0.0
    dispersion: float = 0.0


class _Clock:
    """Events in the order of their time; at one time, in the order of `rank`, then as they came."""

    def __init__(self):
        self.now = 0.0
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, rank: int, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, rank, next(self._order), do))

    def run(self) -> Iterator[None]:
        while self._events:
            self.now, _, _, do = heapq.heappop(self._events)
            do()
            yield


class _Server:
    """The core, and the versions that are still on their way to somebody.

    What crosses the links is the change of the anchor since the last version, rounded to `bits`; what that leaves
    behind goes with the next.
    """

    def __init__(self, clock: _Clock, core: ServerCore, longest_transfer: float, push_seconds: float):
        self.core = core
        self.push_seconds = push_seconds
        self._busy_until = -math.inf
        self.bits = core.settings.exchange_bits
        self.waiting: list[_SimulatedWorker] = []  # for a newer anchor
        self.published: list[tuple[float, int, Tensor]] = [(-math.inf, 0, core.anchor.vector.clone())]
        self._clock, self._longest = clock, longest_transfer

    def publish_if_newer(self) -> None:
        """To be called whenever the core may have moved the anchor."""
        anchor, now = self.core.anchor, self._clock.now
        if anchor.version == self.published[-1][1]:
            return
        held = self.published[-1][2]
        newest = anchor.vector.clone() if self.bits == 32 else held + rounded(anchor.vector - held, self.bits)
        self.published.append((now, anchor.version, newest))
        while len(self.published) > 1 and self.published[1][0] + self._longest <= now:
            self.published.pop(0)  # whoever asks from now on has a newer one
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            self._clock.at(now + each.link.transfer, each.number, each.look_for_anchor)

    def take(self, rank: int, do: Callable[[], None], seconds: float = 0.0) -> None:
        """Does what has arrived, which takes `seconds`, after all that arrived before it."""
        self._busy_until = max(self._clock.now, self._busy_until) + seconds
        if self._busy_until > self._clock.now:
            self._clock.at(self._busy_until, rank, do)
        else:
            do()

    def leave(self, worker: int) -> None:
        self.core.leave(worker)
        self.publish_if_newer()


class _Link(Link):
    """A worker's end of the virtual exchange; no call waits, whatever has to is an event."""

    def __init__(self, clock: _Clock, server: _Server, machine: Machine, worker: int, numel: int):
        self._worker = worker
        self._status = LinkStatus()
        self._size = encoded_bytes(numel, server.bits)
        self._held_back = torch.zeros(numel) if server.bits < 32 else None
        self.transfer = machine.transfer(self._size)
        self._clock, self._server, self._latency = clock, server, machine.latency
        self._answered_at = -math.inf
        self._answer: int | None = None  # the version that the last push came to, on its way back
        server.core.join(worker)

    @property
    def can_push(self) -> bool:
        return self._clock.now >= self._answered_at

    def _newest(self) -> tuple[float, int, Tensor]:
        by = self._clock.now - self.transfer
        return next(entry for entry in reversed(self._server.published) if entry[0] <= by)

    @property
    def steps_begun(self) -> int:
        return self._server.core.steps_begun

    def begin_step(self) -> None:
        self._server.core.steps_begun += 1  # all know at once: a link would delay it as it delays anchors

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        self._status, self._answered_at = self._status.after_push(self._size), math.inf
        vector = self._rounded(total)
        if not self.transfer and not self._server.push_seconds:
            self._arrive(vector, steps, version, loss)
            return
        vector = vector.clone()

        def take() -> None:
            seconds = self._server.push_seconds
            self._server.take(self._worker, lambda: self._arrive(vector, steps, version, loss), seconds)

        self._clock.at(self._clock.now + self.transfer, self._worker, take)

    def _rounded(self, total: Tensor) -> Tensor:
        if self._held_back is None or not torch.isfinite(torch.dot(total, total)):  # the core refuses what is not
            return total
        self._held_back += total
        vector = rounded(self._held_back, self._server.bits)
        self._held_back -= vector
        return vector

    def _arrive(self, total: Tensor, steps: int, version: int, loss: float) -> None:
        self._answer = self._server.core.anchor.version
        accepted = self._server.core.push(total, steps, self._worker, loss)
        self._status = self._status.after_answer(accepted, None, self._answer - version)
        self._answered_at = self._clock.now + self._latency
        self._server.publish_if_newer()

    def poll(self, held: int, incoming: Tensor) -> int | None:
        if self.can_push and self._answer is not None:
            self._status, self._answer = replace(self._status, counted_at=self._answer), None
        _, version, vector = self._newest()
        if version == held:
            return None
        incoming.copy_(vector)
        self._status = self._status.after_pull(self._size)
        return version

    def settle(self) -> None:
        """Whoever finishes does not wait: what is under way arrives before the end."""

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        # After the steps that others end at the same time: who finishes together is counted together.
        rank = LAST + self._worker

        def take() -> None:
            self._server.take(rank, lambda: self._server.leave(self._worker))

        self._clock.at(self._clock.now + self.transfer, rank, take)
        _, version, vector = self._newest()
        incoming.copy_(vector)
        self._status = replace(self._status, finished=True)
        return FinalAnchor(version, best_step)

    def snapshot(self, path: Path) -> bool:
        raise NotImplementedError("a simulated run cannot be saved")

    def close(self, failed: bool = False) -> None:
        pass


class Cluster:
    """n simulated workers and their server.

    Args:
        model: what every worker begins with.
        make_optimizer: given parameters, the optimizer of one worker.
        loss: given the model of a worker and its number, draws that worker's next batch and returns a closure that
            computes its loss, 0-d; it is called twice where the gradient is SAM's.
        machines: one a worker.
        worker, server: settings (see `algorithms`).
        gradient: see `Gradient`.
        make_scheduler: given an optimizer, its learning rate schedule, stepped once a step.
        learning_rate_factor: see `LSAMArguments.learning_rate_factor`.
        share_steps: workers share the steps of the run (see `budget`); schedules follow it.
        barrier: after a push a worker waits for the anchor that counts it, as local SGD and DiLoCo do.
        push_seconds: that the server takes for each push; those that arrive meanwhile wait in line.
        seed: of jitter, and of what workers draw from torch's generator (dropout, noise); worker r draws from seed + r.

    State: everything; a run cannot be saved.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        loss: Loss,
        machines: Sequence[Machine],
        worker: WorkerSettings,
        server: ServerSettings,
        gradient: Gradient = Gradient(),
        make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        learning_rate_factor: float = 1.0,
        barrier: bool = False,
        share_steps: bool = False,
        push_seconds: float = 0.0,
        seed: int = 0,
    ):
        named = trainable_parameters(model)
        self.layout = ParameterLayout(named)
        self.model, self.make_optimizer, self.loss, self.make_scheduler = model, make_optimizer, loss, make_scheduler
        self.worker_settings, self.gradient, self.barrier = worker, gradient, barrier
        self.learning_rate_factor, self.share_steps = learning_rate_factor, share_steps
        start = self.layout.read([parameter for _, parameter in named], torch.empty(self.layout.numel))
        longest = max(machine.transfer(encoded_bytes(self.layout.numel, server.exchange_bits)) for machine in machines)
        self.num_workers = len(machines)
        self.clock = _Clock()
        self.server = _Server(self.clock, ServerCore(start, server), longest, push_seconds)
        self._before = (0, 0)  # accepted pushes and the sum of their staleness, at the last moment
        self._workers = [_SimulatedWorker(self, number, machine, seed) for number, machine in enumerate(machines)]

    def run(self, steps: int, moments: int = 1) -> Iterator[Moment]:
        """Every worker makes `steps` steps, or as many as it lives for; with `share_steps` on average.

        Args:
            moments: how many times to look at the run, evenly spaced by the steps of the worker that has made the most,
                with `share_steps` by their mean; the last is when all have finished.
        """
        due = [round(steps * (index + 1) / moments) for index in range(moments - 1)]
        for each in self._workers:
            each.begin(steps)
        for _ in self.clock.run():
            if due and self._steps_done >= due[0]:
                due.pop(0)
                yield self._moment()
        self.server.core.flush()
        yield self._moment()

    @property
    def _steps_done(self) -> float:
        done = [each.done for each in self._workers]
        return sum(done) / len(done) if self.share_steps else max(done)

    @property
    def anchor(self) -> Tensor:
        """y, float32 [d]."""
        return self.server.core.anchor.vector

    @property
    def workers(self) -> list[Tensor]:
        """A copy of each worker's x, float32 [d]."""
        return [each.worker.own_parameters for each in self._workers if each.worker is not None]

    def _moment(self) -> Moment:
        alive = [each for each in self._workers if each.worker is not None]
        x = torch.stack([each.worker.own_parameters for each in alive])
        statuses = [each.link.status for each in alive]
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


class _SimulatedWorker:
    """One worker of a `Cluster`: takes a step when its time has come."""

    def __init__(self, cluster: Cluster, number: int, machine: Machine, seed: int):
        self._cluster, self.number, self._machine = cluster, number, machine
        self._jitter = torch.Generator().manual_seed(seed + 1_000_003 * (number + 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            self._random_state = torch.get_rng_state()
        self._steps = 0
        self.done = 0
        self.worker: Worker | None = None
        self._budget: StepBudget | None = None  # of the run, where workers share one

    def begin(self, steps: int) -> None:
        """Joins at its time; those that begin together all count before the first step."""
        self._steps = steps
        if self._machine.joins_at:
            self._cluster.clock.at(self._machine.joins_at, self.number, self._join)
        else:
            self._join()

    def _join(self) -> None:
        cluster = self._cluster
        self._model = copy.deepcopy(cluster.model)
        named = trainable_parameters(self._model)
        self.link = _Link(cluster.clock, cluster.server, self._machine, self.number, cluster.layout.numel)
        self.worker = Worker(named, self.link, cluster.worker_settings)
        self.worker.adopt_anchor()
        self._optimizer = cluster.make_optimizer(self.worker.parameters)
        self._hooks = StepHooks(self._optimizer, self.worker, cluster.learning_rate_factor)
        self._scheduler = cluster.make_scheduler(self._optimizer) if cluster.make_scheduler else None
        self._batchnorm = tracking_layers(self._model)
        if cluster.share_steps:
            self._budget = StepBudget(self.link, self._steps, cluster.num_workers)
            self._budget.begin_step()
            if self._scheduler is not None:
                self._scheduler = RunSchedule(self._scheduler, lambda: self._budget.position)
                self._scheduler.catch_up()
        self._go_on()

    def _schedule(self) -> None:
        clock = self._cluster.clock
        end = self._machine.end_of_step(clock.now, lambda: torch.randn((), generator=self._jitter).item())
        if end > self._machine.dies_at:
            clock.at(self._machine.dies_at, self.number, lambda: self._cluster.server.leave(self.number))
        else:
            clock.at(end, self.number, self._step)

    def _step(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random_state)
            self._optimize()
            self._random_state = torch.get_rng_state()
        self.done += 1
        if self._has_steps_left and self._cluster.barrier and self.done % self._cluster.worker_settings.sync_steps == 0:
            self.look_for_anchor()
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

    def _optimize(self) -> None:
        cluster, parameters = self._cluster, self.worker.parameters
        along = known_direction(cluster.gradient.sam_direction, self.worker, self._optimizer)
        add_gradient(parameters, cluster.loss(self._model, self.number), cluster.gradient, self._batchnorm, *along)
        clip(parameters, cluster.gradient)
        self._hooks.before_step()
        self._optimizer.step()
        if self._budget is not None:
            self._budget.begin_step()
        self._hooks.after_step()
        self._optimizer.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()

    def look_for_anchor(self) -> None:
        """Behind a barrier: goes on once the anchor that counts its last push has come."""
        self.worker.pull_newest()
        counted_at = self.link.status.counted_at
        if counted_at is not None and counted_at < self.worker.version:
            self._schedule()
        else:
            self._cluster.server.waiting.append(self)


class DataParallel:
    """The baseline: n workers with one model, whose gradients are averaged at every step (see `Cluster`).

    SAM's perturbation is each worker's own, on its own batch, and costs no all-reduce. A step takes as long as the
    slowest worker's, and a ring all-reduce over the slowest link: 2 (n - 1) messages of a n-th of the gradient each.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        loss: Loss,
        machines: Sequence[Machine],
        gradient: Gradient = Gradient(),
        make_scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
        seed: int = 0,
    ):
        self._model = copy.deepcopy(model)
        named = trainable_parameters(self._model)
        self.layout = ParameterLayout(named)
        self._parameters = [parameter for _, parameter in named]
        self._optimizer = make_optimizer(self._parameters)
        self._scheduler = make_scheduler(self._optimizer) if make_scheduler else None
        self._loss, self._machines, self._gradient = loss, machines, gradient
        self._batchnorm = tracking_layers(self._model)
        self._jitter = torch.Generator().manual_seed(seed)
        self._seed = seed

    def run(self, steps: int, moments: int = 1) -> Iterator[Moment]:
        """Makes `steps` steps; see `Cluster.run`."""
        workers, size = len(self._machines), 4 * self.layout.numel
        due = {round(steps * (index + 1) / moments) for index in range(moments)}
        all_reduce = max(2 * (workers - 1) * machine.transfer(size / workers) for machine in self._machines)
        now, states = 0.0, []
        with torch.random.fork_rng(devices=[]):
            for worker in range(workers):
                torch.manual_seed(self._seed + worker)
                states.append(torch.get_rng_state())
        for step in range(1, steps + 1):
            directions = None
            if self._gradient.sam_direction == "momentum":
                directions = momentum_buffers(self._optimizer, self._parameters)
            for worker in range(workers):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(states[worker])
                    loss = self._loss(self._model, worker)
                    add_gradient(self._parameters, loss, self._gradient, self._batchnorm, directions, -1.0)
                    states[worker] = torch.get_rng_state()
            for parameter in self._parameters:
                parameter.grad /= workers
            clip(self._parameters, self._gradient)
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._scheduler is not None:
                self._scheduler.step()
            draws = torch.randn(workers, generator=self._jitter).tolist()
            ends = [m.end_of_step(now, lambda z=z: z) for m, z in zip(self._machines, draws, strict=True)]
            now = max(ends) + all_reduce
            if step in due:
                x = self.layout.read(self._parameters, torch.empty(self.layout.numel))
                yield Moment(now, step, step * workers, data_parallel_bytes([step] * workers, self.layout.numel), x)


def add_gradient(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    gradient: Gradient,
    batchnorm: Sequence[nn.Module],
    directions: Sequence[Tensor] | None,
    sign: float,
) -> None:
    """Adds one worker's gradient, plain or SAM's, to `.grad`.

    Args:
        directions: u of a perturbation along `sign` times u that is known before the step; None while there is none.
    """

    def one_pass() -> Tensor:
        value = loss()
        value.backward()
        return value.detach()

    rho, adaptive = gradient.sam_rho, gradient.sam_adaptive
    if rho and gradient.sam_direction == "gradient":
        sam.gradient(parameters, one_pass, one_pass, rho, adaptive=adaptive, batchnorm=batchnorm)
    elif rho and directions is not None:
        sam.gradient_along(parameters, directions, one_pass, sign * rho, adaptive=adaptive)
    else:
        one_pass()


def clip(parameters: Sequence[nn.Parameter], gradient: Gradient) -> None:
    if gradient.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters, gradient.max_grad_norm)
