"""A worker's own metrics, since the last log point or entry of the record, and over the whole run."""

from __future__ import annotations

import torch
from torch import Tensor

from .transport.base import LinkStatus
from .worker import Worker

# Of a `LinkStatus`, what is summed over the parts of a run that was resumed; of the last, the largest.
_EXCHANGED = ("accepted", "refused", "bytes_pushed", "bytes_pulled", "staleness_sum", "staleness_max")


class WorkerMetrics:
    """Accumulates values on the device, which are read back only when they are logged.

    Args:
        worker: the worker under observation.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._sharpness = torch.zeros((), device=worker.anchor.device)
        self._perturbed_steps, self._last_perturbed = 0, -1  # how many since the last log point, and the newest
        self._logged = self._recorded = worker.link.status  # at the last log point, and at the last entry
        self._loss = torch.zeros((), device=worker.anchor.device)  # summed since the last entry
        self._loss_from = worker.local_steps
        self._before_resuming = [0] * len(_EXCHANGED)

    def add_losses(self, first: Tensor, second: Tensor, share: float, skip_overflow: bool = False) -> None:
        """Takes the losses of pass 1 and pass 2 of one (micro-)batch; those of the same local step are summed.

        Args:
            first, second: 0-d, as returned by `sam.gradient`.
            share: the share of the step's loss that they make up.
            skip_overflow: count a difference that is not finite as 0 (the fp16 scaler will skip that step).
        """
        difference = second - first
        if skip_overflow:
            difference = torch.nan_to_num(difference, nan=0.0, posinf=0.0, neginf=0.0)
        self._sharpness.add_(difference, alpha=share)
        if self._last_perturbed != self._worker.local_steps:  # its first micro-batch
            self._perturbed_steps, self._last_perturbed = self._perturbed_steps + 1, self._worker.local_steps

    def since_last_log(self) -> dict[str, float]:
        """The metrics to log alongside the loss; reads drift and sharpness back from the device."""
        metrics = {"lsam/drift": self._worker.drift(), **self._exchanged_since(self._logged)}
        self._logged = self._worker.link.status
        if self._perturbed_steps:
            metrics["lsam/sharpness"] = self._sharpness.item() / self._perturbed_steps
            self._sharpness.zero_()
            self._perturbed_steps, self._last_perturbed = 0, -1
        return metrics

    def add_loss(self, loss: Tensor, share: float) -> None:
        """Takes the loss of one (micro-)batch, 0-d, which makes up `share` of the step's loss."""
        self._loss.add_(loss, alpha=share)

    @property
    def steps_since_last_entry(self) -> int:
        """The number of local steps whose losses are not in the record yet."""
        return self._worker.local_steps - self._loss_from

    def since_last_entry(self) -> dict[str, float]:
        """An entry of the record between log points: what the host knows, and the mean loss, read from the device."""
        metrics = {"loss": self._loss.item() / self.steps_since_last_entry, **self._exchanged_since(self._recorded)}
        self.entry_was_made()
        return metrics

    def entry_was_made(self) -> None:
        """Starts collecting for the next entry of the record."""
        self._loss.zero_()
        self._loss_from, self._recorded = self._worker.local_steps, self._worker.link.status

    def _exchanged_since(self, before: LinkStatus) -> dict[str, float]:
        worker, link = self._worker, self._worker.link.status
        exchange_steps = worker.link.exchange_steps
        pushes, staleness = link.accepted - before.accepted, link.staleness_sum - before.staleness_sum
        return {
            "lsam/staleness": staleness / max(1, pushes),
            "lsam/anchor_version": worker.version,
            "lsam/skipped_pushes": worker.skipped_pushes,
            "lsam/refused_pushes": link.refused,
            "lsam/bytes_pushed": link.bytes_pushed,
            "lsam/bytes_pulled": link.bytes_pulled,
            "lsam/bytes_between_machines": worker.link.bytes_between_machines,
            **({"lsam/exchange_steps": exchange_steps} if exchange_steps else {}),
        }

    def exchanged(self) -> Tensor:
        """What this worker has exchanged, also before the run was resumed: int64, in the order of `_EXCHANGED`."""
        *sums, largest = (getattr(self._worker.link.status, name) for name in _EXCHANGED)
        *sums_before, largest_before = self._before_resuming
        totals = [total + before for total, before in zip(sums, sums_before, strict=True)]
        return torch.tensor([*totals, max(largest, largest_before)])

    def resume(self, exchanged: Tensor) -> None:
        """Counts on from what `exchanged` gave before the run was resumed; the steps made before are in the record."""
        self._before_resuming = exchanged.tolist()
        self.entry_was_made()

    def of_run(self) -> dict[str, float]:
        """Totals of the run so far, also of its steps before it was resumed."""
        worker, (accepted, refused, pushed, pulled, staleness, stalest) = self._worker, self.exchanged().tolist()
        return {
            "steps": worker.local_steps,
            "pushes": accepted,
            "refused_pushes": refused,
            "skipped_pushes": worker.skipped_pushes,
            "bytes_pushed": pushed,
            "bytes_pulled": pulled,
            "bytes_between_machines": worker.link.bytes_between_machines,
            "anchor_version": worker.version,
            "staleness_mean": staleness / max(1, accepted),
            "staleness_max": stalest,
            "trainable_parameters": worker.layout.numel,
        }
