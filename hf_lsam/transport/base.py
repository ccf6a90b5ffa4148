"""The contract of every transport: how a worker joins a run, and the link through which it exchanges vectors.

A `Transport` lets a worker join; the `Link` that it returns is all that the worker knows about the exchange. There are
two transports: within the worker's own process (`in_process`), and through shared memory with a server process on the
same machine (`shared_memory`). Between machines only servers exchange vectors (`tls`), never workers.

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

NOTHING_UNCOUNTED = -1  # `LinkStatus.counted_at`: every anchor that may still come includes all pushes


class ServerGone(RuntimeError):
    """The server ended while a worker still needed it, and none took its place, or the whole launch ends."""


class RefusedError(ValueError):
    """The server does not accept this worker."""


@dataclass(frozen=True)
class LinkStatus:
    """What a worker knows about its exchange at one moment. A link replaces its status and never modifies it.

    Args:
        connected: whether there is a server. Without one the worker trains on around the last anchor.
        stop_requested: whether the run is to end early.
        save_requested: whether a checkpoint is to be saved as well.
        finished: whether `finish` has returned the final anchor.
        evictions: how often the server took this worker for dead. Rises only once the newest anchor has been pulled,
            from which the worker then starts again.
        counted_at: the anchor version at which the last push arrived; later versions include the push. None until it is
            answered; `NOTHING_UNCOUNTED` if there is none, or if every anchor that may still come includes it.
        accepted, refused: numbers of answered pushes; a push that holds a NaN or infinite value is refused.
        refused_in_a_row: pushes refused since the last accepted one.
        staleness_sum, staleness_max: over the accepted pushes, how many anchor versions passed between reading y and
            the arrival of the push; a push whose answer was lost with its server counts as 0.
        bytes_pushed, bytes_pulled: bytes that left and reached this process.
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
        """The status once a push of `size` bytes is under way."""
        return replace(self, counted_at=None, bytes_pushed=self.bytes_pushed + size)

    def after_pull(self, size: int) -> LinkStatus:
        """The status once an anchor of `size` bytes has arrived, or is arriving."""
        return replace(self, bytes_pulled=self.bytes_pulled + size)

    def after_answer(self, accepted: bool, counted_at: int | None, staleness: int = 0) -> LinkStatus:
        """The status once the push under way, which arrived at anchor `counted_at`, is answered. A refused push is
        treated as counted, because it is not repeated."""
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
    """What `Link.finish` returns: the anchor's last version, and the best step that any worker reported, or -1."""

    version: int
    best_step: int


class Link(ABC):
    """A worker's end of the exchange: pushes, and pulls the newest anchor.

    One push is under way at a time. Only the worker's training thread calls a link, and it may read `status`, `worker`
    and `can_push` at any time. `push` and `poll` are part of the training step and never wait: neither for the server,
    nor for another worker, nor for a copy to or from an accelerator. `settle`, `finish` and `snapshot` do.

    Losing the server is not an error at first: `status.connected` becomes False, the worker trains on, and `poll` looks
    for another server. Only once the link has given up do calls raise `ServerGone`: those that wait may, and `poll`.

    An implementation sets `_worker` and `_status`.

    Attributes:
        anchor_in_place: the newest anchor, float32 [d] on the worker's device, if it is in the worker's own process and
            only `push` and `finish` change it, before they return; the worker then keeps no copy. Otherwise None.
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
        """What is known now. Calls to this link, `poll` above all, bring it up to date."""
        return self._status

    @property
    def bytes_between_machines(self) -> int:
        """Bytes that this machine has sent to and received from others, for all of its workers."""
        return 0

    @property
    def exchange_steps(self) -> int:
        """How many steps each worker of this machine makes between two exchanges with other machines: `sync_steps`, or
        more if the link between them takes longer. 0 if that is not known, or if there is no such link."""
        return 0

    @property
    @abstractmethod
    def can_push(self) -> bool:
        """Whether `push` may be called: there is a server, and it has answered the last push."""

    @property
    @abstractmethod
    def steps_begun(self) -> int:
        """Steps that all workers of the run have begun, as far as is known here. Never decreases, and never waits."""

    @abstractmethod
    def begin_step(self) -> None:
        """Adds one step of this worker to `steps_begun`. Never waits."""

    @abstractmethod
    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        """Starts to push the result of `steps` local steps. Allowed only if `can_push`; never waits.

        Args:
            total: float32 [d] on the worker's device; must not change until `can_push` again. On CPU it may be
                overwritten as soon as this returns.
            steps: at least 1.
            version: of the anchor that the worker holds.
            loss: mean over these steps, if the algorithm uses it.
        """

    @abstractmethod
    def poll(self, held: int, incoming: Tensor) -> int | None:
        """Does whatever can be done without waiting. Called once per step, more often while awaiting the first anchor.

        Args:
            held: the anchor version that the worker holds; -1 for none.
            incoming: float32 [d] on the worker's device; receives an anchor of another version than `held`. On an
                accelerator it may be half written between two polls, on CPU never.

        Returns:
            the version that is now complete in `incoming`, or None if there is none.

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
        """Reports that this worker has made its steps, and waits for the final anchor. Nothing may be pushed after it.

        A worker of a launch waits for all others of the launch, an external worker for nobody.

        Args:
            stop_all: ask the other workers to stop as well (early stopping).
            best_step: the step of the best checkpoint, if this worker knows one, else -1.
            incoming: float32 [d] on the worker's device; receives the final anchor.

        Raises:
            ServerGone: if the link has given up.
        """

    @abstractmethod
    def snapshot(self, path: Path, manifest: Sequence[Any] | None = None) -> bool:
        """Saves the server's state to `path`, for a checkpoint, and waits for it. Returns False if there is no server.

        The state includes every push that was made before.

        Args:
            manifest: `ParameterLayout.manifest`, stored with the state.

        Raises:
            OSError: if it could not be written.
        """

    @abstractmethod
    def close(self, failed: bool = False) -> None:
        """Leaves the run. May be called at any time, once; does not wait for others.

        Args:
            failed: whether this worker ends with an error. The other workers of a launch then end with one as well.
        """


@dataclass(frozen=True)
class JoinRequest:
    """What a worker presents when it joins.

    Args:
        layout: of its trainable parameters; must be the same in every worker.
        parameters: their values, detached. The first worker's become the first anchor.
        settings: of the server; must be the same in every worker.
        server_state: a server snapshot to continue from, for the worker whose server begins with it.
        weight: see `WorkerSettings`.
    """

    layout: ParameterLayout
    parameters: Sequence[Tensor]
    settings: ServerSettings
    server_state: Path | None = None
    weight: int = 1

    @property
    def device(self) -> torch.device:
        """Where the worker's vectors live."""
        return self.parameters[0].device

    def first_anchor(self, device: torch.device) -> Tensor:
        """The parameters as one vector, float32 [d], on `device`."""
        vector = torch.empty(self.layout.numel, dtype=torch.float32, device=device)
        return self.layout.read([parameter.to(device) for parameter in self.parameters], vector)


class Transport(ABC):
    """One way to take part in a run. The training thread calls `join` and `leave` alternately, and never during a
    training step."""

    @abstractmethod
    def join(self, request: JoinRequest) -> Link:
        """Waits until the run begins, or continues, with this worker.

        Raises:
            RefusedError: if the worker does not match the run.
            ServerGone: if there is no server.
            OSError: if there is no room for the exchange.
        """

    @abstractmethod
    def leave(self, finished: bool) -> None:
        """Takes down what `join` has set up, whether or not it returned. The link, if there was one, is already closed.

        Args:
            finished: whether the worker has the final anchor.
        """
