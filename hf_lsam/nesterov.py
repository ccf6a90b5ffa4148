"""AdamW with Nesterov momentum on its steps instead of momentum on its gradients. This is the rule by which the anchor
moves (see `anchor`), for use in a worker or in any training loop.

u = AdamW's step with beta1 = 0
b = beta1 b + u
x = x - (1 - beta1) (u + beta1 b)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .anchor import nesterov_step


class NesterovAdamW(torch.optim.AdamW):
    """AdamW with Nesterov's rule; see the module.

    The learning rate means the same as AdamW's: a steady gradient moves x equally far. Under LSAM each worker keeps
    this momentum, even if `LSAMArguments.momentum_at` is not set; "anchor" is refused.

    Args:
        params: parameters, or groups of them.
        betas: the momentum, and AdamW's second decay rate.
        keywords: AdamW's other arguments.

    State per parameter: AdamW's, with b in place of the mean gradient (`exp_avg`). While it steps, it also holds a copy
    of all parameters.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), **keywords: Any
    ) -> None:
        super().__init__(params, lr, betas, **keywords)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        momentum, beta2 = param_group.get("betas", self.defaults["betas"])
        super().add_param_group({**param_group, "betas": (0.0, beta2), "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Updates all parameters that have a gradient; returns the loss if a `closure` computes it.

        Raises:
            ValueError: if something has set betas[0] of a group, for which `momentum` takes over here.
        """
        if any(group["betas"][0] for group in self.param_groups):
            raise ValueError(
                "NesterovAdamW keeps its momentum in each group's 'momentum', but betas[0] has been set as well, "
                "so the gradient would be averaged twice. Schedule 'momentum' instead (OneCycleLR: "
                "cycle_momentum=False)."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group["momentum"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter, _ in moved]
        buffers = []
        for parameter, _ in moved:
            state = self.state[parameter]
            buffers.append(state["exp_avg"] if state else torch.zeros_like(parameter))
            if state:
                state["exp_avg"] = parameter.grad  # what AdamW with beta1 = 0 would hold there
        super().step()
        for (parameter, momentum), start, buffer in zip(moved, before, buffers, strict=True):
            step = start - parameter
            nesterov_step(parameter.copy_(start), buffer, step, 1.0, 1 - momentum, momentum)
            self.state[parameter]["exp_avg"] = buffer
        return loss
