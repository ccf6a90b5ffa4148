"""A man in the middle between two machines: records what crosses, and changes it on request."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class Wiretap:
    """Forwards connections to a server, one after another or several at a time.

    Args:
        server: host and port.

    Attributes:
        address: host and port at which machines reach the server through it.
        recorded: bytes that crossed, "to server" and "from server".
    """

    def __init__(self, server: tuple[str, int]):
        self._server = server
        self._front = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._front.getsockname()
        self.recorded = {"to server": b"", "from server": b""}
        self._flip_in: dict[str, int] = {}  # way -> bytes until the one that is changed
        self._routes: dict[socket.socket, tuple[socket.socket, str]] = {}
        self._ended = False
        self._thread = threading.Thread(target=self._pass_on)
        self._thread.start()

    def flip(self, way: str, after: int = 0) -> None:
        """Flips a bit of one byte that crosses this way, after `after` others have crossed."""
        self._flip_in[way] = after

    def close(self) -> None:
        self._ended = True
        self._thread.join()

    def __enter__(self) -> Wiretap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pass_on(self) -> None:
        while not self._ended:
            for source in select.select([self._front, *self._routes], [], [], 0.05)[0]:
                if source is self._front:
                    machine = self._front.accept()[0]
                    with suppress(OSError):
                        back = socket.create_connection(self._server)
                        self._routes[machine] = (back, "to server")
                        self._routes[back] = (machine, "from server")
                elif source in self._routes:
                    self._pass(source)
        for source in self._routes:
            source.close()
        self._front.close()

    def _pass(self, source: socket.socket) -> None:
        target, way = self._routes[source]
        try:
            data = bytearray(source.recv(1 << 16))
            wait = self._flip_in.get(way)
            if data and wait is not None:
                if wait < len(data):
                    data[wait] ^= 1
                    del self._flip_in[way]
                else:
                    self._flip_in[way] = wait - len(data)
            self.recorded[way] += data
            target.sendall(data)
        except OSError:
            data = bytearray()
        if not data:
            for each in (source, target):
                del self._routes[each]
                each.close()
