"""The contract of every transport: how a worker takes part in a run, and what it exchanges through.

A `Transport` lets a worker join; the `Link` that it gives is all that the worker knows of the exchange. There are two:
in the worker's own process (`in_process`), and through shared memory with a server process on the same machine
(`shared_memory`). Between machines servers exchange among themselves (`tls`); no worker does.

To add one, write a module with a `Link` and a `Transport`, and name the transport in `joining.TRANSPORTS` by the scheme
of its addresses; `server_address="scheme://..."` then chooses it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algorithms import ServerSettings
from ..parameters import ParameterLayout

NOTHING_UNCOUNTED = -1  # `LinkStatus.counted_at`: no push that an anchor might not hold


class ServerGone(RuntimeError):
    """The server ended while a worker still needed it: none took its place, or the whole launch ends."""


class RefusedError(ValueError):
    """The server does not take this worker."""


@dataclass(frozen=True)
class LinkStatus:
    """What a worker may know of its exchange at one moment; a link replaces it and never changes one.

    Args:
        connected: a server is there. Without one the worker trains on around the last anchor.
        stop_requested: the run ends early.
        save_requested: and a checkpoint is to be saved.
        finished: `finish` has returned the final anchor.
        evictions: how often the server took this worker for dead. It rises only once the newest anchor has been pulled,
            at which the worker begins again.
        counted_at: the anchor version to which the last push came; the anchors after it hold the push. None until it is
            answered; `NOTHING_UNCOUNTED` if there is none, or if every anchor that may still come holds it.
        accepted, refused: pushes that were answered; a value that is NaN or infinite refuses a push.
        refused_in_a_row: since the last that was accepted.
        staleness_sum, staleness_max: anchor versions between reading y and handing in, of the accepted pushes; one
            whose answer was lost with its server has none.
        bytes_pushed, bytes_pulled: that left and reached this process.
    """

    connected: bool = True
    stop_requested: bool = False
    save_requested: bool = False
    finished: bool = False
    evictions: int = 0
    counted_at: int | None = NOTHING_UNCOUNTED
    accepted: int = 0
    refused: int = 0
    refused_in_a_row: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    bytes_pushed: int = 0
    bytes_pulled: int = 0

    def after_push(self, size: int) -> LinkStatus:
        """A push of `size` bytes is under way."""
        return replace(self, counted_at=None, bytes_pushed=self.bytes_pushed + size)

    def after_pull(self, size: int) -> LinkStatus:
        """An anchor of `size` bytes has come, or is coming."""
        return replace(self, bytes_pulled=self.bytes_pulled + size)

    def after_answer(self, accepted: bool, counted_at: int | None, staleness: int = 0) -> LinkStatus:
        """The push under way came to anchor `counted_at`. A refused one is as if counted: it will not come again."""
        if not accepted:
            refused, in_a_row = self.refused + 1, self.refused_in_a_row + 1
            return replace(self, counted_at=counted_at, refused=refused, refused_in_a_row=in_a_row)
        return replace(
            self,
            counted_at=counted_at,
            accepted=self.accepted + 1,
            refused_in_a_row=0,
            staleness_sum=self.staleness_sum + staleness,
            staleness_max=max(self.staleness_max, staleness),
        )


class FinalAnchor(NamedTuple):
    """What `Link.finish` returns: the anchor's last version, and the best step that any worker named, or -1."""

    version: int
    best_step: int


class Link(ABC):
    """A worker's end of the exchange: it pushes, and pulls the newest anchor.

    One push is under way at a time. Calls come from the worker's training thread alone, and `status`, `worker` and
    `can_push` may be read from it at any time. `push` and `poll` lie in the training step and never wait: neither for
    the server, nor for another worker, nor for a copy to or from an accelerator. `settle`, `finish` and `snapshot` do.

    A server that is lost is no error at once: `status.connected` says so, the worker trains on, and `poll` looks for
    another one. Only when the link has given up does a call raise `ServerGone`; any call that waits may, and `poll`.

    An implementation sets `_worker` and `_status`.

    Attributes:
        anchor_in_place: the newest anchor, float32 [d] on the worker's device, where it lies in the worker's process
            and changes in `push` and `finish` alone, which are done when they return: the worker keeps no copy. Else
            None.
    """

    anchor_in_place: Tensor | None = None

    _worker: int
    _status: LinkStatus

    @property
    def worker(self) -> int:
        """This worker's number in the run."""
        return self._worker

    @property
    def status(self) -> LinkStatus:
        """What is known now; `poll`, `settle` and `finish` bring it up to date."""
        return self._status

    @property
    def bytes_between_machines(self) -> int:
        """That this machine has sent to and received from others, for all of its workers."""
        return 0

    @property
    @abstractmethod
    def can_push(self) -> bool:
        """Whether `push` may be called: there is a server, and it has answered the last push."""

    @property
    @abstractmethod
    def steps_begun(self) -> int:
        """Steps that all workers of the run have begun, as far as is known here; never falls. Never waits."""

    @abstractmethod
    def begin_step(self) -> None:
        """Counts one more step of this worker into `steps_begun`. Never waits."""

    @abstractmethod
    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        """Begins to hand in what `steps` local steps came to. Only when `can_push`; never waits.

        Args:
            total: float32 [d] on the worker's device; must stay as it is until `can_push` again. On CPU it may be
                written again as soon as this returns.
            steps: at least 1.
            version: of the anchor that the worker holds.
            loss: mean over these steps, where the algorithm asks for it.
        """

    @abstractmethod
    def poll(self, held: int, incoming: Tensor) -> int | None:
        """Does whatever can be done without waiting: once a step, and more often while the first anchor is awaited.

        Args:
            held: the anchor version that the worker holds; -1 for none.
            incoming: float32 [d] on the worker's device, where another anchor than `held` is copied to. On an
                accelerator it may be half written between two polls, on CPU never.

        Returns:
            the version that is now whole in `incoming`, or None if there is none.

        Raises:
            ServerGone: if the link has given up.
        """

    @abstractmethod
    def settle(self) -> None:
        """Waits until there is a server and the last push has been answered.

        Raises:
            ServerGone: if the link has given up.
        """

    @abstractmethod
    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        """Reports that this worker has done its steps, and waits for the final anchor. Nothing is pushed after it.

        A worker of a launch waits for all others of it, an external one for nobody.

        Args:
            stop_all: ask the other workers to stop as well (early stopping).
            best_step: the step of the best checkpoint, where this worker knows one, else -1.
            incoming: float32 [d] on the worker's device; receives the final anchor.

        Raises:
            ServerGone: if the link has given up.
        """

    @abstractmethod
    def snapshot(self, path: Path, manifest: Sequence[Any] | None = None) -> bool:
        """Waits until the server's state lies at `path`, for a checkpoint; False if there is no server to save it.

        It holds every push that was made before.

        Args:
            manifest: `ParameterLayout.manifest`, kept with it.

        Raises:
            OSError: if it could not be written.
        """

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Leaves, at any time and once; does not wait for others.

        Args:
            failed: with an error. The other workers of a launch end with one as well.
        """


@dataclass(frozen=True)
class JoinRequest:
    """What a worker brings when it joins.

    Args:
        layout: of its trainable parameters; must be that of every other worker.
        parameters: their values, detached. The first worker's become the first anchor.
        settings: of the server; must be those of every other worker.
        server_state: a server's snapshot to go on from, for the worker whose server begins with it.
    """

    layout: ParameterLayout
    parameters: Sequence[Tensor]
    settings: ServerSettings
    server_state: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the worker's vectors live."""
        return self.parameters[0].device

    def first_anchor(self, device: torch.device) -> Tensor:
        """The parameters as one vector, float32 [d], on `device`."""
        vector = torch.empty(self.layout.numel, dtype=torch.float32, device=device)
        return self.layout.read([parameter.to(device) for parameter in self.parameters], vector)


class Transport(ABC):
    """One way to take part in a run. Joined and left in turn, by the training thread; never in a training step."""

    @abstractmethod
    def join(self, request: JoinRequest) -> Link:
        """Waits until the run begins, or goes on, with this worker.

        Raises:
            RefusedError: if the worker does not fit the run.
            ServerGone: if there is no server.
            OSError: if there is no room for the exchange.
        """

    @abstractmethod
    def leave(self, finished: bool) -> None:
        """Takes down what `join` has set up, whether or not it returned; the link, if there was one, is closed already.

        Args:
            finished: the worker has the final anchor.
        """
