"""The steps of a run, shared by its workers: faster workers take more of them, and all finish together.

Without this, each worker takes a fixed number of steps, and the run ends when the slowest has. With it, n workers take
n * max_steps steps in total. A worker counts a step before it takes it, so that the total is not exceeded, except by
steps that two workers of a machine begin at the same moment, and by counts that have not crossed between machines yet.
A worker that dies leaves its remaining share to the others, and one that joins takes part of what is left.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from .transport.base import Link


class StepBudget:
    """One worker's view of the run's steps.

    Args:
        link: counts the steps that all workers have begun.
        max_steps: the steps that each worker would take if all were equally fast; the length of the learning rate
            schedule.
        num_workers: n; the run has n * max_steps steps.

    Attributes:
        position: where the run stood when this worker began its last step, in steps of the schedule (n steps of the run
            are one step of the schedule). `max_steps` once all steps have begun.
        is_spent: whether this worker has asked for a step when none was left.

    Process: the training thread; never waits.
    """

    def __init__(self, link: Link, max_steps: int, num_workers: int):
        self._link, self._max_steps, self._num_workers = link, max_steps, num_workers
        self.position = 0
        self.is_spent = False

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self._max_steps * self._num_workers

    @property
    def steps_begun(self) -> int:
        """Steps that all workers have begun, including those in progress."""
        return self._link.steps_begun

    def begin_step(self) -> None:
        """Claims one of the remaining steps; sets `is_spent` if there is none."""
        begun = self._link.steps_begun
        self.is_spent = begun >= self.total
        self.position = min(begun // self._num_workers, self._max_steps)
        if not self.is_spent:
            self._link.begin_step()


class RunSchedule:
    """A learning rate schedule that follows the run instead of the worker's own steps, so that all rates end together.

    Args:
        scheduler: any torch scheduler that is stepped without arguments.
        position: returns the step of the schedule that the run has reached; never decreases.

    Everything except `step` is delegated to the scheduler.
    """

    def __init__(self, scheduler: LRScheduler, position: Callable[[], int]):
        self._scheduler, self._position = scheduler, position

    def step(self) -> None:
        """Call once per step: advances the scheduler by as many steps as the run has advanced, which may be none."""
        while self._scheduler.last_epoch < self._position():
            self._scheduler.step()

    def catch_up(self) -> None:
        """Advances the scheduler to where the run stands, for a worker that joins late and has taken no step itself."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
