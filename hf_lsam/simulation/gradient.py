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
        sam_rho: L2 radius of the perturbation; 0 for the plain gradient.
        sam_adaptive: whether to use ASAM.
        sam_direction: see `LSAMArguments`; "anchor" needs a `Cluster` whose workers keep the anchor's last move.
        max_grad_norm: clip the gradient that the optimizer steps with to this norm; None does not clip.
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
    ) -> Tensor:
        """Adds one worker's gradient, plain or SAM's, to `.grad`.

        Args:
            directions: u, if the step perturbs along a direction that is known in advance, sign * u; None while there
                is none.
            sign: 1 or -1.

        Returns:
            the loss, 0-d: at x if SAM takes two passes, otherwise that of the single pass.
        """

        def one_pass() -> Tensor:
            value = loss()
            value.backward()
            return value.detach()

        rho, adaptive = self.sam_rho, self.sam_adaptive
        if rho and self.sam_direction == "gradient":
            return sam.gradient(parameters, one_pass, one_pass, rho, adaptive=adaptive, batchnorm=batchnorm)[0]
        if rho and directions is not None:
            return sam.gradient_along(parameters, directions, one_pass, sign * rho, adaptive=adaptive)
        return one_pass()

    def clip(self, parameters: Sequence[nn.Parameter]) -> None:
        """Scales the `.grad` of all parameters together to a norm of at most `max_grad_norm`, unless that is None."""
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)


PLAIN = Gradient()
