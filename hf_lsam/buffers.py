"""Buffers, other than BatchNorm's (see `batchnorm`), that a forward pass in training mode updates, such as a codebook
that follows what it encodes, or the vectors with which spectral normalisation estimates a norm.

Like the random state, they belong to the worker: they depend on the x that the batches went through, and there is no
general way to combine those of several workers. They are therefore neither perturbed nor exchanged, and the anchor is
evaluated and saved with the buffers of the worker that does so. Pass 2 runs at weights that no step keeps, so it leaves
the buffers as they were after pass 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# (module, the buffer's name in the module, its name in the model)
Slot = tuple[nn.Module, str, str]


def movable_buffers(model: nn.Module) -> list[Slot]:
    """The buffers that training may update: those saved with the model that are floating point, or a single count.

    BatchNorm's are left out, and so are tensors of several integers, which hold quantised weights or indices.
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
    """Inside, buffers may change, in place or by assigning another tensor; on exit they are restored."""
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
    """The names, in the model, of the buffers that differ from `before`, which `values_of` returned."""
    return [
        full_name
        for (module, name, full_name), value in zip(slots, before, strict=True)
        if not torch.equal(module.get_buffer(name), value)
    ]
