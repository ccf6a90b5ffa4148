"""Carries control messages between processes of one machine, over a Unix stream socket."""

from __future__ import annotations

import os
import socket
import threading
import weakref
from contextlib import suppress
from typing import TextIO

from .messages import WORKER_MESSAGES, Message

# Open files by which others can tell that this process is alive. A forked child, such as a DataLoader worker, would
# keep them open, and others would not notice that the process has left, or died, before all its children had.
signs_of_life: weakref.WeakSet[socket.socket | TextIO] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [sign.close() for sign in list(signs_of_life)])


class Channel:
    """A stream socket that carries `WORKER_MESSAGES`.

    Process: any. Two threads may `send`; one of them does everything else, including `close`.
    Blocking: `receive`, until a frame has arrived or `timeout` has passed; nothing else.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._sending = threading.Lock()  # a `close` during a `send` could give the descriptor to another file
        self._unread = b""

    def fileno(self) -> int:
        """The socket's file descriptor, or -1 once it is closed."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends one frame, completely or not at all: the kernel accepts so small a message in one piece.

        Raises:
            ConnectionError: if the peer is gone.
            BlockingIOError: if the peer has left some hundred frames unread.
        """
        with self._sending:
            self._socket.settimeout(0.0)
            self._socket.sendall(WORKER_MESSAGES.pack(message))

    def receive(self, timeout: float | None = 0.0) -> Message | None:
        """The next message, or None if none has arrived after `timeout` seconds (None: wait forever).

        Raises:
            ConnectionError: if the peer closed the connection.
            ValueError: if the bytes are not a frame.
        """
        while len(self._unread) < WORKER_MESSAGES.size:
            self._socket.settimeout(timeout)
            try:
                chunk = self._socket.recv(4096)
            except (BlockingIOError, TimeoutError):
                return None
            if not chunk:
                raise ConnectionError("the other side closed the connection")
            self._unread += chunk
        size = WORKER_MESSAGES.size
        frame, self._unread = self._unread[:size], self._unread[size:]
        return WORKER_MESSAGES.unpack(frame)

    def shut(self) -> None:
        """Makes both sides read an end of file."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends the connection for both sides, after a `send` that is under way."""
        self.shut()  # a child process that is not Python may hold a copy of the descriptor open
        with self._sending:
            self._socket.close()
