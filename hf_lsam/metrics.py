"""What one worker measures of itself: since the last log point, and over a run."""

from __future__ import annotations

import torch
from torch import Tensor

from .worker import Worker


class WorkerMetrics:
    """Collects on the device what is read back only when it is logged.

    Args:
        worker: the worker under observation.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._sharpness = torch.zeros((), device=worker.anchor.device)
        self._perturbed_steps: set[int] = set()
        self._logged = worker.link.status  # as it was at the last log point

    def add_losses(self, first: Tensor, second: Tensor, skip_overflow: bool = False) -> None:
        """Takes the losses of pass 1 and pass 2 of one (micro-)batch; losses of one local step add up.

        Args:
            first, second: 0-d, as `sam.gradient` returns them.
            skip_overflow: count a difference that is not finite as none (a step that the fp16 scaler will skip).
        """
        difference = second - first
        if skip_overflow:
            difference = torch.nan_to_num(difference, nan=0.0, posinf=0.0, neginf=0.0)
        self._sharpness += difference
        self._perturbed_steps.add(self._worker.local_steps)

    def since_last_log(self) -> dict[str, float]:
        """What is logged beside the loss; the only place where it is read back from the device."""
        worker, link = self._worker, self._worker.link.status
        pushes, staleness = link.accepted - self._logged.accepted, link.staleness_sum - self._logged.staleness_sum
        self._logged = link
        metrics = {
            "lsam/drift": worker.drift(),
            "lsam/staleness": staleness / max(1, pushes),
            "lsam/anchor_version": worker.version,
            "lsam/skipped_pushes": worker.skipped_pushes,
            "lsam/refused_pushes": link.refused,
            "lsam/bytes_pushed": link.bytes_pushed,
            "lsam/bytes_pulled": link.bytes_pulled,
        }
        if self._perturbed_steps:
            metrics["lsam/sharpness"] = self._sharpness.item() / len(self._perturbed_steps)
            self._sharpness.zero_()
            self._perturbed_steps.clear()
        return metrics

    def of_run(self) -> dict[str, float]:
        """Totals of the run so far."""
        worker, link = self._worker, self._worker.link.status
        return {
            "steps": worker.local_steps,
            "pushes": link.accepted,
            "refused_pushes": link.refused,
            "skipped_pushes": worker.skipped_pushes,
            "bytes_pushed": link.bytes_pushed,
            "bytes_pulled": link.bytes_pulled,
            "anchor_version": worker.version,
            "staleness_mean": link.staleness_sum / max(1, link.accepted),
            "staleness_max": link.staleness_max,
            "trainable_parameters": worker.layout.numel,
        }
