"""The SAM gradient: perturb the parameters uphill, take the gradient there, restore them.

    g   = grad f(x)                                 pass 1
    eps = rho * g / (||g||_2 + gamma)               perturb
    s   = grad f(x + eps)                           pass 2, the gradient the optimizer steps with
    x   is put back, bit for bit                    restore

Foret et al., Sharpness-Aware Minimization (arXiv 2010.01412), equation 2. The norm is one over all trainable
parameters. The adaptive form (ASAM, Kwon et al., arXiv 2102.11600, equation 8) measures the ball in units of the
weights, T = |x| + 0.01:  eps = rho * T^2 g / (||T g||_2 + gamma).

Perturbing costs one pass over memory and no vector beside the gradients that pass 1 leaves behind: x + eps is
written into the storage of g, and the parameter points there until `restore` points it back. Restoring is therefore
exact, which x + eps - eps is not.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ASAM_OFFSET = 0.01  # eta in the ASAM paper: keeps weights near zero from having no radius at all


@torch.no_grad()
def perturb(
    parameters: Iterable[nn.Parameter],
    rho: float,
    eps: float = 1e-12,
    adaptive: bool = False,
    loss_scale: Tensor | float = 1.0,
) -> list[tuple[nn.Parameter, Tensor]]:
    """Moves every parameter that has a gradient to x + eps and takes the gradient away.

    Nothing is read back to the host: on an accelerator the norm stays on the device. Where the norm is infinite or
    NaN (an fp16 overflow in pass 1) the perturbed parameters are NaN, and so is the gradient of pass 2: a gradient
    scaler then skips the step, as it does without SAM.

    Args:
        parameters: the trainable parameters, `.grad` filled by pass 1 (dense, the parameters' dtype).
        rho: L2 radius of the perturbation. Denoted rho in the paper.
        eps: stabiliser in the denominator. Denoted gamma in the paper.
        adaptive: scale the radius by the magnitude of each weight (ASAM).
        loss_scale: the factor that the loss of pass 1 was multiplied with (fp16), as a number or 0-d tensor. It
            cancels in g / ||g||; only `eps` has to be scaled alike.

    Returns:
        (parameter, its unperturbed data) pairs, to hand to `restore`.

    Raises:
        ValueError: if a gradient is sparse.
    """
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    if not moved:
        return []
    gradients = [parameter.grad for parameter in moved]
    if any(gradient.is_sparse for gradient in gradients):
        raise ValueError(
            "A gradient is sparse (nn.Embedding(sparse=True)?). The perturbation is dense: it moves every weight, so "
            "sparse updates would be lost. Build the embedding with sparse=False."
        )
    originals = [parameter.data for parameter in moved]
    if adaptive:
        units = torch._foreach_abs(originals)
        torch._foreach_add_(units, ASAM_OFFSET)
        torch._foreach_mul_(gradients, units)  # T g
    scale = rho / (nn.utils.get_total_norm(gradients) + eps * loss_scale)
    if adaptive:
        torch._foreach_mul_(gradients, units)  # T^2 g
    torch._foreach_mul_(gradients, scale)
    torch._foreach_add_(gradients, originals)  # the storage of g now holds x + eps
    for parameter, perturbed in zip(moved, gradients, strict=True):
        parameter.grad = None
        parameter.data = perturbed
    return list(zip(moved, originals, strict=True))


def restore(saved: Iterable[tuple[nn.Parameter, Tensor]]) -> None:
    """Points the parameters back at the storage they had before `perturb`; their bits never changed."""
    for parameter, original in saved:
        parameter.data = original
