"""What a run of a recipe shows as it goes, and the time of its steps."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import TrainerCallback

from hf_lsam.record import is_metric
from recipes.common.progress import Progress


class StepProgress(TrainerCallback):
    """A progress bar of worker 0's steps, and one line per evaluation."""

    def __init__(self):
        self._bar: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar, self._seen = Progress(state.max_steps, "steps"), 0

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.advance(state.global_step - self._seen)
        self._seen = state.global_step

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        said = (f"{key} {value:.4f}" for key, value in metrics.items() if is_metric(key, value))
        line = f"step {state.global_step}: {', '.join(said)}"
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.say(line)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()
        self._bar = None


class StepTimer(TrainerCallback):
    """Measures each step from its beginning to its end; on a GPU without synchronising.

    Attributes:
        resumed_at: the steps that had been made before training began, in a run that was resumed; otherwise 0.
        logged_before: the entries that the log had then.
    """

    def __init__(self):
        self._steps: list[tuple[Any, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed_at, self.logged_before = state.global_step, len(state.log_history)

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append((self._begin, self._now(args.device)))

    def median(self) -> float:
        """The median step, in seconds; 0 where no step was made: a run that had ended was resumed."""
        seconds = [
            end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000 for begin, end in self._steps
        ]
        return statistics.median(seconds) if seconds else 0.0

    def _now(self, device: torch.device):
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
