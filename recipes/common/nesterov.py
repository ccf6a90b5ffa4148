"""AdamW whose momentum acts on the steps, by the anchor's rule: LSAM's `momentum_at="anchor"` without its workers.

u = AdamW's step with beta1 = 0, as a worker makes it
b = beta1 b - u
x = x - (1 - beta1) (beta1 b - u)
"""

from __future__ import annotations

import torch

from hf_lsam.anchor import nesterov_step
from hf_lsam.optimizers import LONGEST_BETA2


class NesterovAdamW(torch.optim.AdamW):
    """See the module; the arguments are those of torch's AdamW, and beta1 is the momentum."""

    def __init__(self, params, *, betas: tuple[float, float] = (0.9, 0.999), **keywords):
        super().__init__(params, betas=(0.0, min(betas[1], LONGEST_BETA2)), **keywords)
        for group in self.param_groups:
            group["momentum"] = betas[0]

    @torch.no_grad()
    def step(self, closure=None):
        moved = [(p, group["momentum"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [parameter.clone() for parameter, _ in moved]
        loss = super().step(closure)
        for (parameter, momentum), start in zip(moved, before, strict=True):
            step = parameter - start
            buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
            nesterov_step(parameter.copy_(start), buffer, step, -1.0, 1 - momentum, momentum)
        return loss
