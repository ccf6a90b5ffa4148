"""A worker's part in a run: it joins, with or without a server process, and leaves.

This is the same for `LSAMTrainer` and for any other training loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .algorithms import ServerSettings, WorkerSettings
from .identity import Identity, LaunchStore
from .joining import Alone, Launch, Timeouts, transport_of
from .parameters import ParameterLayout
from .transport.base import JoinRequest, Link, Transport
from .worker import Worker

_gathered = itertools.count()  # a number in each key keeps a key that is used again apart from its first use
_agreed = itertools.count()


class Run:
    """Joins a run and leaves it, after which it may join again.

    Args:
        identity: this process among the workers.
        shared_memory_dir: the folder in which vectors are exchanged.
        server_log: file that receives the log of the server process, if this worker starts it.
        server_address: address of a running server to join (see `joining.TRANSPORTS`), or None.
        timeouts: see `Timeouts`.
        server_port: port on which the first machine's server listens for those of the others; 0 lets the system choose.
        transport: how to join; if None, the address and the number of workers decide.

    Attributes:
        store: the store of the launch.
        transport: as given, or as chosen.

    Raises:
        ValueError: if no transport supports the address.

    Process: the training thread. Blocking: `join` and `leave` like the transport's; `gather` at worker 0 until all have
    called it, `agree` at the others until worker 0 has.
    """

    def __init__(
        self,
        identity: Identity,
        shared_memory_dir: Path,
        server_log: Path,
        server_address: str | None = None,
        timeouts: Timeouts | None = None,
        server_port: int = 0,
        transport: Transport | None = None,
    ):
        timeouts = timeouts or Timeouts()
        self._identity = identity
        self.store = LaunchStore(identity)
        self.transport: Transport
        if transport is not None:
            self.transport = transport
        elif server_address is not None:
            self.transport = transport_of(server_address, timeouts)
        elif identity.num_workers == 1:
            self.transport = Alone()
        else:
            self.transport = Launch(identity, self.store, shared_memory_dir, server_log, timeouts, server_port)
        self._link: Link | None = None

    def join(
        self,
        named: Sequence[tuple[str, Tensor]],
        worker_settings: WorkerSettings,
        server_settings: ServerSettings,
        server_state: Path | None = None,
    ) -> Worker:
        """Joins with the given parameters.

        Args:
            named: (name, parameter) pairs; worker 0's values become the first anchor.
            worker_settings, server_settings: see `algorithms`.
            server_state: a server's snapshot to continue from.

        Raises:
            OSError: if there is no room for the exchange.
            RefusedError: if the parameters differ from those of worker 0, or an external worker's settings from those
                of the run.
            ServerGone: if there is no server.
        """
        parameters = [parameter.detach() for _, parameter in named]
        request = JoinRequest(ParameterLayout(named), parameters, server_settings, server_state, worker_settings.weight)
        self._link = self.transport.join(request)
        return Worker(named, self._link, worker_settings)

    @property
    def joined(self) -> bool:
        """Whether this worker has joined and not left."""
        return self._link is not None

    def leave(self, failed: bool = False) -> None:
        """Closes this worker's end; the worker that started the server waits for its end.

        Args:
            failed: whether this worker ends with an error. The other workers of the launch then do so as well.
        """
        finished = False
        if self._link is not None:
            finished = self._link.status.finished
            self._link.close(failed)
            self._link = None
        self.transport.leave(finished)

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Collects one JSON value per worker at worker 0, in rank order; returns None at the others. Workers that come
        and go each get only their own.

        All workers must call it equally often, and in the same order.
        """
        if not self._identity.meets_others:
            return [value]
        return self.store.gather(f"user/{next(_gathered)}/{key}", value)

    def agree(self, key: str, value: Any) -> Any:
        """Gives every worker worker 0's JSON value; workers that come and go each keep their own.

        All workers must call it equally often, and in the same order; the others wait for worker 0.
        """
        if not self._identity.meets_others:
            return value
        key = f"agreed/{next(_agreed)}/{key}"
        if self._identity.rank == 0:
            self.store.set(key, value)
        return self.store.get(key)
