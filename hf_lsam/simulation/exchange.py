"""The virtual exchange: a clock, a server, and the workers' links to it."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compression import encoded_bytes, round_
from ..coupling import is_finite
from ..server.core import ServerCore
from ..transport.base import FinalAnchor, Link, LinkStatus
from .setting import Machine

LAST = 1 << 32  # a rank that comes after all workers


class Clock:
    """Runs events in the order of their time; ties in the order of `rank`, then in the order of insertion."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, time: float, rank: int, do: Callable[[], None]) -> None:
        """Schedules `do` to be called at `time`, in seconds."""
        heapq.heappush(self._events, (time, rank, next(self._order), do))

    def run(self) -> Iterator[None]:
        """Runs one event after another until none is left, and yields after each."""
        while self._events:
            self.now, _, _, do = heapq.heappop(self._events)
            do()
            yield


class SimulatedServer:
    """The server's core, and the anchor versions that may still be on their way to somebody.

    What crosses the links is the change of the anchor since the last version, rounded to `bits`; the rounding error is
    carried over to the next.
    """

    def __init__(self, clock: Clock, core: ServerCore, longest_transfer: float, push_seconds: float):
        self.core = core
        self.push_seconds = push_seconds
        self._busy_until = -math.inf
        self.bits = core.settings.exchange_bits
        self._waiting: list[tuple[float, int, Callable[[], None]]] = []  # for a newer anchor
        self.published: list[tuple[float, int, Tensor]] = [(-math.inf, 0, core.anchor.vector.clone())]
        self._clock, self._longest = clock, longest_transfer

    def publish_if_newer(self) -> None:
        """Call whenever the core may have moved the anchor."""
        anchor, now = self.core.anchor, self._clock.now
        if anchor.version == self.published[-1][1]:
            return
        held = self.published[-1][2]
        newest = anchor.vector.clone() if self.bits == 32 else held + round_(anchor.vector - held, self.bits)
        self.published.append((now, anchor.version, newest))
        while len(self.published) > 1 and self.published[1][0] + self._longest <= now:
            self.published.pop(0)  # whoever asks from now on gets a newer one
        waiting, self._waiting = self._waiting, []
        for transfer, rank, do in waiting:
            self._clock.at(now + transfer, rank, do)

    def await_anchor(self, transfer: float, rank: int, do: Callable[[], None]) -> None:
        """Calls `do` once a newer anchor has arrived, which is under way for `transfer` seconds."""
        self._waiting.append((transfer, rank, do))

    def take(self, rank: int, do: Callable[[], None], seconds: float = 0.0) -> None:
        """Queues `do`, which takes `seconds` of the server's time, after everything that arrived before it."""
        self._busy_until = max(self._clock.now, self._busy_until) + seconds
        if self._busy_until > self._clock.now:
            self._clock.at(self._busy_until, rank, do)
        else:
            do()

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone, and publishes the anchor if that completes a period."""
        self.core.leave(worker)
        self.publish_if_newer()


class SimulatedLink(Link):
    """A worker's end of the virtual exchange. No call waits; whatever has to wait is an event."""

    def __init__(self, clock: Clock, server: SimulatedServer, machine: Machine, worker: int, numel: int):
        self._worker = worker
        self._status = LinkStatus()
        self._size = encoded_bytes(numel, server.bits)
        self._held_back = torch.zeros(numel) if server.bits < 32 else None
        self.transfer = machine.transfer(self._size)
        self._clock, self._server, self._latency = clock, server, machine.latency
        self._answered_at = -math.inf
        self._answer: int | None = None  # the anchor version that the last push met, on its way back
        server.core.join(worker)

    @property
    def can_push(self) -> bool:
        return self._clock.now >= self._answered_at

    def _newest(self) -> tuple[float, int, Tensor]:
        # The same sum as where it was scheduled: (published + transfer) - transfer may be less than `published`.
        now, published = self._clock.now, self._server.published
        return next(entry for entry in reversed(published) if entry[0] + self.transfer <= now)

    @property
    def steps_begun(self) -> int:
        return self._server.core.steps_begun

    def begin_step(self) -> None:
        self._server.core.steps_begun += 1  # all know at once; real links would delay this as they delay anchors

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
        if self._held_back is None or not is_finite(total):  # the core refuses what is not finite
            return total
        return round_(self._held_back + total, self._server.bits, rest=self._held_back)

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
        """Nothing to wait for: what is under way arrives before `finish` does."""

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        # After steps that others end at the same time, so that workers that finish together are counted together.
        rank = LAST + self._worker

        def take() -> None:
            self._server.take(rank, lambda: self._server.leave(self._worker))

        self._clock.at(self._clock.now + self.transfer, rank, take)
        _, version, vector = self._newest()
        incoming.copy_(vector)
        self._status = replace(self._status, finished=True)
        return FinalAnchor(version, best_step)

    def snapshot(self, path: Path, manifest: Sequence[Any] | None = None) -> bool:
        raise NotImplementedError("a simulated run cannot be saved")

    def close(self, failed: bool = False) -> None:
        pass
