"""Optimizers that train at one point and are evaluated at another, such as schedule-free ones, beside an anchor.

Their `eval` takes the parameters to the point of evaluation, and `train` takes them back. Both are about the worker's
own x, never about the anchor; what is pulled and pushed is x as it trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from .worker import Worker


def switch(optimizer: torch.optim.Optimizer | AcceleratedOptimizer | None, mode: Literal["train", "eval"]) -> None:
    """Takes the parameters to where `optimizer` trains or is evaluated, if it knows the difference."""
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


MOMENTUM_STATES = ("momentum_buffer", "exp_avg")  # of SGD; of Adam and those that follow it


def momentum_buffers(
    optimizer: torch.optim.Optimizer | AcceleratedOptimizer, parameters: Sequence[nn.Parameter]
) -> list[Tensor] | None:
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


def known_direction(
    kind: str, worker: Worker, optimizer: torch.optim.Optimizer | AcceleratedOptimizer
) -> tuple[list[Tensor] | None, float]:
    """Along what a step with one pass perturbs (see `sam`), and with what sign; None while there is nothing to go by.

    Args:
        kind: "momentum" or "anchor".
    """
    if kind == "momentum":
        return momentum_buffers(optimizer, worker.parameters), -1.0
    return worker.anchor_move, 1.0


@contextmanager
def showing_anchor(worker: Worker, optimizer: torch.optim.Optimizer | AcceleratedOptimizer) -> Iterator[None]:
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
