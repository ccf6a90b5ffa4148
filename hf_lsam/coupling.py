"""The step-by-step coupling of a worker to the anchor, the injected noise, and the bound within which both are stable.

After the optimizer's step has moved x to x', with c = lambda0 / tau,

    x = x' - c (x' - y)                     coupling (decoupled, as weight decay is in AdamW)
    D = D + (x - y)                         the worker's running sum of differences

For SGD without momentum the coupling equals eta * lambda * (x - y), lambda = lambda0 / (eta tau): the Gaussian kernel
of LSAM (arXiv 2509.03110, Theorem 1 and Algorithm 2). `coupling="score"` puts the same term inside the gradient.

Stability. With zero loss the offset e = x - y shrinks by a factor of (1 - c) per step. Over a period of tau steps, with

    a = (1 - c)^tau        b = (1/tau) sum_{k=1..tau} (1 - c)^k

and a server that steps with eta' along g = g' + beta (g' - g'_prev), g' = -b e,

    e <- a e - eta' [ b e + beta (b e - b e_prev) ]

contracts iff  eta' beta b < 1  and  eta' (1 + 2 beta) b < 1 + a.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# 2^17 float32 values: x, y, D and the difference of a block share a 2 MB L2 cache. Six passes over main memory become
# three (measured on 22.7 M parameters, 2 cores: 15 ms instead of 85).
CPU_BLOCK = 1 << 17


def blocks(*tensor_lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Cuts aligned tensor lists into groups that fit in a CPU cache; on an accelerator everything is one group.

    Args:
        tensor_lists: lists of tensors; the i-th tensors of all lists have the same shape.

    Yields:
        one list of views per tensor list, of about `CPU_BLOCK` elements in total; more if a tensor is not contiguous.
    """
    if tensor_lists[0][0].device.type != "cpu":
        yield tuple(list(tensors) for tensors in tensor_lists)
        return
    group: list[tuple[Tensor, ...]] = []
    held = 0
    for aligned in zip(*tensor_lists, strict=True):
        whole = not all(tensor.is_contiguous() for tensor in aligned)  # channels_last weights have no flat view
        flat = [aligned] if whole else zip(*(tensor.view(-1).split(CPU_BLOCK) for tensor in aligned), strict=True)
        for pieces in flat:
            group.append(pieces)
            held += pieces[0].numel()
            if held >= CPU_BLOCK:
                yield tuple(map(list, zip(*group, strict=True)))
                group, held = [], 0
    if group:
        yield tuple(map(list, zip(*group, strict=True)))


@torch.no_grad()
def is_finite(vector: Tensor) -> bool:
    """Whether `vector`, float32 [d], has no NaN or infinity, nor values so large that its squared norm overflows."""
    if vector.device.type != "cpu":
        return bool(torch.linalg.vector_norm(vector).isfinite())  # CUDA's dot product is limited to 2^31 values
    # The fastest check there is: for 22.5 M values it takes 0.6 of the time of copying them.
    return bool(torch.dot(vector, vector).isfinite())


@torch.no_grad()
def couple_and_accumulate(
    parameters: Sequence[Tensor], anchor: Sequence[Tensor], total: Sequence[Tensor], share: float
) -> None:
    """x <- x - share (x - y) and D <- D + (x - y), in place, in one pass over memory.

    Args:
        parameters: x after the optimizer's step.
        anchor: y, float32, same shapes.
        total: D, the running sum of differences, float32, same shapes.
        share: c = lambda0 / tau, a number in [0, 1]; 0 leaves x untouched, bit for bit.
    """
    for x, y, sums in blocks([p.detach() for p in parameters], anchor, total):
        difference = torch._foreach_sub(x, y)
        if share:
            torch._foreach_add_(x, difference, alpha=-share)
        torch._foreach_add_(sums, difference, alpha=1.0 - share)


@torch.no_grad()
def couple(parameters: Sequence[Tensor], anchor: Sequence[Tensor], share: float) -> None:
    """x <- x - share (x - y), in place.

    Args:
        parameters: x.
        anchor: y, float32, same shapes.
        share: c = lambda0 / tau, a number in [0, 1]; 0 leaves x untouched, bit for bit.
    """
    if share:
        for x, y in blocks([p.detach() for p in parameters], anchor):
            torch._foreach_add_(x, torch._foreach_sub(x, y), alpha=-share)


@torch.no_grad()
def exchange_elastically(
    parameters: Sequence[Tensor], anchor: Sequence[Tensor], difference: Sequence[Tensor], alpha: float
) -> None:
    """D <- x - y and x <- x - alpha D, in place: the worker's half of EASGD's symmetric move (arXiv 1412.6651, Alg. 1).

    Args:
        parameters: x.
        anchor: y, float32, same shapes.
        difference: D, float32, same shapes; overwritten.
        alpha: the moving rate, in [0, 1].
    """
    x = [parameter.detach() for parameter in parameters]
    torch._foreach_copy_(list(difference), torch._foreach_sub(x, list(anchor)))
    torch._foreach_add_(x, list(difference), alpha=-alpha)


@torch.no_grad()
def add_coupling_to_gradient(parameter: Tensor, anchor: Tensor, strength: float) -> None:
    """grad <- grad + lambda (x - y): the coupling inside the score, for SGD.

    Args:
        parameter: x; skipped if its `.grad` is None.
        anchor: y, same shape.
        strength: lambda = lambda0 / (eta tau).
    """
    if parameter.grad is not None:
        parameter.grad.add_(parameter.detach() - anchor, alpha=strength)


@torch.no_grad()
def add_langevin_noise(
    parameter: Tensor, learning_rate: float, temperature: float, generator: torch.Generator | None = None
) -> None:
    """x <- x + sqrt(2 eta T) N(0, I): stochastic gradient Langevin dynamics at temperature T (1 = exact).

    Args:
        parameter: x, changed in place.
        learning_rate: eta of this step.
        temperature: T >= 0.
        generator: source of the noise; if None, the default generator of the device.
    """
    noise = torch.empty_like(parameter).normal_(generator=generator)
    parameter.detach().add_(noise, alpha=math.sqrt(2.0 * learning_rate * temperature))


def drift_slowdown(
    coupling_strength: float, sync_steps: int, anchor_lr: float, in_score: bool = False, momentum: float = 0.0
) -> float:
    """The factor by which a coupling at every step slows workers and anchor down, in a steady drift.

    Let u be how far the optimizer alone moves a worker in a step, v how far it moves with the coupling, and D the mean
    of x - y that is pushed. The anchor moves by eta' D in tau steps, at the workers' speed: D = tau v / eta'. After the
    step, the coupling acts on D / (1 - c), c = lambda0 / tau. In the score it acts on the D of one step earlier, D - v,
    and SGD's momentum m amplifies it to L = lambda0 / (1 - m). Hence, after the step and in the score,

        u / v = 1 + lambda0 / (eta' (1 - c))        u / v = 1 + L (1 / eta' - 1 / tau)

    Args:
        coupling_strength: lambda0, below tau.
        sync_steps: tau.
        anchor_lr: eta'.
        in_score: whether the coupling is part of the gradient.
        momentum: m, of SGD.
    """
    if in_score:
        return 1.0 + coupling_strength / (1.0 - momentum) * (1.0 / anchor_lr - 1.0 / sync_steps)
    return 1.0 + coupling_strength / (anchor_lr * (1.0 - coupling_strength / sync_steps))


def period_factors(coupling_strength: float, sync_steps: int) -> tuple[float, float]:
    """(a, b): the factor by which an offset shrinks over one period, and its mean over the steps of the period."""
    keep = 1.0 - coupling_strength / sync_steps
    return keep**sync_steps, sum(keep**k for k in range(1, sync_steps + 1)) / sync_steps


def anchor_lr_bound(
    coupling_strength: float, sync_steps: int, momentum_correction: float, momentum: float = 0.0
) -> float:
    """The anchor step size below which the offset between workers and anchor contracts.

    Without server momentum this is the closed form at the top of this module. With Nesterov momentum m the recurrence
    has one more state, v <- m v + g, y <- y - eta' (g + m v), and the bound is found by bisection on its spectral
    radius.

    Args:
        coupling_strength: lambda0.
        sync_steps: tau.
        momentum_correction: beta.
        momentum: m in [0, 1).
    """
    a, b = period_factors(coupling_strength, sync_steps)
    beta = momentum_correction
    closed_form = (1.0 + a) / (b * (1.0 + 2.0 * beta))
    if beta > 0:
        closed_form = min(closed_form, 1.0 / (beta * b))
    if momentum == 0.0:
        return closed_form

    def radius(lr: float) -> float:
        # State (e, e_prev, v). The mean gradient is g = (1 + beta) h - beta h_prev with h = -b e, the direction
        # v' = m v + g, the anchor moves by -lr (g + m v'), and e' = a e + lr (g + m v').
        g = [-(1 + beta) * b, beta * b, 0.0]
        v = [g[0], g[1], momentum]
        e = [a + lr * (g[0] + momentum * v[0]), lr * (g[1] + momentum * v[1]), lr * momentum * v[2]]
        companion = torch.tensor([e, [1.0, 0.0, 0.0], v], dtype=torch.float64)
        return float(torch.linalg.eigvals(companion).abs().max())

    low, high = 0.0, closed_form
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) < 1.0 else (low, middle)
    return low
