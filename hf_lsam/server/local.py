"""The server without a process: the link of a worker that is alone (LSAM, Algorithm 1), and of simulated clusters."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..checkpoint import save_tensors
from .core import ServerCore


class LocalLink:
    """Joins a `ServerCore` in the worker's own process. Same calls as `transport.link.MailboxLink`; none blocks.

    Args:
        core: the server, shared by all workers of a simulated cluster.
        worker: this worker's number.
    """

    def __init__(self, core: ServerCore, worker: int = 0):
        self._core = core
        self.worker = worker
        self.stop_requested = False
        self.evicted = False
        self.staleness: list[int] = []
        self.counted_at: int | None = -1  # nothing was handed in that an anchor might not count
        self.accepted = 0
        self.refused = 0
        self.refused_in_a_row = 0
        core.join(worker)

    can_push = True
    away = save_requested = False  # there is no process that could end
    bytes_pushed = bytes_pulled = 0  # nothing leaves the process

    @property
    def version(self) -> int:
        return self._core.anchor.version

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        behind = self.version - version
        self.counted_at = self.version
        if self._core.push(total, steps, self.worker, loss):
            self.accepted += 1
            self.refused_in_a_row = 0
            self.staleness.append(behind)
        else:
            self.refused += 1
            self.refused_in_a_row += 1

    def poll(self, held: int, incoming: Tensor) -> int | None:
        if self.version == held:
            return None
        incoming.copy_(self._core.anchor.vector)
        return self.version

    def settle(self) -> None:
        pass

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> tuple[int, int]:
        self._core.leave(self.worker)
        if not self._core.live:
            self._core.flush()
        incoming.copy_(self._core.anchor.vector)
        return self.version, best_step

    def snapshot(self, path: Path) -> bool:
        save_tensors(path, self._core.state_tensors())
        return True

    def close(self, failed: bool = False) -> None:
        pass
