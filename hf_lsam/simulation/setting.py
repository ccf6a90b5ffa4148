"""What a simulated run takes in addition to its algorithm, and what it yields."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

# Takes a worker's model and number, draws that worker's next batch, and returns a closure that computes its loss, 0-d.
# The closure is called twice if the gradient is SAM's with two passes.
Loss = Callable[[nn.Module, int], Callable[[], Tensor]]

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class Machine:
    """Where one simulated worker runs.

    Args:
        step_seconds: virtual time of one optimizer step, in seconds.
        jitter: relative standard deviation of a step's time (log-normal, drawn from the run's seed).
        latency: seconds that a message takes to the server, and the same on the way back.
        bandwidth: bytes per second in each direction; infinite within a machine.
        pauses: (start, duration) pairs of virtual seconds during which it does nothing.
        joins_at: virtual time at which it joins, in seconds.
        dies_at: virtual time at which it dies, in seconds; what it has pushed stays.
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
        """The time at which a step that begins at `begin` ends; `draw` is a standard normal number."""
        end = begin + self.step_seconds * (math.exp(self.jitter * draw - self.jitter**2 / 2) if self.jitter else 1.0)
        for start, seconds in self.pauses:
            if begin <= start < end or start <= begin < start + seconds:
                end += start + seconds - max(begin, start)
        return end


@dataclass(frozen=True)
class Moment:
    """A snapshot of a run.

    Args:
        seconds: virtual time.
        steps: optimizer steps of the worker that has made the most.
        steps_in_all: optimizer steps of all workers together.
        bytes: bytes sent and received by all workers together.
        anchor: y, float32 [d].
        staleness: mean number of anchor versions between reading y and pushing, since the last moment.
        dispersion: root mean square distance of the workers from their mean, divided by ||y||.
    """

    seconds: float
    steps: int
    steps_in_all: int
    bytes: int
    anchor: Tensor
    staleness: float = 0.0
    dispersion: float = 0.0
