"""What LSAM has to know about trl's trainers: what their batches are made of, what they count inside the loss, and
where they load a model that is given by name."""

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
    """Restores, after the `with` block, the token counts and metrics that trl updates inside the loss."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


@contextmanager
def eval_counts(trainer: Trainer) -> Iterator[EvalCounts]:
    """Yields a dict that, after the `with` block, holds what trl counted inside it in evaluation mode. trl's own
    counters are restored.

    `add_eval_counts` adds the dict to the counters, in this process or another.
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
    """Adds to trl's counters what `eval_counts` has yielded for a batch."""
    for name, counter in found.items():
        for key, values in counter.items():
            if key == "num_tokens":  # not a value per batch, but the tokens that this worker has trained on
                vars(trainer)[name]["eval"][key] = [vars(trainer)["_total_train_tokens"]]
            else:
                vars(trainer)[name]["eval"][key].extend(values)


def _trainers_of_trl(kind: type) -> list[type]:
    """The trl trainers among the base classes of `kind` and itself, the most derived first."""
    return [c for c in kind.__mro__ if c.__module__.startswith("trl.") and c.__name__.endswith("Trainer")]


def stacks_rows(kind: type) -> str | None:
    """The trl trainer that `kind` is one of, if its batches' rows do not each stand alone: any but SFTTrainer."""
    names = [c.__name__ for c in _trainers_of_trl(kind)]
    return names[0] if names and names[0] != "SFTTrainer" else None


def makes_its_batches(kind: type) -> str | None:
    """The trl trainer that `kind` is one of, if its step makes or changes the batch that it is given.

    The others leave `_prepare_inputs` to Trainer, and pass on the arguments of `training_step` without naming them.
    """
    trainers = _trainers_of_trl(kind)
    for trainer in trainers:
        step = vars(trainer).get("training_step")
        names_inputs = step is not None and "inputs" in inspect.signature(step).parameters
        if names_inputs or "_prepare_inputs" in vars(trainer):
            return trainers[0].__name__
    return None


def load_on_one_device(kind: type, model: Any, args: LSAMArguments) -> None:
    """Makes a trl trainer load the models that it loads by name on the worker's device.

    trl spreads a model over all visible GPUs (`device_map="auto"`) unless it finds itself in a distributed job, which a
    worker is not. A `device_map` of the user's own is kept.

    Args:
        kind: the trainer's class.
        model: as given to the trainer: a name, or a loaded model.
        args: the trainer's arguments; their `model_init_kwargs` is replaced.
    """
    trainers = _trainers_of_trl(kind)
    if not trainers or args.device.type in ("cpu", "mps") or not hasattr(args, "model_init_kwargs"):
        return
    by_name = isinstance(model, str) or "ref_model" in inspect.signature(trainers[0]).parameters
    if by_name:
        args.model_init_kwargs = {"device_map": {"": str(args.device)}, **(args.model_init_kwargs or {})}
