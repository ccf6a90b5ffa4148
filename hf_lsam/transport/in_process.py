"""The exchange of a worker that trains alone (LSAM, Algorithm 1): its server is an object in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..anchor import Anchor
from ..checkpoint import save_tensors
from .base import FinalAnchor, Link, LinkStatus


class Aggregator(Protocol):
    """Pushes in, anchor out: what an in-process link, and a server, require of the classes in `server.core`."""

    anchor: Anchor
    accepted_pushes: int
    refused_pushes: int
    steps_begun: int

    @property
    def live_workers(self) -> int:
        """n: the number of workers that have joined and not left."""

    def join(self, worker: int, weight: int = 1) -> None:
        """Counts `worker` as live; for its weight see `WorkerSettings`."""

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it has pushed stays counted."""

    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0, finite: bool | None = None) -> bool:
        """Takes one worker's push, float32 [d], of `steps` local steps; returns False if it is not finite."""

    def flush(self) -> None:
        """Ends the run; what is still pending must not be lost."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, as tensors by name."""


class InProcessLink(Link):
    """Passes each push to the server's arithmetic at once; nothing waits, leaves the process or is lost.

    Args:
        core: the server; several links may share one.
        worker: this worker's number.
        alone: whether no other link shares the server, and it is on the worker's device: the worker then keeps no copy
            of the anchor.
        weight: see `WorkerSettings`.
    """

    def __init__(self, core: Aggregator, worker: int = 0, alone: bool = False, weight: int = 1):
        if alone:
            self.anchor_in_place = core.anchor.vector
        self._core = core
        self._worker = worker
        self._status = LinkStatus()
        core.join(worker, weight)

    @property
    def can_push(self) -> bool:
        return True

    @property
    def steps_begun(self) -> int:
        return self._core.steps_begun

    def begin_step(self) -> None:
        self._core.steps_begun += 1

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        came_to = self._core.anchor.version
        accepted = self._core.push(total, steps, self._worker, loss)
        self._status = self._status.after_answer(accepted, came_to, came_to - version)

    def poll(self, held: int, incoming: Tensor) -> int | None:
        anchor = self._core.anchor
        if anchor.version == held:
            return None
        if incoming is not anchor.vector:
            incoming.copy_(anchor.vector)
        return anchor.version

    def settle(self) -> None:
        pass

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        self._core.leave(self._worker)
        if not self._core.live_workers:
            self._core.flush()
        incoming.copy_(self._core.anchor.vector)
        self._status = replace(self._status, finished=True)
        return FinalAnchor(self._core.anchor.version, best_step)

    def snapshot(self, path: Path, manifest: Sequence[Any] | None = None) -> bool:
        save_tensors(path, self._core.state_tensors(), manifest)
        return True

    def close(self, failed: bool = False) -> None:
        pass
