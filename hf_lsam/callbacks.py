"""Where the worker meets Trainer's loop, and what it warns of."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK

from .record import Tail, worker_file
from .transport.base import ServerGone

if TYPE_CHECKING:
    from .trainer import LSAMTrainerMixin

logger = logging.getLogger(__name__)

_COUNT_THEIR_OWN_STEPS = ("dvclive",)


class FailureSignatures:
    """Recognises runs that go wrong from what they log; each signature is reported once, with its remedy.

    Args:
        num_workers: n.
    """

    # Log points, each at a newer anchor, over which drift must have grown at each one; by which factor in all; and by
    # how much in the later half, of what it grew in the earlier one: on the way to a level it slows down.
    DRIFT_WINDOWS = ((6, 2.0, 0.0), (12, 1.4, 0.5))
    STALENESS_FACTOR = 4.0  # mean staleness above this many anchor versions a worker

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._seen: list[tuple[float, float]] = []  # (drift, drift per learning rate) at different anchors
        self._seen_version = 0
        self._reported: set[str] = set()

    def observe(self, drift: float, staleness: float, anchor_version: int, learning_rate: float) -> list[str]:
        """The warnings that one log point gives rise to.

        Args:
            drift: ||x - y|| / ||y||.
            staleness: mean anchor versions between reading y and handing in differences to it.
            anchor_version: of the anchor that the drift is measured from. Around one anchor a worker moves away from it
                as it should, so only log points at different anchors are compared.
            learning_rate: drift that grows as the learning rate does (warm-up) is no signature.
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
                    "apart. Raise coupling_strength, or lower sync_steps or the learning rate.",
                )
            )
        if staleness > self.STALENESS_FACTOR * self._num_workers:
            warnings.append(
                self._once(
                    "staleness",
                    f"this worker's pushes are {staleness:.1f} anchor versions old on average, with "
                    f"{self._num_workers} workers: it is far slower than the others, and what it hands in pulls the "
                    "anchor back. Give it a smaller batch, or raise sync_steps.",
                )
            )
        return [warning for warning in warnings if warning]

    def batchnorm_not_reestimated(self) -> str | None:
        return self._once(
            "batchnorm",
            "the anchor is evaluated or saved with BatchNorm statistics of a worker's own weights "
            "(batchnorm_statistics='worker', or no batches given): its accuracy will look worse than it is. Use"
            " batchnorm_statistics='reestimate', with 32 batches or more.",
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


class OtherWorkers:
    """What the others log, for worker 0's trackers: one run there shows all workers.

    The others' figures are read from the record (see `record`), so nobody waits for them; a worker on another machine
    is seen where `output_dir` is shared.

    Args:
        output_dir: the run's folder.
        num_workers: n.
    """

    def __init__(self, output_dir: Path, num_workers: int):
        self._since = time.time()  # what stands there from a run before is not this one's
        self._tails = {rank: Tail(worker_file(output_dir, rank)) for rank in range(1, num_workers)}

    def tell(self, trackers: Sequence[TrainerCallback], args, state, control) -> None:
        """Gives each tracker what is new, as `worker_<rank>/loss` and so on, at the steps of that worker."""
        for rank, tail in self._tails.items():
            try:
                entries = tail.new_entries()
            except OSError as error:
                logger.warning("worker %d is not reported to the trackers: %s", rank, error)
                continue
            for entry in entries:
                if "loss" not in entry or entry["time"] < self._since:
                    continue
                figures = {f"worker_{rank}/{name}": entry[name] for name in entry if name not in ("time", "step")}
                then = copy.copy(state)
                then.global_step = entry["step"]
                for tracker in trackers:
                    tracker.on_log(args, then, control, logs=figures)


def trackers_among(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Those that send figures to TensorBoard, Weights & Biases, ... under the step that they are given."""
    known = tuple(kind for name, kind in INTEGRATION_TO_CALLBACK.items() if name not in _COUNT_THEIR_OWN_STEPS)
    return [callback for callback in callbacks if isinstance(callback, known)]


class LSAMCallback(TrainerCallback):
    """Hands Trainer's events to the worker. Added by `LSAMTrainerMixin`, after all other callbacks."""

    def __init__(self, trainer: LSAMTrainerMixin):
        self._trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer.steps_before_epoch = state.global_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._trainer.rates.raise_()
        self._trainer.worker.before_optimizer_step(self._trainer.learning_rates())

    def on_optimizer_step(self, args, state, control, **kwargs):
        # A step that the gradient scaler has skipped is no step: x has not moved.
        trainer = self._trainer
        if not trainer.accelerator.optimizer_step_was_skipped:
            try:
                trainer.worker.after_optimizer_step(trainer.learning_rates())
            except ServerGone as error:  # raised again once the step has ended and a checkpoint is saved
                trainer.server_gone = error
        trainer.rates.restore()
        if trainer.worker.fell_back:
            trainer.optimizer.state.clear()  # of gradients that led nowhere
            trainer.worker.fell_back = False

    def on_step_end(self, args, state, control, **kwargs):
        self._leave_evaluation_to_worker_0(control)
        if self._trainer.must_end:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False
        elif self._trainer.worker.link.status.stop_requested:
            control.should_training_stop = True

    def on_log(self, args, state, control, **kwargs):
        # Trainer's summary is logged once all workers have finished: by then all that they have written is told.
        if self._trainer.others is not None:
            self._trainer.others.tell(trackers_among(self._trainer.callback_handler.callbacks), args, state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._leave_evaluation_to_worker_0(control)

    def _leave_evaluation_to_worker_0(self, control):
        if self._trainer.args.identity.rank != 0:
            control.should_evaluate = False
