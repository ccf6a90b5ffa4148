"""LSGD: the anchor is the worker whose mean loss over its last tau steps was the lowest, and it draws all others to it.

Teng et al., Leader Stochastic Gradient Descent (arXiv 1905.10395), Algorithm 1; its lambda is lambda0 / tau. The paper
has one leader per machine in addition to the global one; on a single machine they are the same. The server only knows
what was pushed, so the lead changes when the new leader pushes, not when the old one gets worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..anchor import Anchor
from ..coupling import couple
from .base import ServerHalf, ServerSettings, WorkerHalf


class LSGDWorker(WorkerHalf):
    """Drawn to the leader after every step, x <- x - c (x - y); pushes x and its loss."""

    wants_loss = True

    def after_step(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor]) -> None:
        couple(x, y, self.settings.coupling_per_step)

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """push = x."""
        torch._foreach_copy_(list(push), [parameter.detach() for parameter in x])
        return steps


class LSGDServer(ServerHalf):
    """Keeps the parameters of the leader.

    State: the last loss of each worker.
    """

    def __init__(self, anchor: Anchor, settings: ServerSettings):
        super().__init__(anchor, settings)
        self._losses: dict[int, float] = {}

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: Mapping[int, int]) -> None:
        """Takes the parameters of one worker and its mean loss; NaN never leads."""
        self._losses[worker] = loss if math.isfinite(loss) else math.inf
        if math.isfinite(loss) and loss <= min(self._losses.values()):
            self.anchor.vector.copy_(vector)
            self.anchor.version += 1

    def leave(self, worker: int, live: Mapping[int, int]) -> None:
        """A worker that is gone no longer leads; the anchor stays until another does."""
        self._losses.pop(worker, None)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"losses": torch.tensor([*self._losses.items()], dtype=torch.float64).reshape(-1, 2)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        if "losses" in state:  # absent if another algorithm's server saved it
            self._losses = {int(worker): loss for worker, loss in state["losses"].tolist()}


def worker_half(coupling: str) -> type[WorkerHalf]:
    """The only worker's half, whatever `coupling` says."""
    return LSGDWorker


server_half = LSGDServer
