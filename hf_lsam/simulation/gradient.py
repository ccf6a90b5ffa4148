"""How a simulated step computes its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .. import sam


@dataclass(frozen=True)
class Gradient:
    """How a step's gradient is computed (see `sam`).

    Args:
        sam_rho: 0 is the plain gradient.
        sam_adaptive: ASAM.
        sam_direction: see `LSAMArguments`; "anchor" is for a `Cluster` whose workers keep the anchor's last move.
        max_grad_norm: clips the gradient that the optimizer steps with; None does not.
    """

    sam_rho: float = 0.0
    sam_adaptive: bool = False
    sam_direction: str = "gradient"
    max_grad_norm: float | None = None

    def add_to(
        self,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[], Tensor],
        batchnorm: Sequence[nn.modules.batchnorm._BatchNorm],
        directions: Sequence[Tensor] | None,
        sign: float,
    ) -> None:
        """Adds one worker's gradient, plain or SAM's, to `.grad`.

        Args:
            directions: u of a perturbation along `sign` times u that is known before the step; None while there is
                none.
        """

        def one_pass() -> Tensor:
            value = loss()
            value.backward()
            return value.detach()

        rho, adaptive = self.sam_rho, self.sam_adaptive
        if rho and self.sam_direction == "gradient":
            sam.gradient(parameters, one_pass, one_pass, rho, adaptive=adaptive, batchnorm=batchnorm)
        elif rho and directions is not None:
            sam.gradient_along(parameters, directions, one_pass, sign * rho, adaptive=adaptive)
        else:
            one_pass()

    def clip(self, parameters: Sequence[nn.Parameter]) -> None:
        """Scales `.grad` of all together to a norm of at most `max_grad_norm`; None leaves it."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)


PLAIN = Gradient()
