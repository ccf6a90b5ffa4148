"""A worker's optimizer: what happens around its steps, and where it trains.

Some train at one point and are evaluated at another, such as schedule-free ones. Their `eval` takes the parameters to
the point of evaluation, and `train` takes them back. Both are about the worker's own x, never about the anchor; what is
coupled and pushed is x as it trains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from .worker import Worker


class StepHooks:
    """What a worker does right before and right after its optimizer steps.

    Meanwhile the learning rates are multiplied by `factor`, and the optimizer has no momentum if that is the anchor's:
    schedulers, logs and checkpoints keep what the user asked for.

    Args:
        optimizer: any torch optimizer, or one that Accelerate has prepared.
        worker: whose parameters it steps; one that is in no parameter group has the learning rate 0.
        factor: see `LSAMArguments.learning_rate_factor`; 1 changes nothing.
        shared_momentum: the optimizer's (see `momentum_of`) that is the anchor's in this run; 0 leaves it its own.
    """

    def __init__(self, optimizer: Optimizer, worker: Worker, factor: float = 1.0, shared_momentum: float = 0.0):
        self.factor, self._shared_momentum = factor, shared_momentum
        self._optimizer, self._worker = optimizer, worker
        groups = enumerate(optimizer.param_groups)
        group_of = {id(parameter): number for number, group in groups for parameter in group["params"]}
        # Numbers, because loading a state puts other groups in their place.
        self._group_numbers = [group_of.get(id(parameter)) for parameter in worker.parameters]
        self._kept: list[dict[str, Any]] = []  # what is another while a step is made, a group

    def learning_rates(self) -> list[float]:
        """Of each of the worker's parameters now, in their order."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        return [0.0 if number is None else rates[number] for number in self._group_numbers]

    def before_step(self) -> None:
        """The gradients are those that the optimizer is about to step with.

        Raises:
            ValueError: if its momentum is another than it was when the run began, where that is the anchor's.
        """
        shared = self._shared_momentum
        if self.factor != 1.0 or shared:
            self._kept = []
            for group in self._optimizer.param_groups:
                if shared and _momentum_in(group) != shared:
                    raise ValueError(
                        f"The optimizer's momentum was {shared:g} when the run began, and is {_momentum_in(group):g} "
                        "now: the anchor took it over then and keeps it, so workers would step with the wrong learning "
                        "rate. Leave it as it is (a OneCycleLR needs cycle_momentum=False), or set "
                        "momentum_at='worker'."
                    )
                change = {"lr": group["lr"] * self.factor, **(_without_momentum(group) if shared else {})}
                self._kept.append({key: group[key] for key in change})
                group.update(change)
        self._worker.before_optimizer_step(self.learning_rates())

    def after_step(self, skipped: bool = False) -> None:
        """The optimizer has stepped.

        Args:
            skipped: that a gradient scaler has left the step out: it is no step, x has not moved.

        Raises:
            ServerGone: if the server has been gone for longer than `server_timeout`; what was changed is put back.
        """
        try:
            if not skipped:
                self._worker.after_optimizer_step(self.learning_rates())
        finally:
            for group, kept in zip(self._optimizer.param_groups, self._kept, strict=False):
                group.update(kept)
            self._kept = []
            if self._worker.fell_back:
                self._optimizer.state.clear()  # of gradients that led nowhere
                self._worker.fell_back = False


_ADAM = re.compile(r"(Paged)?AdamW?(\d+bit|Fp8)?")  # those of torch, bitsandbytes and torchao


def momentum_of(optimizer: Optimizer) -> float:
    """What an optimizer keeps of its direction from one step to the next, where that can be taken from it: the momentum
    of SGD, the first decay rate of Adam and AdamW. 0 for all others, and where parameter groups differ in it."""
    groups = optimizer.param_groups
    is_adam = _ADAM.fullmatch(type(getattr(optimizer, "optimizer", optimizer)).__name__)
    if not is_adam and not all(group.get("dampening") == 0 for group in groups):
        return 0.0
    first, *others = map(_momentum_in, groups)
    return first if all(other == first for other in others) else 0.0


def _momentum_in(group: dict[str, Any]) -> float:
    return float(group["momentum"] if "dampening" in group else group["betas"][0])


LONGEST_BETA2 = 0.99  # of an Adam without momentum


def _without_momentum(group: dict[str, Any]) -> dict[str, Any]:
    """What makes a group of an optimizer that `momentum_of` knows step along its gradient alone.

    A gradient that is suddenly large moves Adam by up to (1 - beta1) / sqrt(1 - beta2) of the learning rate: by 3 with
    0.9 and 0.999, by 32 without beta1, and by 10 with the beta2 that is the longest here.
    """
    return {"momentum": 0.0} if "dampening" in group else {"betas": (0.0, min(group["betas"][1], LONGEST_BETA2))}


def normalises_steps(optimizer: Optimizer) -> bool:
    """Whether the length of a step does not follow that of the gradient: Adam and its kind, known by their betas."""
    return not optimizer.param_groups[0].keys().isdisjoint(("betas", "beta1"))


def switch(optimizer: Optimizer | None, mode: Literal["train", "eval"]) -> None:
    """Takes the parameters to where `optimizer` trains or is evaluated, if it knows the difference."""
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


MOMENTUM_STATES = ("momentum_buffer", "exp_avg")  # of SGD; of Adam and those that follow it


def momentum_buffers(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """The running mean or sum of gradients of each parameter; None before the first step.

    Raises:
        ValueError: if the optimizer has made a step and keeps none.
    """
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]
    if not all(states):
        return None
    for name in MOMENTUM_STATES:
        if all(state.get(name) is not None for state in states):
            return [state[name] for state in states]
    raise ValueError(
        f"sam_direction='momentum' perturbs along the optimizer's momentum, and "
        f"{type(getattr(optimizer, 'optimizer', optimizer)).__name__} keeps none: every step would be a plain one. Use "
        "SGD with momentum or an Adam, or sam_direction='gradient' or 'anchor'."
    )


def known_direction(kind: str, worker: Worker, optimizer: Optimizer) -> tuple[list[Tensor] | None, float]:
    """Along what a step with one pass perturbs (see `sam`), and with what sign; None while there is nothing to go by.

    Args:
        kind: `LSAMArguments.sam_direction`; that of "gradient" is not known.
    """
    if kind == "momentum":
        return momentum_buffers(optimizer, worker.parameters), -1.0
    return (worker.anchor_move, 1.0) if kind == "anchor" else (None, 1.0)


@contextmanager
def showing_anchor(worker: Worker, optimizer: Optimizer) -> Iterator[None]:
    """The model holds y inside and x again after, as it trains; may be nested.

    Inside, the optimizer is in its mode for evaluation already: what switches it there moves nothing.
    """
    if worker.shows_anchor:
        yield
        return
    switch(optimizer, "eval")
    try:
        with worker.showing_anchor():
            try:
                yield
            finally:
                switch(optimizer, "eval")  # who has switched it to training inside has moved y, and x has yet to follow
    finally:
        switch(optimizer, "train")
