"""The arithmetic of servers: pushes in, anchor out; and which pushes are counted.

Pure: no socket, no clock, no process. `ServerCore` moves the anchor: in the server process, inside a worker that is
alone, and in simulations of a cluster. `RelayCore` adds up what one machine forwards to it. Both are what
`transport.in_process.Aggregator` asks for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithms import ALGORITHMS, ServerHalf, ServerSettings
from ..anchor import Anchor
from ..compression import round_
from ..coupling import is_finite

REMEMBERED = 4096  # processes whose last counted push is kept
UNKNOWN_PUSHES = 2**63 - 1  # "consider all counted": without a snapshot none can be told from one that was


class ServerCore:
    """Counts the workers, refuses what is not finite, and hands all else to the algorithm that moves the anchor.

    n counts the workers that are live: joined, and neither finished nor gone; on all machines, if there are several.

    Args:
        vector: initial anchor, float32 [d]; owned from here on.
        settings: see `ServerSettings`.

    Attributes:
        steps_begun: of all workers of the run; counted elsewhere, kept here for checkpoints.

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
        self.live: dict[int, int] = {}  # worker -> 1; a machine -> the workers that are live on it
        self.accepted_pushes = 0
        self.refused_pushes = 0
        self.steps_begun = 0

    def join(self, worker: int) -> None:
        """Counts `worker` as live."""
        self.live[worker] = 1

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it pushed stays."""
        gone = self.live.pop(worker, 0)
        self._algorithm.leave(worker, gone, self.live_workers)

    def count(self, machine: int, workers: int) -> None:
        """Counts `workers` live workers on `machine`, a number that no worker has."""
        gone, self.live[machine] = self.live.get(machine, 0) - workers, workers
        if gone > 0:
            self._algorithm.leave(machine, gone, self.live_workers)

    @property
    def live_workers(self) -> int:
        """n."""
        return sum(self.live.values())

    @torch.no_grad()
    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0, finite: bool | None = None) -> bool:
        """Takes what one worker hands in (see `algorithms`).

        Args:
            vector: float32 [d]; read, not kept.
            steps: how many local steps it covers, at least 1.
            worker: who hands it in.
            loss: the worker's mean loss over these steps, where the algorithm asks for it.
            finite: what `is_finite` says of it, where who hands it in has asked, which saves a sweep over memory.

        Returns:
            False if a value is NaN or infinite, or so large that the squared norm is: the push is refused and
            counted, nothing else changes.
        """
        if finite is None or (finite and not self._algorithm.adds_up):
            finite = is_finite(vector)
        if not finite:
            self.refused_pushes += 1
            return False
        self.accepted_pushes += 1
        self._algorithm.push(vector, steps, worker, loss, self.live_workers)
        return True

    def flush(self) -> None:
        """Ends the run: the anchor takes what is still pending."""
        self._algorithm.flush()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, as tensors by name."""
        steps = {"steps_begun": torch.tensor(self.steps_begun)}
        return {**self.anchor.state_tensors(), **self._algorithm.state_tensors(), **steps}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave."""
        self.anchor.load_state_tensors(state)
        self._algorithm.load_state_tensors(state)
        self.steps_begun = int(state["steps_begun"])


class RelayCore:
    """What `ServerCore` is to the global server: sums go in, and come out again once a period is complete.

    Args:
        vector: the anchor to begin with, float32 [d]; owned from here on.
        settings: of the run.

    A sum in fewer than 32 bits is rounded, and what that leaves behind goes out with the next; the last is exact.

    State: the sum of the period under way, the sum that was forwarded and has no answer yet, the last anchor.
    Process: one; not thread-safe.
    """

    def __init__(self, vector: Tensor, settings: ServerSettings):
        self.settings = settings
        self.anchor = Anchor(vector)  # moved by `adopt` and `change` only
        self._live: set[int] = set()
        self.accepted_pushes = 0
        self.refused_pushes = 0
        self.steps_begun = 0
        self.forwarded = 0
        self._sum = torch.zeros_like(vector)
        self._steps = 0
        self._under_way = torch.zeros_like(vector)
        self._steps_under_way = 0
        self._holds_rest = False  # the sum holds what rounding has left of those before

    def join(self, worker: int) -> None:
        """Counts `worker` as live."""
        self._live.add(worker)

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it pushed stays."""
        self._live.discard(worker)

    @property
    def live_workers(self) -> int:
        """n of this machine."""
        return len(self._live)

    @torch.no_grad()
    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0, finite: bool | None = None) -> bool:
        """Adds the sum of x - y over `steps` local steps of one worker, float32 [d]; read, not kept.

        Returns:
            False if it is not finite, as `ServerCore.push`.
        """
        # Nobody's word is taken: what rounding leaves of a sum goes into the next, and NaN would never leave it.
        if finite is False or not is_finite(vector):
            self.refused_pushes += 1
            return False
        self.accepted_pushes += 1
        self._add(vector, steps)
        return True

    @torch.no_grad()
    def claim(self, all_of_it: bool = False) -> tuple[Tensor, int, int, int] | None:
        """The sum to forward, if a period is complete and the last one has been answered.

        Args:
            all_of_it: whatever there is; at the end.

        Returns:
            (sum float32 [d], to be left as it is until answered; steps in it; its number, from 1; bits of a value that
            it is to cross in), or None.
        """
        complete = self._steps >= max(1, self.live_workers) * self.settings.sync_steps
        # What rounding has left of the last sum counts as a step: a sum of none would be refused.
        steps = self._steps or int(all_of_it and self._holds_rest)
        if self._steps_under_way or not steps or not (complete or all_of_it):
            return None
        self._sum, self._under_way = self._under_way, self._sum
        self._steps, self._steps_under_way = 0, steps
        self.forwarded += 1
        bits = 32 if all_of_it else self.settings.exchange_bits
        if self.settings.exchange_bits < 32:
            round_(self._under_way, bits, rest=self._sum)
        self._holds_rest = bits < 32
        return self._under_way, self._steps_under_way, self.forwarded, bits

    def answered(self, number: int) -> None:
        """The global server has counted, or refused, the sum that was forwarded as `number`."""
        if number == self.forwarded:
            self._steps_under_way = 0

    @torch.no_grad()
    def settle(self, last_counted: int) -> None:
        """After a lost link: what was under way, if it was not counted, goes back into the sum."""
        if self._steps_under_way and last_counted < self.forwarded:
            self._add(self._under_way, self._steps_under_way)
        self._steps_under_way = 0

    @property
    def is_empty(self) -> bool:
        """Whether all that came in has been forwarded, and answered."""
        return not self._steps and not self._steps_under_way and not self._holds_rest

    @torch.no_grad()
    def adopt(self, vector: Tensor, version: int) -> None:
        """Takes the global anchor [d]; an older one than it has is left alone."""
        if version >= self.anchor.version:
            self.anchor.vector.copy_(vector)
            self.anchor.version = version

    @torch.no_grad()
    def change(self, difference: Tensor, version: int) -> None:
        """Adds to the anchor [d] what the global one has moved since the last that was sent here."""
        self.anchor.vector.add_(difference)
        self.anchor.version = version

    def flush(self) -> None:
        """The end: nothing to do here, the global server flushes."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The last anchor, and the steps begun; sums are not taken up again."""
        return {**self.anchor.state_tensors(), "steps_begun": torch.tensor(self.steps_begun)}

    def _add(self, vector: Tensor, steps: int) -> None:
        if self._steps or self.settings.exchange_bits < 32:  # then it holds what rounding has left behind
            self._sum.add_(vector)
        else:
            self._sum.copy_(vector)
        self._steps += steps


class CountedPushes:
    """The last push of each process that was counted: none counts twice, whatever connections are lost.

    State: (process, push) pairs of the processes that were heard of last.
    """

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self.unless_known = 0  # "the last push that was counted" of a process that is not known

    def last(self, process: int) -> int:
        """What a process that joins is told."""
        return self._last.get(process, self.unless_known)

    def note(self, process: int, push: int, steps: int) -> None:
        """Counts `push` of `steps` steps.

        Raises:
            ValueError: if it is replayed, comes out of order or covers no sensible number of steps.
        """
        last = self._last.get(process, 0)
        if not 0 < steps < 2**31 or push <= last:
            raise ValueError(f"push {push} of {steps} steps after push {last}")
        self._last.pop(process, None)  # the newest last: the oldest is forgotten first
        self._last[process] = push
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]

    def state_tensor(self) -> Tensor:
        """int64 [processes, 2]."""
        return torch.tensor([*self._last.items()], dtype=torch.int64).reshape(-1, 2)

    def load_state_tensor(self, state: Tensor) -> None:
        """Takes over what `state_tensor` gave."""
        self._last = dict(state.tolist())
