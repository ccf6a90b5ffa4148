"""LSAM: the anchor climbs the smoothed landscape by the mean difference between the workers' samples and itself.

The server, once n tau worker steps are in, from whichever workers they came:

    g' = mean of (y - x)     g = g' + beta (g' - g'_prev)     y <- Optimizer(y, g, eta')        (anchor.py)

A worker is held near y by a coupling, in one of two ways.

*Step by step* ("decoupled", "score"; arXiv 2509.03110, Algorithm 2). Every step draws x to y by c (x - y), c = lambda0
/ tau, and hands in the differences of all steps. This brakes: y does not know yet what the worker has done since, so in
a steady drift all move at eta' / (eta' + lambda0) of the speed that the optimizer alone would give.

*Merge* (the default). A worker hands in what it has moved since it last did, d = x - r, and remembers r = x. When an
anchor comes that counts d,

    x <- x + lambda0 (y_new - r)        r <- r + lambda0 (y_new - r)

The distance is measured at the point of the worker's path that y_new knows of: what it has done meanwhile is kept, and
nothing brakes it. With eta' = 1 the workers' mean is y for every lambda0, which decides only how far they stay apart:
deviations from the mean shrink by 1 - lambda0 at every exchange. lambda0 = 1 is the delta rule, local SGD without its
barrier; with `anchor_optimizer="nesterov"`, DiLoCo (arXiv 2311.08105) without it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..anchor import Anchor, vectors_kept
from ..coupling import add_coupling_to_gradient, blocks, couple_and_accumulate, is_finite
from .base import ServerHalf, ServerSettings, WorkerHalf, WorkerSettings

logger = logging.getLogger(__name__)


class CoupledWorker(WorkerHalf):
    """Algorithm 2's worker: coupled to y at every step, hands in the sum of x - y over its steps."""

    accumulates = True
    brakes = True

    def before_step(self, x: Sequence[Tensor], y: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """Adds lambda (x - y) to the gradient, lambda = lambda0 / (eta tau), where `coupling` is "score".

        Parameters with eta = 0 are not coupled.
        """
        if self.settings.coupling != "score" or not self.settings.coupling_strength:
            return
        for parameter, anchor, eta in zip(x, y, learning_rates, strict=True):
            if eta > 0:
                add_coupling_to_gradient([parameter], [anchor], self.settings.coupling_per_step / eta)

    def after_step(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor]) -> None:
        share = self.settings.coupling_per_step if self.settings.coupling == "decoupled" else 0.0
        couple_and_accumulate(x, y, push, share)

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """push = w sum of (x - y)."""
        if self.weight != 1:
            torch._foreach_mul_(list(push), self.weight)
        return steps

    def after_push(self, push: Sequence[Tensor]) -> None:
        torch._foreach_zero_(list(push))


class MergingWorker(WorkerHalf):
    """Hands in its own movement; merges with every anchor that comes.

    State: r, the last point of its path that it has handed in, moved along with its merges.
    """

    pushes_movement = True
    moves_at_once = True
    vectors = 1

    def __init__(self, settings: WorkerSettings, x: Sequence[Tensor]):
        super().__init__(settings, x)
        self._known = [parameter.detach().to(torch.float32, copy=True) for parameter in x]  # r

    def begin(self, x: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._known, [parameter.detach() for parameter in x])

    @torch.no_grad()
    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """push = w tau (x - r), which counts as tau steps however many it took: the server's mean over steps is the
        mean movement of those who pushed, weighted. r <- x."""
        for current, known, handed_in in blocks([parameter.detach() for parameter in x], self._known, push):
            torch._foreach_copy_(handed_in, torch._foreach_sub(current, known))
            torch._foreach_mul_(handed_in, self.weight * self.settings.sync_steps)
            torch._foreach_copy_(known, current)
        return self.settings.sync_steps

    @torch.no_grad()
    def take_anchor(self, x: Sequence[Tensor], y: Sequence[Tensor], uncounted: Sequence[Tensor] | None) -> None:
        """x <- x + lambda0 (y - r); r of before the last push where y does not count it yet."""
        share = self.settings.coupling_strength
        handed_in = y if uncounted is None else uncounted
        for current, known, anchor, last in blocks([p.detach() for p in x], self._known, y, handed_in):
            shift = torch._foreach_sub(anchor, known)
            if uncounted is not None:
                torch._foreach_add_(shift, last, alpha=1.0 / (self.weight * self.settings.sync_steps))
            torch._foreach_mul_(shift, share)
            torch._foreach_add_(known, shift)
            torch._foreach_add_(current, shift)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"known": torch.cat([known.reshape(-1) for known in self._known])}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        if "known" not in state:  # saved by a worker that did not merge: it has handed in all that it had
            return
        parts = state["known"].split([known.numel() for known in self._known])
        for known, part in zip(self._known, parts, strict=True):
            known.copy_(part.view_as(known))


def worker_half(coupling: str) -> type[WorkerHalf]:
    """The worker's half that `coupling` asks for."""
    return MergingWorker if coupling == "merge" else CoupledWorker


class MeanDifference(ServerHalf):
    """Sums the differences of all workers and moves the anchor once n * tau steps are in.

    n counts the live workers, and those that have left since they pushed into the period under way. At the end of a run
    each worker pushes what it has left and goes: if n shrank with them, the last few pushes would move the anchor as
    far as those of all.

    State: the step count and sum of the period under way; at 0 steps the sum has no meaning.
    """

    adds_up = True

    @staticmethod
    def vectors(settings: ServerSettings) -> int:
        return 1 + vectors_kept(settings.anchor_optimizer, settings.anchor_momentum_correction)

    def __init__(self, anchor: Anchor, settings: ServerSettings):
        super().__init__(anchor, settings)
        self._pending = torch.zeros_like(anchor.vector)
        self.pending_steps = 0
        self._contributors: set[int] = set()  # to the period under way
        self._departed = 0  # of their workers

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: int) -> None:
        """Takes a sum of differences over `steps` local steps."""
        if self.pending_steps:
            self._pending.add_(vector)
        elif steps >= self._period(live):
            self._update(vector, steps)
            return
        else:
            self._pending.copy_(vector)  # a new period; what the last one left behind is written over
        self.pending_steps += steps
        self._contributors.add(worker)
        self._update_if_complete(live)

    def leave(self, worker: int, gone: int, live: int) -> None:
        """n shrinks, which can itself complete a period, unless the period holds a push of who leaves."""
        if worker in self._contributors:
            self._departed += gone
        self._update_if_complete(live)

    def flush(self) -> None:
        """Ends the run: a last update from a period that was not completed.

        Its sum is divided by the steps of a whole period, not by the few in it: y moves by the fraction of a period
        that was seen, instead of jumping to the mean of a handful of samples.
        """
        if self.pending_steps:
            self._update(self._pending, max(self.pending_steps, self._period(0)))

    def _period(self, live: int) -> int:
        """n tau."""
        return max(1, live + self._departed) * self.settings.sync_steps

    def _update_if_complete(self, live: int) -> None:
        if self.pending_steps >= self._period(live):
            self._update(self._pending, self.pending_steps)

    def _update(self, total: Tensor, steps: int) -> None:
        self.pending_steps, self._departed = 0, 0
        self._contributors.clear()
        if is_finite(total):
            self.anchor.update(total, steps, gradient=self._pending)
        else:  # a sender was wrong about what it handed in
            logger.error("a sum of differences over %d steps was dropped: NaN or infinity", steps)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"pending": self._pending, "pending_steps": torch.tensor(self.pending_steps)}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        if "pending" in state:  # else it is of another algorithm's server
            self._pending.copy_(state["pending"])
            self.pending_steps = int(state["pending_steps"])


server_half = MeanDifference
