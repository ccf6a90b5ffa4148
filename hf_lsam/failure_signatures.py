"""Signs in a run's logged metrics that it is going wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


class FailureSignatures:
    """Recognises failing runs by their logged metrics; each signature is reported once, with its remedy.

    Args:
        num_workers: n.
    """

    # (points, factor, pace): drift must have grown at each of `points` log points, every one at a newer anchor; by more
    # than `factor` overall; and in the later half by more than `pace` times what it grew in the earlier half, since
    # drift that is levelling off slows down.
    DRIFT_WINDOWS = ((6, 2.0, 0.0), (12, 1.4, 0.5))
    STALENESS_FACTOR = 4.0  # mean staleness that is suspicious, in anchor versions per worker
    SLOW_LINK = 2  # exchanges that take this many times sync_steps

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._seen: list[tuple[float, float]] = []  # (drift, drift per learning rate) at different anchors
        self._seen_version = 0
        self._reported: set[str] = set()

    def observe(self, drift: float, staleness: float, anchor_version: int, learning_rate: float) -> list[str]:
        """The warnings that one log point triggers.

        Args:
            drift: ||x - y|| / ||y||.
            staleness: mean number of anchor versions between reading y and pushing differences to it.
            anchor_version: version of the anchor that the drift is measured from. While the anchor stays the same, a
                worker moves away from it as it should, so only log points at different anchors are compared.
            learning_rate: used to ignore drift that only grows with the learning rate (warm-up).
        """
        if anchor_version > self._seen_version:
            self._seen_version = anchor_version
            longest = max(points for points, _, _ in self.DRIFT_WINDOWS)
            self._seen = [*self._seen, (drift, drift / max(learning_rate, 1e-30))][-longest:]
        growing = any(
            len(self._seen) >= points
            and all(_keeps_growing(series, factor, pace) for series in zip(*self._seen[-points:], strict=True))
            for points, factor, pace in self.DRIFT_WINDOWS
        )
        warnings = []
        if not math.isfinite(drift) or growing:
            warnings.append(
                self._once(
                    "drift",
                    f"the distance to the anchor keeps growing (lsam/drift {drift:.3g}): the workers are falling "
                    "apart. Lower the learning rate (or set scale_learning_rate=False) or sync_steps; raise "
                    "coupling_strength if it is below 1.",
                )
            )
        if staleness > self.STALENESS_FACTOR * self._num_workers:
            warnings.append(
                self._once(
                    "staleness",
                    f"this worker's pushes are {staleness:.1f} anchor versions old on average, with "
                    f"{self._num_workers} workers: it is far slower than the others, and what it hands in draws the "
                    "anchor back. Give it a smaller batch, or raise sync_steps.",
                )
            )
        return [warning for warning in warnings if warning]

    def slow_link(self, exchange_steps: int, sync_steps: int) -> str | None:
        """The warning that the anchor's momentum does not fit the link; None if already given, or if it does.

        Args:
            exchange_steps: steps between two exchanges with other machines; 0 if that is not known.
            sync_steps: steps for which the anchor has its momentum.
        """
        if exchange_steps < self.SLOW_LINK * sync_steps:
            return None
        return self._once(
            "link",
            f"the link to the other machines takes {exchange_steps} steps for an exchange, and sync_steps is "
            f"{sync_steps}, for which the anchor's momentum and the workers' learning rate are made: the run learns "
            f"more slowly than it could. Start it on all machines with sync_steps={exchange_steps}.",
        )

    def batchnorm_not_reestimated(self) -> str | None:
        """The warning that the anchor is shown with the statistics of other weights; None if already given."""
        return self._once(
            "batchnorm",
            "the anchor is evaluated or saved with BatchNorm statistics of a worker's own weights "
            "(batchnorm_statistics='worker', or no batches given or left): its accuracy will look worse than it is. Use"
            " batchnorm_statistics='reestimate', with 32 batches or more.",
        )

    def buffers_of_a_worker(self, names: Sequence[str]) -> str | None:
        """The warning that the anchor is shown with a worker's buffers; None if already given, or without `names`.

        Args:
            names: the buffers, other than BatchNorm's, that training updates.
        """
        if not names:
            return None
        shown = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        return self._once(
            "buffers",
            f"training moves the buffers {shown}, and they are neither parameters nor BatchNorm's: workers do not "
            "exchange them, and the anchor is evaluated and saved with those of the worker that does it, which belong "
            "to its own weights. To fit them to the anchor, pass training batches through the model in training mode "
            "after training, and then save it.",
        )

    def _once(self, signature: str, warning: str) -> str | None:
        if signature in self._reported:
            return None
        self._reported.add(signature)
        return warning


def _keeps_growing(series: Sequence[float], factor: float, pace: float) -> bool:
    first, middle, last = series[0], series[len(series) // 2], series[-1]
    rises = all(later > earlier for earlier, later in pairwise(series))
    return rises and last > factor * first and last - middle > pace * (middle - first)
