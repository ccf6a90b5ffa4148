"""What a simulated run is given, beside its algorithm, and what it tells."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Given the model of a worker and its number, draws that worker's next batch and returns a closure that computes its
# loss, 0-d; it is called twice where the gradient is SAM's in two passes.
Loss = Callable[[nn.Module, int], Callable[[], Tensor]]

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Machine:
    """Where one simulated worker runs.

    Args:
        step_seconds: of one optimizer step, as virtual time.
        jitter: relative standard deviation of a step's time (log-normal, drawn from the run's seed).
        latency: seconds that a message takes to the server, and back.
        bandwidth: bytes a second in each direction; infinite on one machine.
        pauses: (from, for) pairs of virtual seconds in which it does nothing.
        joins_at: when it begins, virtual seconds.
        dies_at: when it is gone; what it has handed in stays.
    """

    step_seconds: float = 1.0
    jitter: float = 0.0
    latency: float = 0.0
    bandwidth: float = math.inf
    pauses: tuple[tuple[float, float], ...] = ()
    joins_at: float = 0.0
    dies_at: float = math.inf

    def transfer(self, size: float) -> float:
        """Seconds for one message of `size` bytes, one way."""
        return self.latency + size / self.bandwidth

    def end_of_step(self, begin: float, draw: float) -> float:
        """When a step that begins at `begin` is done; `draw` is a standard normal number."""
        end = begin + self.step_seconds * (math.exp(self.jitter * draw - self.jitter**2 / 2) if self.jitter else 1.0)
        for start, seconds in self.pauses:
            if begin <= start < end or start <= begin < start + seconds:
                end += start + seconds - max(begin, start)
        return end


@dataclass(frozen=True)
class Moment:
    """What is known of a run at one time.

    Args:
        seconds: virtual time.
        steps: optimizer steps of the worker that has made the most.
        steps_in_all: of all workers together.
        bytes: sent and received, all workers together.
        anchor: y, float32 [d].
        staleness: mean anchor versions between reading y and handing in, since the last moment.
        dispersion: root mean square distance of the workers from their mean, over ||y||.
    """

    seconds: float
    steps: int
    steps_in_all: int
    bytes: int
    anchor: Tensor
    staleness: float = 0.0
    dispersion: float = 0.0
