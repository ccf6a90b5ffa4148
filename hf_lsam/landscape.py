"""The loss around the anchor: along lines to the workers, on a plane through two of them, and as LSAM smooths it.

    line     f(y + t (x_i - y)),  t from -0.5 to 1.5
    plane    f(y + a u + b v),  u and v orthonormal and spanning x_1 - y and x_2 - y
    smooth   f_LSAM(y) = -log of the integral of exp(-f(x)) N(x; y, I / lambda) dx,  lambda = lambda0 / (eta tau)

LSAM (arXiv 2509.03110): p_LSAM(y) ~ integral of p(x) K(x, y) dx with p ~ exp(-f) and a Gaussian kernel K; the anchor
climbs log p_LSAM. Two interpretations are ours: f is the loss without SAM's perturbation, and the integral is taken
only over the measured part of the plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LINE_BEGIN, LINE_END = -0.5, 1.5


@dataclass(frozen=True)
class Plane:
    """All points `origin` + a `first` + b `second`.

    Args:
        origin: the anchor, [d].
        first, second: orthonormal, [d].
    """

    origin: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def through(cls, anchor: Tensor, one: Tensor, other: Tensor) -> Plane | None:
        """The plane through the three points, each [d]; None if they lie on one line.

        `one` lies on the first axis.
        """
        first, second = one - anchor, other - anchor
        length = first.norm()
        if length == 0:
            return None
        first = first / length
        across = second - (second @ first) * first
        if across.norm() <= 1e-4 * second.norm():
            return None
        across = across - (across @ first) * first  # a second time, against rounding errors
        return cls(anchor, first, across / across.norm())

    def point(self, a: float, b: float) -> Tensor:
        """The vector [d] at the coordinates (a, b)."""
        return self.origin + a * self.first + b * self.second

    def position(self, x: Tensor) -> tuple[float, float]:
        """The coordinates of the point in the plane that is nearest to `x`, [d]."""
        offset = x - self.origin
        return (offset @ self.first).item(), (offset @ self.second).item()


def fractions(points: int) -> list[float]:
    """The values of t on a line; with 4 k + 1 points, 0 and 1 are among them."""
    return torch.linspace(LINE_BEGIN, LINE_END, points, dtype=torch.float64).tolist()


def losses_on_line(loss: Callable[[Tensor], float], anchor: Tensor, worker: Tensor, at: Sequence[float]) -> list[float]:
    """The loss at y + t (x - y) for each t.

    Args:
        loss: computes the loss at a vector [d].
        anchor, worker: y and x, [d].
        at: the values of t.
    """
    return [loss(torch.lerp(anchor, worker, t)) for t in at]


def losses_on_plane(loss: Callable[[Tensor], float], plane: Plane, coordinates: Sequence[float]) -> Tensor:
    """The loss on a square grid: row i, column j at a = coordinates[j], b = coordinates[i]; float64 [side, side]."""
    rows = [[loss(plane.point(a, b)) for a in coordinates] for b in coordinates]
    return torch.tensor(rows, dtype=torch.float64)


def smoothed(losses: Tensor, coordinates: Sequence[float], strength: float) -> Tensor:
    """f_LSAM on the grid on which f was measured: -log of the mean of exp(-f) under the kernel around each point.

    The kernel is restricted to the grid and normalised there, so at an edge half of it is missing.

    Args:
        losses: f, [side, side].
        coordinates: the coordinates of its rows and columns.
        strength: lambda, > 0; the kernel's standard deviation is 1 / sqrt(lambda).

    Returns:
        f_LSAM, float64 [side, side].
    """
    at = torch.tensor(coordinates, dtype=torch.float64)
    log_kernel = torch.log_softmax(-0.5 * strength * (at[:, None] - at[None, :]) ** 2, dim=1)
    # A loss that is not finite has probability zero. The kernel is separable, so it is applied one axis at a time.
    log_density = torch.nan_to_num(-losses.double(), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    log_density = torch.logsumexp(log_kernel[:, None, :] + log_density[None, :, :], dim=2)  # [column, row]
    return -torch.logsumexp(log_kernel[:, None, :] + log_density[None, :, :], dim=2)  # [row, column]


def half_width(reach: float, strength: float) -> float:
    """How far a grid extends from the anchor: past the workers, and to twice the kernel's standard deviation.

    But at most to six times the workers' distance, beyond which they could not be told apart from the anchor.

    Args:
        reach: the largest coordinate of a worker.
        strength: lambda; 0 if there is no kernel.
    """
    kernel = 2 / math.sqrt(strength) if strength else 0.0
    return min(max(1.5 * reach, kernel), 6 * reach)


def scan(
    loss: Callable[[Tensor], float], anchor: Tensor, workers: dict[int, Tensor], points: int, strength: float
) -> dict[str, Any]:
    """Measures lines to all workers, and the plane through the first two.

    Args:
        loss: computes the loss at a vector [d]; called points x workers + points^2 times.
        anchor: y, [d].
        workers: x of each rank, [d].
        points: number of points on a line, and on a side of the grid.
        strength: lambda = lambda0 / (eta tau); 0 for no smoothed landscape.

    Returns:
        a dict of "fractions", "lines" (losses by rank), "distances" (||x_i - y|| by rank), "strength" and "plane". The
        last is None with fewer than two workers, or if the first two and the anchor lie on one line; otherwise a dict
        of "coordinates", "losses", "smoothed" (None without a kernel), "workers" (two ranks) and their "positions".
    """
    at = fractions(points)
    lines = {str(rank): losses_on_line(loss, anchor, x, at) for rank, x in workers.items()}
    distances = {str(rank): torch.dist(x, anchor).item() for rank, x in workers.items()}
    result = {"fractions": at, "lines": lines, "distances": distances, "strength": strength, "plane": None}
    pair = list(workers)[:2]
    plane = Plane.through(anchor, *(workers[rank] for rank in pair)) if len(pair) == 2 else None
    if plane is None:
        return result
    positions = [plane.position(workers[rank]) for rank in pair]
    half = half_width(max(abs(value) for position in positions for value in position), strength)
    coordinates = torch.linspace(-half, half, points, dtype=torch.float64).tolist()
    losses = losses_on_plane(loss, plane, coordinates)
    result["plane"] = {
        "coordinates": coordinates,
        "losses": losses.tolist(),
        "smoothed": smoothed(losses, coordinates, strength).tolist() if strength else None,
        "workers": pair,
        "positions": positions,
    }
    return result
