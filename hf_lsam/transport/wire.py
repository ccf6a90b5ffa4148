"""One authenticated TCP connection between two machines, and the Gloo pair that finds itself over it."""

from __future__ import annotations

import hmac
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable
from datetime import timedelta

from torch.distributed import ProcessGroupGloo
from torch.distributed.distributed_c10d import Store

GLOBAL, MACHINE = 0, 1  # ranks in the Gloo pair, and directions of frames
MAC_BYTES = 32

_KEY_BYTES, _VALUE_BYTES = 64, 1024
_BLOB = struct.Struct(f"<{_KEY_BYTES}sH{_VALUE_BYTES}s")  # key, length, value


class Wire:
    """An authenticated connection: bodies of known size, each followed by its HMAC.

    Blocking: `send`, should the connection's buffer be full; ten seconds at most.
    """

    def __init__(self, connection: socket.socket, key: bytes, rank: int):
        self.socket = connection
        self.rank = rank
        self._key = key
        self._sent = self._received = 0
        self._unread = b""
        self._sending = threading.Lock()
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 10, 0))

    def send(self, body: bytes) -> None:
        """Raises OSError if the other side is gone."""
        with self._sending:
            self.socket.sendall(body + self._mac(self.rank, self._sent, body))
            self._sent += 1

    def receive(self, size: int) -> bytes | None:
        """The next body, of `size` bytes, if it is there; does not wait.

        Raises:
            ConnectionResetError: if the other side closed the connection.
            OSError: if the connection broke, or if the body is not from the other side.
        """
        whole = size + MAC_BYTES
        if len(self._unread) < whole:
            try:
                chunk = self.socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not chunk:
                raise ConnectionResetError("the other side closed the connection")
            self._unread += chunk
            if len(self._unread) < whole:
                return None
        body, mac, self._unread = self._unread[:size], self._unread[size:whole], self._unread[whole:]
        if not hmac.compare_digest(mac, self._mac(1 - self.rank, self._received, body)):
            raise ConnectionAbortedError("a frame arrived that is not the other side's")
        self._received += 1
        return body

    def _mac(self, rank: int, number: int, body: bytes) -> bytes:
        return hmac.digest(self._key, struct.pack("<BQ", rank, number) + body, "sha256")


class WireStore(Store):
    """What Gloo needs of a store to find its pair, over the wire: `set` sends, `get` receives."""

    def __init__(self, wire: Wire, timeout: float):
        super().__init__()
        self._wire = wire
        self._deadline = time.monotonic() + timeout
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]  # torch's stub says str: Gloo hands bytes
        assert len(key.encode()) <= _KEY_BYTES, f"Gloo's key {key} is too long"
        assert len(value) <= _VALUE_BYTES, f"Gloo's {key} has {len(value)} bytes, more than {_VALUE_BYTES}"
        self._values[key] = bytes(value)
        self._wire.send(_BLOB.pack(key.encode(), len(value), value))

    def get(self, key: str) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.socket, selectors.EVENT_READ)
            while key not in self._values:
                remaining = self._deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError("the other side did not say where its Gloo listens")
                selector.select(remaining)
                if (body := self._wire.receive(_BLOB.size)) is not None:
                    name, length, value = _BLOB.unpack(body)
                    self._values[name.rstrip(b"\0").decode()] = value[:length]
        return self._values[key]

    def wait(self, keys: Iterable[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)


def make_pair(wire: Wire, timeout: float) -> ProcessGroupGloo:
    """A process group of the two sides of `wire`, at the address that it has on this machine.

    Raises:
        OSError or RuntimeError: if the other side does not do the same within `timeout` seconds.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stub
    # By address: the host's name may resolve to another interface, or not at all.
    options._devices = [ProcessGroupGloo.create_device(hostname=wire.socket.getsockname()[0], lazy_init=False)]
    options._timeout = timedelta(seconds=timeout)
    return ProcessGroupGloo(WireStore(wire, timeout), wire.rank, 2, options)
