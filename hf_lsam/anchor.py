"""The anchor y: the server's parameter vector, the model that is evaluated and saved.

It is what EASGD (arXiv 1412.6651) calls the centre variable, and DiLoCo (arXiv 2311.08105) the outer parameters.

    g' = (1 / steps) * sum over pushed steps of (y - x)
    g  = g' + beta (g' - g'_prev)
    y  = Optimizer(y, g, eta')

LSAM (arXiv 2509.03110), Algorithm 2, server part. With eta' = 1, beta = 0 and plain SGD, y becomes the mean of the
samples. The first update has no g'_prev and takes g = g'. Nesterov's rule with momentum m, in torch.optim.SGD's form:

    b = m b + g
    y = y - eta' (g + m b)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coupling import blocks

_BUFFERS = {"sgd": 0, "nesterov": 1, "adam": 2}
OPTIMIZERS = tuple(_BUFFERS)
_OF_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what torch.optim.Adam keeps


def vectors_kept(optimizer: str, momentum_correction: float) -> int:
    """How many vectors of d values an `Anchor` with these settings keeps in addition to y."""
    return _BUFFERS[optimizer] + (momentum_correction != 0)


class Anchor:
    """y, together with its correction term, its optimizer and its version.

    Args:
        vector: initial y, float32 [d]; owned and changed in place from here on.
        lr: step size. Denoted eta' in the paper.
        momentum_correction: weight of the change in the mean difference. Denoted beta in the paper.
        optimizer: "sgd", "nesterov" or "adam" (torch.optim).
        momentum: momentum of "nesterov"; first decay rate of "adam".

    Raises:
        ValueError: for any other optimizer.

    State: y, g'_prev, the optimizer's buffers and the version.
    Process: the server's (or the worker's, when it trains alone). Not thread-safe.
    """

    def __init__(
        self,
        vector: Tensor,
        lr: float = 1.0,
        momentum_correction: float = 0.0,
        optimizer: str = "sgd",
        momentum: float = 0.9,
    ):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"`anchor_optimizer` must be one of {OPTIMIZERS}, got {optimizer!r}.")
        self.vector = vector.detach()
        self.version = 0
        self._lr, self._beta = lr, momentum_correction
        self._previous: Tensor | None = None
        self._momentum = momentum if optimizer == "nesterov" else 0.0
        self._buffer: Tensor | None = None  # b
        self._adam = torch.optim.Adam([self.vector], lr, (momentum, 0.999)) if optimizer == "adam" else None

    @torch.no_grad()
    def update(self, total: Tensor, steps: int, gradient: Tensor | None = None) -> None:
        """Moves y by the differences x - y of `steps` worker steps.

        Args:
            total: their sum, float32 [d]; read, not kept.
            steps: how many worker steps the sum covers, at least 1.
            gradient: buffer that g may be written to, float32 [d]; may be `total` itself if the caller no longer needs
                it. None allocates one.
        """
        g, scale = total, -1.0 / steps  # g' is their product
        if self._beta or self._adam is not None:  # the other rules never store g: a third of the memory traffic
            g, scale = torch.mul(total, scale, out=gradient), 1.0
        if self._beta and self._previous is not None:
            self._correct(g, self._previous)
        elif self._beta:
            self._previous = g.clone()
        if self._adam is not None:
            self.vector.grad = g
            self._adam.step()
            self.vector.grad = None
        elif self._momentum:
            if self._buffer is None:
                self._buffer = torch.zeros_like(self.vector)
            nesterov_step(self.vector, self._buffer, g, scale, self._lr, self._momentum)
        else:
            self.vector.add_(g, alpha=-self._lr * scale)
        self.version += 1

    def _correct(self, gradient: Tensor, previous: Tensor) -> None:
        """g <- g' + beta (g' - g'_prev) and g'_prev <- g', in place."""
        for g, before in blocks([gradient], [previous]):
            change = torch._foreach_sub(g, before)
            torch._foreach_copy_(before, g)
            torch._foreach_add_(g, change, alpha=self._beta)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, as named tensors."""
        state = {"anchor": self.vector, "version": torch.tensor(self.version)}
        if self._previous is not None:
            state["previous_mean"] = self._previous
        if self._buffer is not None:
            state["optimizer.momentum_buffer"] = self._buffer
        if self._adam is not None:
            for name, value in self._adam.state_dict()["state"].get(0, {}).items():
                state[f"optimizer.{name}"] = value
        return state

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` returned; other tensors in `state` are ignored."""
        self.vector.copy_(state["anchor"])
        self.version = int(state["version"])
        device = self.vector.device
        previous, buffer = state.get("previous_mean"), state.get("optimizer.momentum_buffer")
        self._previous = None if previous is None else previous.to(device, copy=True)
        self._buffer = None if buffer is None or not self._momentum else buffer.to(device, copy=True)
        if self._adam is not None:
            adam = {name: state[f"optimizer.{name}"] for name in _OF_ADAM if f"optimizer.{name}" in state}
            groups = self._adam.state_dict()["param_groups"]
            self._adam.load_state_dict({"state": {0: adam} if adam else {}, "param_groups": groups})


@torch.no_grad()
def nesterov_step(y: Tensor, buffer: Tensor, gradient: Tensor, scale: float, lr: float, momentum: float) -> None:
    """b <- m b + g and y <- y - lr (g + m b) with g = scale * gradient, in place, in one pass over memory.

    Args:
        y, buffer, gradient: float32 [d]; `gradient` is only read.
    """
    for own, b, g in blocks([y], [buffer], [gradient]):
        torch._foreach_mul_(b, momentum)
        torch._foreach_add_(b, g, alpha=scale)
        torch._foreach_add_(own, g, alpha=-lr * scale)
        torch._foreach_add_(own, b, alpha=-lr * momentum)
