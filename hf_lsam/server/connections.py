"""A server's connections: the processes of its machine, and whatever else it has to listen to."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..transport.channel import Channel
from ..transport.mailbox import RunFolder
from ..transport.messages import Message

logger = logging.getLogger(__name__)

MAX_PENDING = 64  # pending connections at a time: accepted, but not joined yet


@dataclass(eq=False)
class Connection:
    """One connected process; a worker once it has joined."""

    channel: Channel
    last_heard: float
    worker: int = -1
    process: int = 0
    mailbox_number: int = 0
    mailbox: Tensor | None = None
    finished: bool = False

    def tell(self, message: Message) -> None:
        """Sends a message. A worker that has died, or does not read, is dropped when its connection is next read."""
        try:
            self.channel.send(message)
        except OSError:
            logger.debug("worker %d did not take %s", self.worker, message)
            self.channel.shut()


class HasFileno(Protocol):
    """Anything with a file descriptor that can be watched, such as a socket."""

    def fileno(self) -> int:
        """The file descriptor, or -1 once it is closed."""


class Connections:
    """Accepts connections and reads their messages. What a message means, and when a connection ends, is decided by the
    service.

    Args:
        heard: called with a connection and each complete message from it; may raise OSError or ValueError, as reading
            does.
        broken: called with a connection and the reason once one of these was raised; must `drop` the connection.

    Process: one; not thread-safe. Blocking: `hear`, until something arrives or `timeout` has passed.
    """

    def __init__(self, heard: Callable[[Connection, Message], None], broken: Callable[[Connection, object], None]):
        self._heard = heard
        self._broken = broken
        self._selector = selectors.DefaultSelector()

    def listen(self, folder: RunFolder) -> None:
        """Starts to accept connections."""
        self._listener = folder.listen()
        self._listener.settimeout(0.0)
        self.watch(self._listener, self._accept)

    def close(self) -> None:
        """Closes all connections; processes can no longer connect."""
        for connection in self:
            connection.channel.close()
        self._listener.close()
        self._selector.close()

    def __iter__(self) -> Iterator[Connection]:
        """The connections of this moment; they may be dropped during the iteration."""
        return iter([key.data for key in self._selector.get_map().values() if isinstance(key.data, Connection)])

    def hear(self, timeout: float) -> None:
        """Handles whatever has arrived; if nothing has, waits for it, up to `timeout` seconds."""
        for key, _ in self._selector.select(timeout):
            if not isinstance(key.data, Connection):
                key.data()
            elif key.data.channel.fileno() >= 0:  # not dropped by an earlier event of the same `select`
                self._read(key.data)

    def drop(self, connection: Connection) -> None:
        """Closes one connection; messages that have not been read yet are discarded."""
        self.unwatch(connection.channel)
        connection.channel.close()

    def watch(self, source: int | HasFileno, heard: Callable[[], None]) -> None:
        """Calls `heard` whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, heard)

    def unwatch(self, source: int | HasFileno) -> None:
        """Stops watching `source`.

        Raises:
            KeyError: if `source` is not watched.
        """
        self._selector.unregister(source)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # the peer has gone already, or no file descriptor is left
            logger.error("a connection was not accepted: %s", error)
            return
        pending = sum(other.worker < 0 for other in self)
        if pending >= MAX_PENDING:
            logger.error("%d connections have not joined yet: one more is refused", pending)
            connection.close()
            return
        channel = Channel(connection)
        self._selector.register(channel, selectors.EVENT_READ, Connection(channel, time.monotonic()))

    def _read(self, connection: Connection) -> None:
        """Handles every complete frame of one connection."""
        try:
            while (message := connection.channel.receive()) is not None:
                connection.last_heard = time.monotonic()
                self._heard(connection, message)
        except (OSError, ValueError) as reason:
            self._broken(connection, reason)
