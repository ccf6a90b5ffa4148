"""The trainable parameters of a model, seen as one flat float32 vector.

Workers and server treat x and y as vectors in R^d, while a model holds a list of tensors. `ParameterLayout` is the
fixed map between the two: the order of `model.named_parameters()`, without frozen parameters, and with tied parameters
counted once. A LoRA model therefore exchanges only its adapter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

HALF_PRECISION = (torch.float16, torch.bfloat16)


@torch.no_grad()
def cast_to_float32(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> list[tuple[Tensor, torch.dtype]]:
    """Casts everything stored in half precision to float32 if any trainable parameter is; otherwise does nothing.

    Frozen parameters and buffers are cast as well, so that the dtypes within a layer do not diverge. A model with peft
    adapters is the exception: its frozen base keeps its dtype, and only the trainable parameters are cast. A frozen
    tensor of a special class also stays as it is, whatever its dtype says, because quantised weights are packed into
    such tensors. Parameters keep their identity, so tied ones stay tied, and an optimizer that holds them stays valid.

    Args:
        optimizer: an optimizer that holds the parameters already, if there is one.

    Returns:
        the tensors that were cast, with the dtypes they had.

    Raises:
        ValueError: if `optimizer` has made steps, or loaded a state, in half precision.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not any(parameter.dtype in HALF_PRECISION for parameter in trainable):
        return []
    if optimizer is not None and optimizer.state:
        raise ValueError(
            "The optimizer already has a state for half-precision parameters, which does not fit the float32 "
            "parameters that LSAM trains. Pass an optimizer that has not stepped yet, and load its state "
            "afterwards."
        )
    has_adapters = getattr(model, "peft_config", None) is not None
    tensors = trainable if has_adapters else [*model.parameters(), *model.buffers()]
    tensors = [tensor for tensor in tensors if tensor.requires_grad or type(tensor) in (Tensor, nn.Parameter)]
    cast = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in HALF_PRECISION]
    for tensor, _ in cast:
        gradient, tensor.grad = tensor.grad, None
        tensor.data = tensor.data.float()
        tensor.grad = None if gradient is None else gradient.float()
    return cast


def about_cast(cast: Sequence[tuple[Tensor, torch.dtype]]) -> str:
    """One line for the log: what `cast_to_float32` did, why, and what it costs."""
    kinds = " and ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in cast}))
    more = sum(2 * tensor.numel() for tensor, _ in cast)
    return (
        f"{len(cast)} tensors stored in {kinds} were cast to float32, which takes {more:,} bytes more: in half "
        "precision most of a SAM perturbation or of an optimizer's step is lost in rounding. The model computes in "
        "float32 too, unless under autocast (bf16=True or fp16=True), which a frozen base that stays in half precision "
        "may need."
    )


@contextmanager
def in_stored_types(cast: Sequence[tuple[Tensor, torch.dtype]]) -> Iterator[None]:
    """Inside, the tensors have the dtypes from before `cast_to_float32`; on exit they get their float32 values back.

    Costs the memory of an additional copy in half precision. May be nested.
    """
    kept = [(tensor, tensor.data) for tensor, _ in cast]
    try:
        for tensor, dtype in cast:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The named parameters with `requires_grad`, each shared tensor once, in the model's own order.

    Raises:
        ValueError: if there are none, or if one is complex, sharded, or stored in half precision or less (a SAM
            perturbation of size 1e-5 changes 0.25 % of the entries of a bfloat16 weight: the ascent step would be lost
            in rounding).
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError(
            "The model has no trainable parameter (none has requires_grad=True), so there is nothing to perturb, "
            "couple or exchange. Unfreeze some parameters, or add an adapter with peft.get_peft_model."
        )
    for name, parameter in named:
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"The parameter `{name}` is sharded (DTensor: tensor parallelism or FSDP). Every worker needs "
                "whole parameters; of a part, the norm and the differences would be wrong. Load the model "
                "without a device mesh."
            )
        if parameter.is_complex():
            raise ValueError(
                f"The trainable parameter `{name}` is complex ({parameter.dtype}). Workers exchange real vectors, so "
                "its imaginary part would be lost. Keep it as a real parameter with a last dimension of 2, and make it "
                "complex in the forward pass with torch.view_as_complex."
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The trainable parameter `{name}` is stored in {parameter.dtype}. A SAM perturbation is smaller than "
                "its rounding step, so the ascent would be lost. Load the model with dtype=torch.float32 and train "
                "with bf16=True or fp16=True (autocast), or keep the base in half precision and train a float32 "
                "LoRA adapter."
            )
    return named


def refuse_changes(model: nn.Module, since_the_start: Sequence[Tensor]) -> None:
    """Raises ValueError if the trainable parameters of `model` are no longer those it had when the run began.

    Args:
        since_the_start: the parameters of that time, from `trainable_parameters`; it may contain other tensors too.
    """
    taking_part = {id(tensor) for tensor in since_the_start}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taking_part:
            what = "has become trainable, or is another tensor than it was,"
        elif not parameter.requires_grad and id(parameter) in taking_part:
            what = "has been frozen"
        else:
            continue
        raise ValueError(
            f"The parameter `{name}` {what} since the run began. Which parameters train is fixed at the start of "
            "a run, so its gradients or its value in the anchor would be wrong. Freeze and unfreeze before "
            "training; to change it later, end this run and start another from its anchor."
        )


class ParameterLayout:
    """The order, shapes and offsets by which a list of parameters becomes one flat vector.

    Args:
        named: (name, tensor) pairs; only names, shapes and dtypes are kept.

    Attributes:
        numel: length d of the flat vector.
        manifest: one (name, shape, dtype) triple per parameter, in order; all workers must agree on it.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]]):
        self.manifest = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in named]
        self._shapes = [torch.Size(shape) for _, shape, _ in self.manifest]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.numel = sum(self._sizes)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of names, shapes and dtypes, 32 bytes; workers whose fingerprints differ cannot share an anchor."""
        return hashlib.sha256(repr(self.manifest).encode()).digest()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat` [d], one per parameter, in the parameters' shapes."""
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]

    def refuse_resized(self, tensors: Sequence[Tensor]) -> None:
        """Raises ValueError if a tensor no longer has the size it had when the run began."""
        for (name, shape, _), size, tensor in zip(self.manifest, self._sizes, tensors, strict=True):
            if tensor.numel() != size:
                raise ValueError(
                    f"The parameter `{name}` was {shape} when the run began and is {list(tensor.shape)} now. The "
                    "anchor, the other workers and the optimizer's state have no room for the new entries. "
                    "Resize (`resize_token_embeddings`) before training, to the same size in every worker; to "
                    "resize later, end this run and start another from its anchor."
                )

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor], out: Tensor) -> Tensor:
        """Copies the parameters into `out` [d] and returns it; refuses resized ones."""
        self.refuse_resized(tensors)
        torch._foreach_copy_(self.views(out), [tensor.detach() for tensor in tensors])
        return out

    @torch.no_grad()
    def write(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copies `flat` [d] into the parameters, in place."""
        torch._foreach_copy_([tensor.detach() for tensor in tensors], self.views(flat))


def first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """Describes the first entry in which two manifests differ, for the error that a refused worker prints."""
    for mine, other in zip(ours, theirs, strict=False):
        if list(mine) != list(other):
            return f"`{mine[0]}` {mine[1]} {mine[2]} here, `{other[0]}` {other[1]} {other[2]} there"
    return f"{len(ours)} trainable parameters here, {len(theirs)} there"


def data_parallel_bytes(steps_per_worker: Sequence[int], trainable_parameters: int) -> int:
    """Bytes that data-parallel training sends and receives for the same number of steps, summed over all workers.

    In a ring all-reduce of d float32 gradients among n workers, each sends 2 (n - 1) / n * 4 d bytes per step and
    receives as many. Data-parallel SAM reduces only the second gradient, so it exchanges no more than SGD.
    """
    workers = max(1, len(steps_per_worker))
    return 2 * sum(steps_per_worker) * 2 * (workers - 1) * 4 * trainable_parameters // workers
