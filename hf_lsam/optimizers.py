"""A worker's optimizer: what happens around its steps, and its training and evaluation modes.

Some optimizers, such as schedule-free ones, train at one point and are evaluated at another. Their `eval` moves the
parameters to the point of evaluation, and `train` moves them back. Both concern the worker's own x, never the anchor;
what is coupled and pushed is the x of training mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .worker import Worker


class StepHooks:
    """What a worker does right before and right after its optimizer steps.

    In between, the learning rates are multiplied by `factor`, and the optimizer has no momentum if that belongs to the
    anchor. Schedulers, logs and checkpoints keep the values that the user has set.

    If a gradient scaler (fp16) skips a step, x does not move, and the step is not counted.

    Args:
        optimizer: any torch optimizer, or one that Accelerate has prepared.
        worker: the worker whose parameters it steps; a parameter in no parameter group has learning rate 0.
        factor: see `LSAMArguments.learning_rate_factor`; 1 changes nothing.
        shared_momentum: the optimizer's momentum (see `momentum_of`), if it belongs to the anchor in this run; with 0
            the optimizer keeps its own.
    """

    def __init__(self, optimizer: Optimizer, worker: Worker, factor: float = 1.0, shared_momentum: float = 0.0):
        self.factor, self._shared_momentum = factor, shared_momentum
        self._optimizer, self._worker = optimizer, worker
        scaler = getattr(optimizer, "scaler", None)  # of an optimizer that Accelerate has prepared
        self._scaler = scaler if isinstance(scaler, torch.amp.GradScaler) else None
        groups = enumerate(optimizer.param_groups)
        group_of = {id(parameter): number for number, group in groups for parameter in group["params"]}
        # Indices, because loading a state replaces the group objects.
        self._group_numbers = [group_of.get(id(parameter)) for parameter in worker.parameters]
        self._kept: list[dict[str, Any]] = []  # per group, the original values of what is changed during a step
        self._scale_before: Tensor | None = None

    def learning_rates(self) -> list[float]:
        """The current learning rate of each of the worker's parameters, in their order."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        return [0.0 if number is None else rates[number] for number in self._group_numbers]

    def before_step(self) -> None:
        """Call when the gradients are final and the optimizer is about to step.

        Raises:
            ValueError: if the momentum belongs to the anchor, and the optimizer's has changed since the run began.
        """
        shared = self._shared_momentum
        for group in self._optimizer.param_groups if shared else ():
            if _momentum_in(group) != shared:
                raise ValueError(
                    f"The optimizer's momentum was {shared:g} when the run began and is {_momentum_in(group):g} "
                    "now. The anchor took it over when the run began, so workers would step with the wrong "
                    "learning rate. Keep it constant (a OneCycleLR needs cycle_momentum=False), or set "
                    "momentum_at='worker'."
                )
        if self.factor != 1.0 or shared:
            self._kept = []
            for group in self._optimizer.param_groups:
                change = {"lr": group["lr"] * self.factor, **(_without_momentum(group) if shared else {})}
                self._kept.append({key: group[key] for key in change})
                group.update(change)
        self._worker.before_optimizer_step(self.learning_rates())
        self._scale_before = self._loss_scale()

    def after_step(self) -> None:
        """Call when the optimizer has stepped. With a gradient scaler, waits for the device.

        Raises:
            ServerGone: if the server has been gone for longer than `server_timeout`; the optimizer's own values are
                restored first.
        """
        try:
            if not self._was_skipped():
                self._worker.after_optimizer_step(self.learning_rates())
        finally:
            for group, kept in zip(self._optimizer.param_groups, self._kept, strict=False):
                group.update(kept)
            self._kept = []
            if self._worker.fell_back:
                self._optimizer.state.clear()  # it stems from gradients that led nowhere
                self._worker.fell_back = False

    def _loss_scale(self) -> Tensor | None:
        """The gradient scaler's current factor, 0-d, on the device; None without a scaler."""
        if self._scaler is None:
            return None
        return self._scaler.scale(torch.ones((), device=self._worker.parameters[0].device))

    def _was_skipped(self) -> bool:
        """Whether the gradients overflowed, so that the last step has changed nothing."""
        if getattr(self._optimizer, "step_was_skipped", False):  # Accelerate has noticed
            return True
        # It does not notice if a fused optimizer skips: that is called all the same, and its kernel does nothing.
        scale = self._loss_scale()
        return scale is not None and self._scale_before is not None and bool(scale < self._scale_before)


_ADAM = re.compile(r"(Paged)?AdamW?(\d+bit|Fp8)?")  # those of torch, bitsandbytes and torchao


def momentum_of(optimizer: Optimizer) -> float:
    """The momentum per step of an optimizer from which it can be removed: the momentum of SGD without dampening, or the
    first decay rate of Adam and AdamW. 0 for all others, and if parameter groups differ in it."""
    groups = optimizer.param_groups
    is_adam = _ADAM.fullmatch(type(getattr(optimizer, "optimizer", optimizer)).__name__)
    if not is_adam and not all(group.get("dampening") == 0 for group in groups):
        return 0.0
    first, *others = map(_momentum_in, groups)
    return first if all(other == first for other in others) else 0.0


def _momentum_in(group: dict[str, Any]) -> float:
    return float(group["momentum"] if "dampening" in group else group["betas"][0])


LONGEST_BETA2 = 0.99  # the largest beta2 of an Adam without momentum


def _without_momentum(group: dict[str, Any]) -> dict[str, Any]:
    """The values with which a group of an optimizer that `momentum_of` knows steps along its gradient alone.

    A suddenly large gradient moves Adam by up to (1 - beta1) / sqrt(1 - beta2) times the learning rate: 3 times with
    0.9 and 0.999, 32 times without beta1, and 10 times with LONGEST_BETA2.
    """
    return {"momentum": 0.0} if "dampening" in group else {"betas": (0.0, min(group["betas"][1], LONGEST_BETA2))}


def normalises_steps(optimizer: Optimizer) -> bool:
    """Whether the length of a step does not scale with the gradient, as with Adam and its kind, recognised by their
    betas."""
    return not optimizer.param_groups[0].keys().isdisjoint(("betas", "beta1"))


def switch(optimizer: Optimizer | None, mode: Literal["train", "eval"]) -> None:
    """Moves the parameters to where `optimizer` trains or is evaluated, if it makes that distinction."""
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


MOMENTUM_STATES = ("momentum_buffer", "exp_avg")  # of SGD; of Adam and its kind


def momentum_buffers(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """The running mean or sum of gradients of each parameter; None before the first step.

    Raises:
        ValueError: if the optimizer has stepped and keeps neither.
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
    """The direction in which a step with a single pass perturbs (see `sam`), and its sign; None while there is none.

    Args:
        kind: `LSAMArguments.sam_direction`; for "gradient" the direction is not known in advance, so it is None.
    """
    if kind == "momentum":
        return momentum_buffers(optimizer, worker.parameters), -1.0
    return (worker.anchor_move, 1.0) if kind == "anchor" else (None, 1.0)


@contextmanager
def showing_anchor(worker: Worker, optimizer: Optimizer) -> Iterator[None]:
    """Inside, the model holds y; on exit it holds x again, with the optimizer in training mode. May be nested.

    Inside, the optimizer is already in evaluation mode, so switching it to that mode moves nothing.
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
                # If it was switched to training inside, that moved y, and x has yet to be moved: by the last switch,
                # which does so only from evaluation mode.
                switch(optimizer, "eval")
    finally:
        switch(optimizer, "train")
