"""The arithmetic of servers: pushes in, anchor out; and which pushes are counted.

Pure: no socket, no clock, no process. `ServerCore` moves the anchor: in the server process, inside a worker that trains
alone, and in simulations of a cluster. `RelayCore` sums what one machine forwards to it. Both implement
`transport.in_process.Aggregator`.
"""

from __future__ import annotations

import statistics
from collections import deque

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS, ServerHalf, ServerSettings
from ..anchor import Anchor
from ..compression import round_
from ..coupling import is_finite

REMEMBERED = 4096  # processes whose last counted push is kept
RECENT_SUMS = 5  # of which a relay tells the median length
UNKNOWN_PUSHES = 2**63 - 1  # "treat all as counted": without a snapshot, nothing tells which pushes were


class ServerCore:
    """Counts the workers, refuses pushes that are not finite, and passes all others to the algorithm, which moves the
    anchor.

    n is the number of live workers: those that have joined and have neither finished nor left, on all machines if there
    are several.

    Args:
        vector: initial anchor, float32 [d]; the core takes ownership.
        settings: see `ServerSettings`.

    Attributes:
        steps_begun: steps that all workers of the run have begun; counted elsewhere, kept here for checkpoints.

    State: the anchor's, the algorithm's, and the steps begun.
    Process: one; not thread-safe.
    """

    def __init__(self, vector: Tensor, settings: ServerSettings):
        self.settings = settings
        self.anchor = Anchor(
            vector,
            settings.anchor_lr,
            settings.anchor_momentum_correction,
            settings.anchor_optimizer,
            settings.anchor_momentum,
        )
        self._algorithm: ServerHalf = ALGORITHMS[settings.algorithm].server_half(self.anchor, settings)
        self._live: dict[int, int] = {}  # worker -> 1; machine -> the number of live workers on it
        self._weights: dict[int, int] = {}  # worker -> its weight; machine -> that of its live workers together
        self.accepted_pushes = 0
        self.refused_pushes = 0
        self.steps_begun = 0

    def join(self, worker: int, weight: int = 1) -> None:
        """Counts `worker` as live; for its weight see `WorkerSettings`."""
        self._live[worker], self._weights[worker] = 1, weight

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it has pushed stays counted."""
        self._live.pop(worker, None)
        self._weights.pop(worker, None)
        self._algorithm.leave(worker, self._weights)

    def count(self, machine: int, workers: int, weight: int) -> None:
        """Counts `workers` live workers of together `weight` on `machine`, which must not be the number of a worker."""
        before = self._weights.get(machine, 0)
        self._live[machine], self._weights[machine] = workers, weight
        if weight < before:
            self._algorithm.leave(machine, self._weights)

    @property
    def live_workers(self) -> int:
        """n."""
        return sum(self._live.values())

    @torch.no_grad()
    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0, finite: bool | None = None) -> bool:
        """Takes one worker's push (see `algorithms`).

        Args:
            vector: float32 [d]; read, not kept.
            steps: how many local steps it counts as, at least 1.
            worker: the worker that pushes.
            loss: the worker's mean loss over these steps, if the algorithm uses it.
            finite: the result of `is_finite`, if the sender has checked the vector already, which saves a pass over
                memory; checked again unless the algorithm `checks_later`. None if it has not.

        Returns:
            False if a value is NaN or infinite, or if the squared norm overflows: the push is counted as refused, and
            nothing else changes.
        """
        if finite is None or (finite and not self._algorithm.checks_later(steps, self._weights)):
            finite = is_finite(vector)
        if not finite:
            self.refused_pushes += 1
            return False
        self.accepted_pushes += 1
        self._algorithm.push(vector, steps, worker, loss, self._weights)
        return True

    def flush(self) -> None:
        """Ends the run: moves the anchor by what is still pending."""
        self._algorithm.flush()

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must hold, as tensors by name."""
        steps = {"steps_begun": torch.tensor(self.steps_begun)}
        return {**self.anchor.state_tensors(), **self._algorithm.state_tensors(), **steps}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` returned."""
        self.anchor.load_state_tensors(state)
        self._algorithm.load_state_tensors(state)
        self.steps_begun = int(state["steps_begun"])


class RelayCore:
    """The relay's counterpart of `ServerCore`: sums pushes, and gives out the sum once a period is complete.

    Args:
        vector: the anchor to begin with, float32 [d]; the core takes ownership.
        settings: of the run.

    A sum that is sent in fewer than 32 bits a value is rounded, and the rounding error is added to the next sum (error
    feedback). What a run's end leaves in an incomplete period is sent unrounded; the rounding error of a complete last
    period, less than one step of its codes a value, is dropped.

    State: the sum of the current period, the sum that was forwarded and is not answered yet, the last anchor.
    Process: one; not thread-safe.
    """

    def __init__(self, vector: Tensor, settings: ServerSettings):
        self.settings = settings
        self.anchor = Anchor(vector)  # moved by `adopt` and `change` only
        self._weights: dict[int, int] = {}  # of the live workers
        self.accepted_pushes = 0
        self.refused_pushes = 0
        self.steps_begun = 0
        self.forwarded = 0
        self._sum = torch.zeros_like(vector)
        self._steps = 0
        self._under_way = torch.zeros_like(vector)
        self._steps_under_way = 0
        self._lengths: deque[float] = deque(maxlen=RECENT_SUMS)  # in steps of each worker

    def join(self, worker: int, weight: int = 1) -> None:
        """Counts `worker` as live; for its weight see `WorkerSettings`."""
        self._weights[worker] = weight

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it has pushed stays counted."""
        self._weights.pop(worker, None)

    @property
    def live_workers(self) -> int:
        """The number of live workers on this machine."""
        return len(self._weights)

    @property
    def live_weight(self) -> int:
        """The weight of the live workers together."""
        return sum(self._weights.values())

    @torch.no_grad()
    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0, finite: bool | None = None) -> bool:
        """Adds one worker's push of `steps` local steps, float32 [d]; read, not kept.

        Returns:
            False if it is not finite, as `ServerCore.push`.
        """
        # Checked even if the sender says it is finite: rounding errors go from sum to sum, and a NaN would never leave.
        if finite is False or not is_finite(vector):
            self.refused_pushes += 1
            return False
        self.accepted_pushes += 1
        self._add(vector, steps)
        return True

    @torch.no_grad()
    def claim(self, all_of_it: bool = False) -> tuple[Tensor, int, int, int] | None:
        """The sum to forward, if a period is complete and the previous sum has been answered.

        Args:
            all_of_it: forward whatever has been summed, unrounded; for the end.

        Returns:
            (sum float32 [d], which must not be written until it is answered; steps in it; its number, from 1; bits per
            value in which to send it), or None.
        """
        complete = self._steps >= max(1, self.live_weight) * self.settings.sync_steps
        if self._steps_under_way or not self._steps or not (complete or all_of_it):
            return None
        if complete and self.forwarded:  # the first found the link free, whatever that takes
            self._lengths.append(self._steps / max(1, self.live_weight))
        self._sum, self._under_way = self._under_way, self._sum
        self._steps, self._steps_under_way = 0, self._steps
        self.forwarded += 1
        bits = 32 if all_of_it else self.settings.exchange_bits
        if self.settings.exchange_bits < 32:
            round_(self._under_way, bits, rest=self._sum)
        return self._under_way, self._steps_under_way, self.forwarded, bits

    def answered(self, number: int) -> None:
        """The root server has counted, or refused, the sum that was forwarded as `number`."""
        if number == self.forwarded:
            self._steps_under_way = 0

    @torch.no_grad()
    def settle(self, last_counted: int) -> None:
        """After a reconnection: puts the sum that was under way back into the current one, unless it was counted."""
        if self._steps_under_way and last_counted < self.forwarded:
            self._add(self._under_way, self._steps_under_way)
        self._steps_under_way = 0

    @property
    def exchange_steps(self) -> int:
        """How many steps each worker makes between two sums that the link takes, at least tau: the median of the last
        `RECENT_SUMS`; 0 before there are as many."""
        return round(statistics.median(self._lengths)) if len(self._lengths) == RECENT_SUMS else 0

    @property
    def steps_left(self) -> int:
        """How many of the pushed steps have not been forwarded and answered."""
        return self._steps + self._steps_under_way

    @torch.no_grad()
    def adopt(self, vector: Tensor, version: int) -> None:
        """Takes over the root's anchor [d], unless it is older than the one held."""
        if version >= self.anchor.version:
            self.anchor.vector.copy_(vector)
            self.anchor.version = version

    @torch.no_grad()
    def change(self, difference: Tensor, version: int) -> None:
        """Adds to the anchor [d] how far the root's has moved since it was last sent here."""
        self.anchor.vector.add_(difference)
        self.anchor.version = version

    def flush(self) -> None:
        """The end of the run: nothing to do here, because the root server flushes."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The last anchor, and the steps begun. Sums are not saved."""
        return {**self.anchor.state_tensors(), "steps_begun": torch.tensor(self.steps_begun)}

    def _add(self, vector: Tensor, steps: int) -> None:
        if self._steps or self.settings.exchange_bits < 32:  # with fewer bits it begins with the last rounding error
            self._sum.add_(vector)
        else:
            self._sum.copy_(vector)
        self._steps += steps


class CountedPushes:
    """The last counted push of each process, so that none is counted twice, whichever connections are lost.

    State: (process, push) pairs of the processes that have pushed most recently.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self.unless_known = 0  # the last counted push of a process that is not known

    def last(self, process: int) -> int:
        """The number of the last counted push, for a process that joins."""
        return self._last.get(process, self.unless_known)

    def note(self, process: int, push: int, steps: int) -> None:
        """Records `push`, of `steps` local steps, as counted.

        Raises:
            ValueError: if it is replayed or out of order, or does not cover a plausible number of steps.
        """
        last = self._last.get(process, 0)
        if not 0 < steps < 2**31 or push <= last:
            raise ValueError(f"push {push} of {steps} steps after push {last}")
        self._last.pop(process, None)  # inserted again at the end: the process silent for longest is forgotten first
        self._last[process] = push
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def state_tensor(self) -> Tensor:
        """int64 [processes, 2]."""
        return torch.tensor([*self._last.items()], dtype=torch.int64).reshape(-1, 2)

    def load_state_tensor(self, state: Tensor) -> None:
        """Restores what `state_tensor` returned."""
        self._last = dict(state.tolist())
