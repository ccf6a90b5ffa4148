"""The optimizer's learning rates, raised while it steps.

Schedulers, logs and checkpoints keep the rate that the user asked for.
"""

from __future__ import annotations

import torch


class RaisedRates:
    """Multiplies the learning rate of every parameter group between `raise_` and `restore`.

    Args:
        optimizer: any torch optimizer.
        factor: see `LSAMArguments.learning_rate_factor`; 1 changes nothing.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float):
        self.factor = factor
        self._optimizer = optimizer
        self._rates: list[float] = []

    def raise_(self) -> None:
        """Call right before the optimizer steps."""
        if self.factor != 1.0:
            self._rates = [group["lr"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor

    def restore(self) -> None:
        """Call once the step has been made."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []


def momentum_coefficient(optimizer: torch.optim.Optimizer) -> float:
    """Of SGD; 0 for all others."""
    return float(optimizer.param_groups[0].get("momentum", 0.0))
