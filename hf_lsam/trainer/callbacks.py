"""A worker's hooks in Trainer's loop, and how worker 0's trackers receive what the other workers log."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy

from ..record import Tail, worker_file
from ..session import Session
from ..transport.base import ServerGone
from .checkpoints import Checkpoints

logger = logging.getLogger(__name__)

_COUNT_THEIR_OWN_STEPS = ("dvclive",)


class OtherWorkers:
    """What the other workers log, for worker 0's trackers: one run there shows all workers.

    It is read from the record (see `record`), so nobody waits for the others. A worker on another machine is seen only
    if `output_dir` is shared.

    Args:
        output_dir: the run's folder.
        num_workers: n.
    """

    def __init__(self, output_dir: Path, num_workers: int):
        self._tails = {rank: Tail(worker_file(output_dir, rank)) for rank in range(1, num_workers)}
        # Entries that are there now belong to an earlier run: no worker begins before this one, which has yet to join.
        for _ in self._new_entries():
            pass

    def _new_entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for rank, tail in self._tails.items():
            try:
                yield from ((rank, entry) for entry in tail.new_entries())
            except OSError as error:
                logger.warning("worker %d is not reported to the trackers: %s", rank, error)

    def report(
        self,
        trackers: Sequence[TrainerCallback],
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
    ) -> None:
        """Gives each tracker the new entries, as `worker_<rank>/loss` and so on, at that worker's own steps."""
        for rank, entry in self._new_entries():
            if "loss" not in entry or entry.get("between_logs"):
                continue
            metrics = {f"worker_{rank}/{name}": entry[name] for name in entry if name not in ("time", "step")}
            then = copy.copy(state)
            then.global_step = entry["step"]
            for tracker in trackers:
                tracker.on_log(args, then, control, logs=metrics)


def trackers_among(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """The callbacks that send metrics to TensorBoard, Weights & Biases, ... under the step that they are given."""
    known = tuple(kind for name, kind in INTEGRATION_TO_CALLBACK.items() if name not in _COUNT_THEIR_OWN_STEPS)
    return [callback for callback in callbacks if isinstance(callback, known)]


class LSAMCallback(TrainerCallback):
    """Passes Trainer's events to the session. Added by `LSAMTrainerMixin`, after all other callbacks.

    Attributes:
        steps_before_epoch: optimizer steps when the epoch began.
        server_gone: the error with which the run ends once a checkpoint is saved, or None.
        others: the other workers, at worker 0 of several; else None.
    """

    def __init__(self, trainer: Checkpoints, session: Session):
        self.steps_before_epoch = 0
        self.server_gone: ServerGone | None = None
        self.others: OtherWorkers | None = None
        self._trainer, self._session = trainer, session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.server_gone = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.steps_before_epoch = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._session.hooks.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self._session.after_optimizer_step()
        except ServerGone as error:  # raised again once the step has ended and a checkpoint is saved
            self.server_gone = error
        if not self._session.steps_are_left:
            state.max_steps = state.global_step + 1  # this step, not counted yet: Trainer ends as after its last one

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._leave_evaluation_to_worker_0(args, control)
        self._show_steps_of_all()
        if self._ends_early:
            self._save_and_stop(state, control)
        elif self._session.joined_worker.link.status.stop_requested:
            control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer logs its summary after all workers have finished, so everything that they have written gets reported.
        if self.others is not None:
            self.others.report(trackers_among(self._trainer.callback_handler.callbacks), args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._leave_evaluation_to_worker_0(args, control)
        if self._ends_early:  # Trainer ends the epoch all the same, and its strategies may ask for more
            self._save_and_stop(state, control)

    @property
    def _ends_early(self) -> bool:
        link, signals = self._session.joined_worker.link.status, self._session.signals
        return link.save_requested or self.server_gone is not None or signals.received is not None

    def _show_steps_of_all(self) -> None:
        """Where workers share their steps, sets Trainer's bar, which is as long as the run, to where that stands."""
        if (budget := self._session.budget) is None:
            return
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.update(budget.steps_begun - callback.training_bar.n)

    def _save_and_stop(self, state: TrainerState, control: TrainerControl) -> None:
        control.should_training_stop = True
        control.should_evaluate = False
        control.should_save = self._trainer.sealed_step != state.global_step

    def _leave_evaluation_to_worker_0(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self._session.arguments.identity.rank != 0:
            # Worker 0 may save what it evaluates as the best so far; the others' states of that time must be saved too.
            control.should_save |= control.should_evaluate and args.save_strategy == SaveStrategy.BEST
            control.should_evaluate = False
