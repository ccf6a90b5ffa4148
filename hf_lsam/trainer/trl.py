"""What LSAM has to know of trl's trainers: what their batches are made of, what they count inside the loss, and where
they load a model that is given by its name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from ..arguments import LSAMArguments

EvalCounts = dict[str, dict[str, list[Any]]]  # by the name of trl's counter and of what is counted

_COUNTERS = ("_metrics", "_total_train_tokens")
_COUNTERS_BY_MODE = ("_metrics", "_stored_metrics")  # {"train" or "eval": {name: a value for each batch}}


@contextmanager
def kept_counters(trainer: Trainer) -> Iterator[None]:
    """trl counts tokens and averages metrics inside the loss: after, they are what they were before."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


@contextmanager
def eval_counts(trainer: Trainer) -> Iterator[EvalCounts]:
    """Yields what, after, holds what trl has counted inside in evaluation mode; its counters are what they were before.

    `add_eval_counts` adds it, there or in another process.
    """
    found: EvalCounts = {}
    of_trl = _trainers_of_trl(type(trainer))
    counters = {name: vars(trainer)[name]["eval"] for name in _COUNTERS_BY_MODE if of_trl and name in vars(trainer)}
    before = {name: dict(counter) for name, counter in counters.items()}
    for counter in counters.values():
        counter.clear()
    try:
        yield found
    finally:
        for name, counter in counters.items():
            found[name] = dict(counter)
            counter.clear()
            counter.update(before[name])


def add_eval_counts(trainer: Trainer, found: EvalCounts) -> None:
    """Adds what `eval_counts` has yielded for a batch."""
    for name, counter in found.items():
        for key, values in counter.items():
            if key == "num_tokens":  # not a value for each batch, but what this worker has trained on
                vars(trainer)[name]["eval"][key] = [vars(trainer)["_total_train_tokens"]]
            else:
                vars(trainer)[name]["eval"][key].extend(values)


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


def load_on_one_device(kind: type, model: Any, args: LSAMArguments) -> None:
    """Tells a trainer of trl to load what it loads by name on the worker's device.

    trl spreads a model over all GPUs that it sees (`device_map="auto"`) unless it believes in a distributed job, which
    a worker is not. A `device_map` of the user's own stands.

    Args:
        kind: the trainer's class.
        model: as it is given to the trainer: by name, or loaded.
        args: `model_init_kwargs` is replaced.
    """
    trainers = _trainers_of_trl(kind)
    if not trainers or args.device.type in ("cpu", "mps") or not hasattr(args, "model_init_kwargs"):
        return
    by_name = isinstance(model, str) or "ref_model" in inspect.signature(trainers[0]).parameters
    if by_name:
        args.model_init_kwargs = {"device_map": {"": str(args.device)}, **(args.model_init_kwargs or {})}
