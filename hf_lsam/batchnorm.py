"""BatchNorm's running statistics under SAM and at the anchor.

Pass 2 sees the perturbed weights, so its batch statistics must not enter the running ones. And no batch ever passes
through the anchor: the running statistics that a worker has collected belong to its own x. Either they are re-estimated
at y from training batches before the anchor is evaluated or saved, or the workers exchange them like parameters and the
anchor gets their average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def tracking_layers(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of `model` that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    ]


STATISTICS = ("reestimate", "average", "worker")


def running_statistics(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, buffer) pairs of the running means and variances, float32, which workers exchange in order to average."""
    return [
        (f"{name}.{buffer}", getattr(layer, buffer))
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.track_running_stats and layer.running_mean is not None
        for buffer in ("running_mean", "running_var")
    ]


@contextmanager
def frozen_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside, the layers normalise by the batch as in training, but leave their running statistics alone.

    Momentum 0 would not be enough: the layer would still count the batch in `num_batches_tracked`.
    """
    layers = list(layers)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def kept_statistics(layers: Iterable[_BatchNorm]) -> Iterator[None]:
    """Inside, running statistics may change; on exit they are restored."""
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextmanager
def normalising_by_the_batch(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Inside, everything is in evaluation mode except the BatchNorm layers that training updates, which it yields.

    A layer that the model's own `train()` keeps in evaluation mode is frozen: its statistics belong to the model, as
    its weights do. If the model is already in training mode, each layer's own mode decides.
    """
    modes = [(module, module.training) for module in model.modules()]
    if not model.training:
        model.train()
    layers = [layer for layer in tracking_layers(model) if layer.training]
    model.eval()
    for layer in layers:
        layer.train()
    try:
        yield layers
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any], forward: Callable[[object], object]) -> bool:
    """Replaces the running statistics by the average over `batches` at the current weights; frozen layers keep theirs,
    and so do all if there are no batches.

    Meanwhile everything except the BatchNorm layers is in evaluation mode, so dropout does not blur the statistics.

    Args:
        model: already holding the anchor.
        batches: training batches, in any form that `forward` takes.
        forward: runs the model on one batch; its result is discarded.

    Returns:
        whether the statistics are those of the current weights: False if there were no batches.
    """
    with normalising_by_the_batch(model) as layers:
        if not layers:
            return True
        momenta = [layer.momentum for layer in layers]
        count = 0
        try:
            for count, batch in enumerate(batches, 1):
                if count == 1:
                    for layer in layers:
                        layer.reset_running_stats()
                        layer.momentum = None  # cumulative average
                forward(batch)
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    return count > 0


def keep_variances_positive(layers: Iterable[_BatchNorm]) -> None:
    """Clamps averaged variances at zero: the anchor's momentum or its correction may make them negative, and their root
    NaN."""
    for layer in layers:
        assert layer.running_var is not None  # `tracking_layers` returns no others
        layer.running_var.clamp_(min=0.0)
