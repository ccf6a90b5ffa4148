"""LSAM: the anchor climbs the smoothed landscape by the mean difference between the workers' samples and itself.

The server, once n tau worker steps are in, no matter from which workers:

    g' = mean of (y - x)     g = g' + beta (g' - g'_prev)     y <- Optimizer(y, g, eta')        (anchor.py)

A worker is held near y by a coupling, in one of two ways.

*Step by step* ("decoupled", "score"; arXiv 2509.03110, Algorithm 2). Every step draws x to y by c (x - y), c = lambda0
/ tau, and the worker pushes the sum of its differences over all steps. This slows everyone down: y does not include yet
what the worker has done since, so in a steady drift all move at about eta' / (eta' + lambda0) of the speed that the
optimizer alone would give (`coupling.drift_slowdown` is exact).

*Merge* (the default). A worker pushes how far it has moved since its last push, d = x - r, and then sets r = x. When an
anchor arrives that counts d,

    x <- x + lambda0 (y_new - r)        r <- r + lambda0 (y_new - r)

The distance is measured from the point of the worker's path that y_new includes. What the worker has done in the
meantime is kept, so nothing slows it down. With eta' = 1 the workers' mean is y for every lambda0, which decides only
how far apart they stay: deviations from the mean shrink by a factor of 1 - lambda0 at every exchange. lambda0 = 1 is
the delta rule: local SGD or, with `anchor_optimizer="nesterov"`, DiLoCo (arXiv 2311.08105), both without a barrier.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..anchor import Anchor, vectors_kept
from ..coupling import add_coupling_to_gradient, blocks, couple_and_accumulate, is_finite
from .base import ServerHalf, ServerSettings, WorkerHalf, WorkerSettings

logger = logging.getLogger(__name__)


class CoupledWorker(WorkerHalf):
    """Algorithm 2's worker: coupled to y at every step, pushes the sum of x - y over its steps."""

    accumulates = True
    brakes = True

    def before_step(self, x: Sequence[Tensor], y: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """Adds lambda (x - y) to the gradient, lambda = lambda0 / (eta tau), if `coupling` is "score".

        Parameters with eta = 0 are not coupled.
        """
        if self.settings.coupling != "score" or not self.settings.coupling_strength:
            return
        for parameter, anchor, eta in zip(x, y, learning_rates, strict=True):
            if eta > 0:
                add_coupling_to_gradient(parameter, anchor, self.settings.coupling_per_step / eta)

    def after_step(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor]) -> None:
        share = self.settings.coupling_per_step if self.settings.coupling == "decoupled" else 0.0
        couple_and_accumulate(x, y, push, share)

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """push = w sum of (x - y), which counts as w steps for each, w being the weight."""
        if self.settings.weight != 1:
            torch._foreach_mul_(list(push), self.settings.weight)
        return self.settings.weight * steps

    def after_push(self, push: Sequence[Tensor]) -> None:
        torch._foreach_zero_(list(push))


class MergingWorker(WorkerHalf):
    """Pushes its own movement, and merges with every anchor that arrives.

    State: r, the point of its path at the last push, shifted by the merges since.
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
        """push = w tau (x - r), which counts as w tau steps however many were taken, so that the server's mean over
        steps is the mean movement of the workers that pushed, weighted by their w. r <- x."""
        counts_as = self.settings.weight * self.settings.sync_steps
        for current, known, handed_in in blocks([parameter.detach() for parameter in x], self._known, push):
            torch._foreach_copy_(handed_in, torch._foreach_sub(current, known))
            torch._foreach_mul_(handed_in, counts_as)
            torch._foreach_copy_(known, current)
        return counts_as

    @torch.no_grad()
    def take_anchor(self, x: Sequence[Tensor], y: Sequence[Tensor], uncounted: Sequence[Tensor] | None) -> None:
        """x <- x + lambda0 (y - r), with the r from before the last push if y does not count that push yet."""
        share = self.settings.coupling_strength
        handed_in = y if uncounted is None else uncounted
        for current, known, anchor, last in blocks([p.detach() for p in x], self._known, y, handed_in):
            shift = torch._foreach_sub(anchor, known)
            if uncounted is not None:
                torch._foreach_add_(shift, last, alpha=1.0 / (self.settings.weight * self.settings.sync_steps))
            torch._foreach_mul_(shift, share)
            torch._foreach_add_(known, shift)
            torch._foreach_add_(current, shift)

    def state_tensors(self) -> dict[str, Tensor]:
        return {"known": torch.cat([known.reshape(-1) for known in self._known])}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        if "known" not in state:  # saved by a worker with another coupling or algorithm: `begin` has set r = x
            return
        parts = state["known"].split([known.numel() for known in self._known])
        for known, part in zip(self._known, parts, strict=True):
            known.copy_(part.view_as(known))


def worker_half(coupling: str) -> type[WorkerHalf]:
    """The worker's half for this `coupling`."""
    return MergingWorker if coupling == "merge" else CoupledWorker


class MeanDifference(ServerHalf):
    """Sums the differences of all workers and moves the anchor once n * tau steps are in.

    n counts the live workers, plus those that have left after pushing into the current period. At the end of a run each
    worker pushes what it has left and leaves: if n shrank with them, the last few pushes would move the anchor as far
    as those of all workers. One that comes back, to this server or to its successor, counts once. A worker with a
    weight w counts as w workers in n, and its steps as w steps each.

    Over a slow link a machine's sum may hold several periods. Differences from the anchor are averaged over all their
    steps; but movement adds up from period to period, so it is divided by the steps of one.

    State: the current period's sum, meaningless at 0 steps, its step count, and who has pushed into it.
    """

    adds_up = True

    @staticmethod
    def vectors(settings: ServerSettings) -> int:
        return 1 + vectors_kept(settings.anchor_optimizer, settings.anchor_momentum_correction)

    def __init__(self, anchor: Anchor, settings: ServerSettings):
        super().__init__(anchor, settings)
        self._pending = torch.zeros_like(anchor.vector)
        self.pending_steps = 0
        # By the worker or machine that has pushed into this period: how many steps, and its weight at the time.
        self._contributors: dict[int, tuple[int, int]] = {}

    def checks_later(self, steps: int, live: Mapping[int, int]) -> bool:
        return self.pending_steps > 0 or steps < self._period(live)

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: Mapping[int, int]) -> None:
        """Takes a sum of differences over `steps` local steps."""
        if not self.checks_later(steps, live):  # a whole period, which the server has just checked
            steps = self._averaged_over(steps, live)
            self.anchor.update(vector, steps, gradient=self._pending)
            return
        if self.pending_steps:
            self._pending.add_(vector)
        else:
            self._pending.copy_(vector)  # a new period: overwrites what the last one left behind
        self.pending_steps += steps
        before, weight = self._contributors.get(worker, (0, 0))
        self._contributors[worker] = before + steps, max(weight, live.get(worker, 0))
        self._update_if_complete(live)

    def leave(self, worker: int, live: Mapping[int, int]) -> None:
        """n shrinks, which may itself complete the period, unless that holds a push of the worker that leaves."""
        self._update_if_complete(live)

    def flush(self) -> None:
        """Ends the run with a last update from an incomplete period, if there is one.

        Its sum is divided by the steps of a whole period, not by the few in it, so that y moves by the fraction of the
        period that was seen instead of jumping to the mean of a handful of samples.
        """
        if self.pending_steps:
            self._update(max(self.pending_steps, self._period({})))

    def _period(self, live: Mapping[int, int]) -> int:
        """n tau, the length of a period in steps."""
        tau, n = self.settings.sync_steps, sum(live.values())
        for worker, (steps, weight) in self._contributors.items():
            n += max(0, min(weight, math.ceil(steps / tau)) - live.get(worker, 0))  # those that have pushed and left
        return max(1, n) * tau

    def _update_if_complete(self, live: Mapping[int, int]) -> None:
        if self.pending_steps >= self._period(live):
            self._update(self._averaged_over(self.pending_steps, live))

    def _averaged_over(self, steps: int, live: Mapping[int, int]) -> int:
        return self._period(live) if self.settings.pushes_movement else steps

    def _update(self, steps: int) -> None:
        self.pending_steps = 0
        self._contributors.clear()
        if is_finite(self._pending):
            self.anchor.update(self._pending, steps, gradient=self._pending)
        else:  # a sender was wrong about its push being finite
            logger.error("a sum of differences over %d steps was dropped: NaN or infinity", steps)

    def state_tensors(self) -> dict[str, Tensor]:
        rows = [(worker, *contributed) for worker, contributed in self._contributors.items()]
        return {
            "pending": self._pending,
            "pending_steps": torch.tensor(self.pending_steps),
            "contributors": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
        }

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        if "pending" in state:  # absent if another algorithm's server saved it
            self._pending.copy_(state["pending"])
            self.pending_steps = int(state["pending_steps"])
        if "contributors" in state:  # absent if an older server saved it
            self._contributors = {worker: (steps, weight) for worker, steps, weight in state["contributors"].tolist()}


server_half = MeanDifference
