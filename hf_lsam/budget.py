"""The steps of a run, shared by its workers: whoever is faster makes more of them, and all end together.

Without it each worker makes its own number of steps, and a run ends with the slowest. With it, n workers make n *
max_steps steps together. A worker counts a step before it makes it, so that no more are made than there are: on one
machine up to the steps that two workers begin at the same moment, between machines up to what has not crossed yet.
A worker that dies leaves the rest to the others, and one that joins takes its part of it.
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
        max_steps: what each worker would make if all were equally fast; the length of the learning rate's schedule.
        num_workers: n; the run has n * max_steps steps.

    Attributes:
        position: where the run stood when this worker began its last step, in steps of the schedule: n steps of the run
            are one of the schedule. `max_steps` once all are begun.
        is_spent: whether this worker has asked for a step and there was none left.

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
        """By all workers; those under way are among them."""
        return self._link.steps_begun

    def begin_step(self) -> bool:
        """Takes one step of those that are left; False if there is none."""
        begun = self._link.steps_begun
        self.is_spent = begun >= self.total
        self.position = min(begun // self._num_workers, self._max_steps)
        if not self.is_spent:
            self._link.begin_step()
        return not self.is_spent


class RunSchedule:
    """A learning rate schedule that follows the run instead of the worker's own steps, so that all rates end together.

    Args:
        scheduler: any of torch's that steps by number.
        position: which of its steps the run has come to; never falls.

    All but `step` is the scheduler's own.
    """

    def __init__(self, scheduler: LRScheduler, position: Callable[[], int]):
        self._scheduler, self._position = scheduler, position

    def step(self) -> None:
        """To be called once a step: makes as many steps of the scheduler as the run has gone on by, also none."""
        while self._scheduler.last_epoch < self._position():
            self._scheduler.step()

    def catch_up(self) -> None:
        """The worker joins a run that goes on, and has made no step of its own."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)
