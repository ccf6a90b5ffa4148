"""A worker's part in a run: it joins, with a server process or without, and leaves.

The same for `LSAMTrainer` and for any other training loop.
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

_gathered = itertools.count()  # a key that is used again is another one
_agreed = itertools.count()


class Run:
    """Joins and leaves; may be joined again after it was left.

    Args:
        identity: this process among the workers.
        shared_memory_dir: where vectors are exchanged.
        server_log: file that receives the log of the server process, if this worker starts it.
        server_address: of a running server to join (see `joining.TRANSPORTS`), or None.
        timeouts: see `Timeouts`.
        server_port: where the first machine's server listens to those of the others; 0 lets the system choose.
        transport: how to join, where it is not what the address or the number of workers says.

    Attributes:
        store: of the launch.
        transport: as given, or chosen.

    Raises:
        ValueError: if no transport joins by such an address.

    Process: the training thread. Blocking: `join` and `leave` as the transport's; `gather` at worker 0 until all have
    called it, `agree` elsewhere until worker 0 has.
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
        """Takes part with the given parameters.

        Args:
            named: (name, parameter) pairs; worker 0's values become the first anchor.
            server_state: a server's snapshot to continue from.

        Raises:
            OSError: if there is no room for the exchange.
            RefusedError: if the parameters are not those of worker 0, or an external worker's settings the run's.
            ServerGone: if there is no server.
        """
        parameters = [parameter.detach() for _, parameter in named]
        request = JoinRequest(ParameterLayout(named), parameters, server_settings, server_state)
        self._link = self.transport.join(request)
        return Worker(named, self._link, worker_settings)

    def leave(self, failed: bool = False) -> None:
        """Closes this worker's end; worker 0 sees the server off.

        Args:
            failed: with an error. The other workers of the launch end with one as well.
        """
        finished = False
        if self._link is not None:
            finished = self._link.status.finished
            self._link.close(failed)
            self._link = None
        self.transport.leave(finished)

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Collects a JSON value of each worker at worker 0, in the order of ranks; None at the others. Of workers that
        come and go each has its own.

        All workers must call it as often, and in the same order.
        """
        if not self._identity.meets_others:
            return [value]
        return self.store.gather(f"user/{next(_gathered)}/{key}", value)

    def agree(self, key: str, value: Any) -> Any:
        """Worker 0's JSON value, for every worker; of workers that come and go each keeps its own.

        All workers must call it as often, and in the same order; the others wait for worker 0.
        """
        if not self._identity.meets_others:
            return value
        key = f"agreed/{next(_agreed)}/{key}"
        if self._identity.rank == 0:
            self.store.set(key, value)
        return self.store.get(key)
