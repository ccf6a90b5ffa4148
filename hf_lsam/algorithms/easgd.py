"""EASGD: at every tau-th step a worker and the anchor move towards each other, x <- x - alpha d and y <- y + alpha d.

Zhang, Choromanska and LeCun, Deep learning with Elastic Averaging SGD (arXiv 1412.6651), Algorithm 1; the paper's beta
is n alpha. The worker reads the newest published anchor instead of asking for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..coupling import exchange_elastically
from .base import ServerHalf, WorkerHalf


class EASGDWorker(WorkerHalf):
    """Moves only when it pushes, so that either both sides move or neither does."""

    pushes_a_part = False
    moves_at_once = True

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """push = x - y, and x <- x - alpha (x - y)."""
        exchange_elastically(x, y, push, self.settings.coupling_strength)
        return steps


class EASGDServer(ServerHalf):
    """Every push moves the anchor, no matter which worker sends it."""

    moves_elastically = True

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: Mapping[int, int]) -> None:
        """Takes one worker's x - y at one step."""
        self.anchor.vector.add_(vector, alpha=self.settings.moving_rate)
        self.anchor.version += 1


def worker_half(coupling: str) -> type[WorkerHalf]:
    """The only worker's half, whatever `coupling` says."""
    return EASGDWorker


server_half = EASGDServer
