"""What LSAM has to know of trl's trainers: what their batches are made of, and what they count inside the loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer

_COUNTERS = ("_metrics", "_total_train_tokens")


@contextmanager
def kept_counters(trainer: Trainer) -> Iterator[None]:
    """trl counts tokens and averages metrics inside the loss: after, they are what they were before."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def _trainers_of_trl(kind: type) -> list[type]:
    """The trainers of trl that `kind` is one of, the most derived first."""
    return [c for c in kind.__mro__ if c.__module__.startswith("trl.") and c.__name__.endswith("Trainer")]


def stacks_rows(kind: type) -> str | None:
    """The trl trainer whose batches are not of rows that each stand alone, if `kind` is one: all but SFTTrainer."""
    names = [c.__name__ for c in _trainers_of_trl(kind)]
    return names[0] if names and names[0] != "SFTTrainer" else None


def makes_its_batches(kind: type) -> str | None:
    """The trl trainer whose step makes or changes the batch that it is given, if `kind` is one.

    The others leave `_prepare_inputs` to Trainer, and hand what `training_step` gets on without naming it.
    """
    trainers = _trainers_of_trl(kind)
    for trainer in trainers:
        step = vars(trainer).get("training_step")
        names_inputs = step is not None and "inputs" in inspect.signature(step).parameters
        if names_inputs or "_prepare_inputs" in vars(trainer):
            return trainers[0].__name__
    return None
