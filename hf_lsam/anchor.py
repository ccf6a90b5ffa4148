"""The anchor y: the server's parameter vector, the model that is evaluated and saved.

    g' = (1 / steps) * sum over pushed steps of (y - x)
    g  = g' + beta (g' - g'_prev)
    y  = Optimizer(y, g, eta')

LSAM (arXiv 2509.03110), Algorithm 2, server part. With eta' = 1, beta = 0 and plain SGD, y becomes the mean of the
samples. The first update has no g'_prev and takes g = g'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coupling import blocks

OPTIMIZERS = ("sgd", "nesterov", "adam")


class Anchor:
    """y with its correction term, its optimizer and its version.

    Args:
        vector: initial y, float32 [d]; owned and changed in place from here on.
        lr: step size. Denoted eta' in the paper.
        momentum_correction: weight of the change in the mean difference. Denoted beta in the paper.
        optimizer: "sgd", "nesterov" or "adam" (torch.optim).
        momentum: momentum of "nesterov"; first decay rate of "adam".

    State: y, g'_prev, the optimizer's buffers and the version.
    Process: the server's (or the worker's own, when it is alone). Not thread-safe.
    """

    def __init__(
        self,
        vector: Tensor,
        lr: float = 1.0,
        momentum_correction: float = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.9,
    ):
        self.vector = vector.detach()
        self.version = 0
        self._beta = momentum_correction
        self._step_size = lr if optimizer == "sgd" and not momentum_correction else None
        self._previous: Tensor | None = None
        self._optimizer: torch.optim.Optimizer
        if optimizer == "adam":
            self._optimizer = torch.optim.Adam([self.vector], lr=lr, betas=(momentum, 0.999))
        elif optimizer in OPTIMIZERS:
            nesterov = optimizer == "nesterov"
            self._optimizer = torch.optim.SGD([self.vector], lr=lr, momentum=momentum * nesterov, nesterov=nesterov)
        else:
            raise ValueError(f"`anchor_optimizer` must be one of {OPTIMIZERS}, got {optimizer!r}.")

    @torch.no_grad()
    def update(self, total: Tensor, steps: int, gradient: Tensor | None = None) -> None:
        """Moves y by the differences x - y of `steps` worker steps.

        Args:
            total: their sum, float32 [d]; read, not kept.
            steps: how many worker steps the sum covers, at least 1.
            gradient: where g may be written, float32 [d]; `total` itself if that is free. None allocates it.
        """
        if self._step_size is not None:
            self.vector.add_(total, alpha=self._step_size / steps)  # a third of the memory traffic of g and a step
        else:
            gradient = torch.mul(total, -1.0 / steps, out=gradient)  # g'
            if self._beta and self._previous is not None:
                self._correct(gradient, self._previous)
            elif self._beta:
                self._previous = gradient.clone()
            self.vector.grad = gradient
            self._optimizer.step()
            self.vector.grad = None
        self.version += 1

    def _correct(self, gradient: Tensor, previous: Tensor) -> None:
        """g <- g' + beta (g' - g'_prev) and g'_prev <- g', in place."""
        for g, before in blocks([gradient], [previous]):
            change = torch._foreach_sub(g, before)
            torch._foreach_copy_(before, g)
            torch._foreach_add_(g, change, alpha=self._beta)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as tensors by name."""
        state = {"anchor": self.vector, "version": torch.tensor(self.version)}
        if self._previous is not None:
            state["previous_mean"] = self._previous
        for name, value in self._optimizer.state_dict()["state"].get(0, {}).items():
            if value is not None:
                state[f"optimizer.{name}"] = value
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave; tensors it does not know are left to the caller."""
        self.vector.copy_(state["anchor"])
        self.version = int(state["version"])
        device = self.vector.device
        previous = state.get("previous_mean")
        self._previous = None if previous is None else previous.to(device, copy=True)
        buffers = {name.removeprefix("optimizer."): t for name, t in state.items() if name.startswith("optimizer.")}
        self._optimizer.load_state_dict(
            {
                "state": {0: buffers} if buffers else {},
                "param_groups": self._optimizer.state_dict()["param_groups"],
            }
        )
