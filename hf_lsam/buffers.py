"""Buffers that a forward pass in training mode moves, other than BatchNorm's (see `batchnorm`): a codebook that follows
what it encodes, the vectors by which spectral normalisation estimates a norm.

They are state of the worker, as its random numbers are: what they belong to is the x that the batches went through, and
nothing says how those of several workers become one. So they are neither perturbed nor exchanged, and the anchor is
evaluated and saved with those of the worker that does it. Pass 2 sees weights that no step keeps: it leaves them as
pass 1 has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# (module, name in it, name in the model)
Slot = tuple[nn.Module, str, str]


def movable_buffers(model: nn.Module) -> list[Slot]:
    """The buffers that training may move: those that are saved with the model and are numbers, or a count.

    Left out are BatchNorm's, and tensors of integers, which hold quantised weights or indices.
    """
    return [
        (module, name, f"{prefix}.{name}".lstrip("."))
        for prefix, module in model.named_modules()
        if not isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
        and (buffer.is_floating_point() or (buffer.numel() == 1 and not buffer.is_quantized))
    ]


@contextmanager
def kept_buffers(slots: Sequence[Slot]) -> Iterator[None]:
    """Buffers may change inside, in place or by another tensor in theirs; after, they are what they were before."""
    kept = [(module, name, module.get_buffer(name)) for module, name, _ in slots]
    values = [buffer.clone() for _, _, buffer in kept]
    try:
        yield
    finally:
        for (module, name, buffer), value in zip(kept, values, strict=True):
            buffer.detach().copy_(value)
            module._buffers[name] = buffer


def values_of(slots: Sequence[Slot]) -> list[Tensor]:
    """Copies of the buffers as they are now."""
    return [module.get_buffer(name).clone() for module, name, _ in slots]


def moved_since(slots: Sequence[Slot], before: Sequence[Tensor]) -> list[str]:
    """The names, in the model, of the buffers that are not what `values_of` has copied."""
    return [
        full_name
        for (module, name, full_name), value in zip(slots, before, strict=True)
        if not torch.equal(module.get_buffer(name), value)
    ]
