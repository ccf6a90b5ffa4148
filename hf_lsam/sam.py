"""The SAM gradient: perturb the parameters uphill, take the gradient there, restore them.

    g   = grad f(x)                                 pass 1
    eps = rho * g / (||g||_2 + gamma)               perturb
    s   = grad f(x + eps)                           pass 2, the gradient the optimizer steps with
    x   is put back, bit for bit                    restore

Foret et al., Sharpness-Aware Minimization (arXiv 2010.01412), equation 2. There is a single norm over all trainable
parameters. The adaptive form (ASAM, Kwon et al., arXiv 2102.11600, equation 8) measures the ball in units of the
weights, T = |x| + 0.01:  eps = rho * T^2 g / (||T g||_2 + gamma).

If the direction is known before the step, one pass is enough (`gradient_along`): either the optimizer's momentum m, as
in MSAM (Becker et al., arXiv 2401.12033: the gradient at x - rho m / ||m||, where the momentum is about to carry x), or
the reverse of the anchor's last move, as in FedLESAM (Fan et al., arXiv 2405.18890: the gradient at
x + rho (y_old - y) / ||y_old - y||).

x + eps has storage of its own; the parameter points there until `restore` points it back. Restoring is therefore exact,
whereas x + eps - eps would not be. On CPU this storage is worth keeping from step to step (`storage_for`): writing to
fresh memory takes twice the time. The gradients of pass 1 are freed before pass 2 begins. Writing x + eps into their
storage would save memory, but gradients that outlive a pass lie scattered among its activations, and glibc's malloc
then takes more time than that saves (1.03 x a step of ResNet-20 on CPU, against 1.01 x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batchnorm import frozen_statistics
from .generators import forked

ASAM_OFFSET = 0.01  # eta in the ASAM paper; without it, weights near zero would have no radius at all


def gradient(
    parameters: Sequence[Tensor],
    first_pass: Callable[[], Tensor],
    second_pass: Callable[[], Tensor],
    rho: float,
    eps: float = 1e-12,
    adaptive: bool = False,
    batchnorm: Sequence[_BatchNorm] = (),
    scaler: torch.amp.GradScaler | None = None,
    storage: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the gradient at x + eps to the parameters' `.grad`, just as a backward pass adds the gradient at x.

    Both passes draw the same dropout masks, and the generators advance as if only the second had run. Gradients that
    earlier micro-batches have accumulated are set aside during pass 1, which concerns this batch only.

    Args:
        parameters: the trainable parameters, all on one device.
        first_pass: forward and backward on the batch, or on part of it; returns the detached loss.
        second_pass: forward and backward on the whole batch; returns the detached loss.
        rho, eps, adaptive: see `perturb`.
        batchnorm: layers whose running statistics pass 2 must leave alone.
        scaler: the scaler of both passes' losses (fp16).
        storage: from `storage_for`, or None.

    Returns:
        the losses of pass 1 and pass 2, 0-d tensors on the device.
    """
    device = parameters[0].device
    accumulated = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    with forked(device):
        first_loss = first_pass()
    loss_scale = 1.0 if scaler is None else scaler.scale(torch.ones((), device=device))
    moved = perturb(parameters, rho, eps, adaptive, loss_scale, storage)
    for parameter, kept in zip(parameters, accumulated, strict=True):
        parameter.grad = kept
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()  # an autocast opened by the caller would reuse the weights it cast in pass 1
    try:
        with frozen_statistics(batchnorm):
            second_loss = second_pass()
    finally:
        restore(moved)
    return first_loss, second_loss


def gradient_along(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    single_pass: Callable[[], Tensor],
    rho: float,
    eps: float = 1e-12,
    adaptive: bool = False,
    storage: Sequence[Tensor] | None = None,
) -> Tensor:
    """Adds the gradient at x + rho u / (||u|| + eps) to the parameters' `.grad`, with a single pass.

    Args:
        parameters: the trainable parameters, all on one device.
        directions: u, one tensor per parameter; not changed.
        single_pass: forward and backward on the batch; returns the detached loss.
        rho, eps, adaptive: see `perturb`.
        storage: from `storage_for`, or None.

    Returns:
        the loss at x + eps, 0-d, on the device.
    """
    directions = [direction.clone() for direction in directions] if adaptive else list(directions)
    moved = _move_along(parameters, directions, rho, eps, adaptive, storage)
    if torch.is_autocast_enabled(parameters[0].device.type):
        torch.clear_autocast_cache()
    try:
        return single_pass()
    finally:
        restore(moved)


def storage_for(parameters: Sequence[Tensor]) -> list[Tensor] | None:
    """Memory for x + eps, one tensor per parameter, to be used again at every step; None on an accelerator, whose
    allocator keeps memory by itself."""
    return [torch.empty_like(parameter) for parameter in parameters] if parameters[0].device.type == "cpu" else None


@torch.no_grad()
def perturb(
    parameters: Iterable[Tensor],
    rho: float,
    eps: float = 1e-12,
    adaptive: bool = False,
    loss_scale: Tensor | float = 1.0,
    storage: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Moves every parameter that has a gradient to x + eps and removes the gradient.

    Nothing is read back to the host: on an accelerator the norm stays on the device. After an overflow in pass 1 (fp16)
    the perturbed parameters hold NaN, and so does the gradient of pass 2; a gradient scaler then skips the step, as it
    does without SAM.

    Args:
        parameters: the trainable parameters, with `.grad` from pass 1 (dense, of the parameters' dtype).
        rho: L2 radius of the perturbation. Denoted rho in the paper.
        eps: stabiliser in the denominator. Denoted gamma in the paper.
        adaptive: scale the radius by the magnitude of each weight (ASAM).
        loss_scale: the factor by which the loss of pass 1 was multiplied (fp16), as a number or 0-d tensor. It cancels
            in g / ||g||, so only `eps` is scaled by it.
        storage: from `storage_for(parameters)`; None allocates.

    Returns:
        (parameter, its unperturbed data) pairs, to pass to `restore`.

    Raises:
        ValueError: if a gradient is sparse.
    """
    parameters = list(parameters)
    has_gradient = [parameter.grad is not None for parameter in parameters]
    moved = list(compress(parameters, has_gradient))
    if not moved:
        return []
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    if any(gradient.is_sparse for gradient in gradients):
        raise ValueError(
            "A gradient is sparse (nn.Embedding(sparse=True)?). The perturbation is dense: it moves every weight, so "
            "sparse updates would be lost. Build the embedding with sparse=False."
        )
    storage = None if storage is None else list(compress(storage, has_gradient))
    pairs = _move_along(moved, gradients, rho, eps * loss_scale, adaptive, storage)
    for parameter in moved:
        parameter.grad = None
    return pairs


@torch.no_grad()
def _move_along(
    parameters: Sequence[Tensor],
    directions: list[Tensor],
    rho: float,
    eps: Tensor | float,
    adaptive: bool,
    storage: Sequence[Tensor] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Points the parameters at x + eps; overwrites `directions` if `adaptive`."""
    originals = [parameter.data for parameter in parameters]
    if adaptive:
        units = torch._foreach_abs(originals)
        torch._foreach_add_(units, ASAM_OFFSET)
        torch._foreach_mul_(directions, units)  # T g
    scale = rho / (nn.utils.get_total_norm(directions) + eps)
    if adaptive:
        torch._foreach_mul_(directions, units)  # T^2 g
    if originals[0].device.type == "cpu":
        perturbed = [torch.empty_like(x) for x in originals] if storage is None else list(storage)
        for x, u, out in zip(originals, directions, perturbed, strict=True):
            torch.addcmul(x, u, scale, out=out.resize_as_(x))  # as it was, unless the model resized its embeddings
    else:  # two passes over memory, but for all tensors together
        perturbed = list(torch._foreach_mul(directions, scale))
        torch._foreach_add_(perturbed, originals)
    for parameter, data in zip(parameters, perturbed, strict=True):
        parameter.data = data
    return list(zip(parameters, originals, strict=True))


def restore(saved: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Points the parameters back at the storage they had before `perturb`; their bits never changed."""
    for parameter, original in saved:
        parameter.data = original
