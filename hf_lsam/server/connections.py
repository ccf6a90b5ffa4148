"""Who is connected to a server: processes of its machine, and what else is to be heard."""

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

MAX_PENDING = 64  # connections at a time that have not joined yet


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
        """Sends to a worker; one that has died, or reads nothing, is dropped when its connection is next read."""
        try:
            self.channel.send(message)
        except OSError:
            logger.debug("worker %d did not take %s", self.worker, message)
            self.channel.shut()


class HasFileno(Protocol):
    """What can be watched: a socket, or what is read through one."""

    def fileno(self) -> int:
        """The file descriptor, or -1 once it is closed."""


class Connections:
    """Accepts connections and hears what they say; what it means, and when one ends, is the service's to decide.

    Args:
        heard: called with every whole message of a connection; may raise OSError or ValueError, as reading does.
        broken: called with a connection and the reason once one of these was raised; is to `drop` it.

    Process: one; not thread-safe. Blocking: `hear` until something comes or `timeout`.
    """

    def __init__(self, heard: Callable[[Connection, Message], None], broken: Callable[[Connection, object], None]):
        self._heard = heard
        self._broken = broken
        self._selector = selectors.DefaultSelector()

    def listen(self, folder: RunFolder) -> None:
        """From here on processes can connect."""
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
        """Those there are now; they may be dropped meanwhile."""
        return iter([key.data for key in self._selector.get_map().values() if isinstance(key.data, Connection)])

    def hear(self, timeout: float) -> None:
        """Handles what has come, or waits for it."""
        for key, _ in self._selector.select(timeout):
            if not isinstance(key.data, Connection):
                key.data()
            elif key.data.channel.fileno() >= 0:  # not dropped a moment ago
                self._read(key.data)

    def drop(self, connection: Connection) -> None:
        """Closes one connection; nothing that it has still sent is heard."""
        self.unwatch(connection.channel)
        connection.channel.close()

    def watch(self, source: int | HasFileno, heard: Callable[[], None]) -> None:
        """Calls `heard` whenever `source` is readable."""
        self._selector.register(source, selectors.EVENT_READ, heard)

    def unwatch(self, source: int | HasFileno) -> None:
        """Ends what `watch` began.

        Raises:
            KeyError: if `source` is not watched.
        """
        self._selector.unregister(source)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptor left
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
        """Handles every whole frame of one connection."""
        try:
            while (message := connection.channel.receive()) is not None:
                connection.last_heard = time.monotonic()
                self._heard(connection, message)
        except (OSError, ValueError) as reason:
            self._broken(connection, reason)
