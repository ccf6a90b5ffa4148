"""One end of a link between two machines: messages and vectors over one TLS connection (see `tls`).

Each side sends frames of one size. A frame is one of these: a heartbeat, twice a second; a message, which says in how
many bits per value its vector will follow, if it has one; the head of a piece of that vector, immediately followed by
the piece; or the acknowledgement that a message has arrived, with its vector. A vector crosses in pieces, which are
encoded and decoded one by one: heartbeats and acknowledgements pass between them, and neither side ever holds the whole
vector in encoded form.
"""

from __future__ import annotations

import atexit
import os
import selectors
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ..compression import BITS, BLOCK, decode, encode, encoded_bytes
from .messages import MACHINE_MESSAGES, Message

HEARTBEAT = 0.5  # seconds

_FRAME = struct.Struct(f"<BB{MACHINE_MESSAGES.size}s")  # what, bits per value of its vector or 0, message
_BEAT, _MESSAGE, _PIECE, _ARRIVED = range(4)  # what a frame is
_PIECE_VALUES = (1 << 12) * BLOCK  # 1 MiB of float32
_RECORD = 1 << 14  # bytes of a TLS record: sending and receiving take turns at this size
_MOST_RECORDS = 1 << 24  # that one key of AES-GCM may encrypt (RFC 8446, 5.5); 256 GiB of vectors
_BUFFERS = 2  # vectors that one end holds: the owner uses one while the next arrives


class Peer:
    """One end of an exchange with another machine; made by `Listener.accept` and `connect`.

    Attributes:
        bytes_moved: bytes sent and received, before encryption.

    Messages arrive in the order in which they were posted, each with its vector, if it has one. A thread of the peer's
    own sends and receives. It fills one buffer while the owner holds another; while neither is free, nothing is
    acknowledged, and the other side cannot post another vector.

    Args:
        connection: authenticated, and with nothing under way.
        numel: vector length d.
        silence: seconds without a sign of life after which the other side counts as lost.
        address: of the other side.

    Process: one thread owns it; code that holds the interpreter lock (GIL) for `silence` seconds loses the connection.
    Blocking: `close` only, briefly.
    """

    def __init__(self, connection: ssl.SSLSocket, numel: int, silence: float, address: tuple[str, int]):
        self.address = address
        self.bytes_moved = 0
        self._connection = connection
        self._numel = numel
        self._silence = silence
        self._lock = threading.Lock()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes the owner
        self._work = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # wakes the thread
        self._outbox: deque[tuple[Message, Tensor | None, int]] = deque()
        self._inbox: deque[tuple[Message, Tensor | None]] = deque()
        self._free = [torch.empty(numel, dtype=torch.float32) for _ in range(_BUFFERS)]
        self._held: Tensor | None = None
        self._posted = 0
        self._arrived = 0  # of the messages posted, those that have arrived on the other side
        self._unacknowledged = 0  # of the messages received, those that have not been acknowledged
        self._lost: str | None = None  # why the connection was lost, if it was
        self._closed = False
        self._error_raised = False  # whether `poll` has raised the error
        connection.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="hf_lsam-peer", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def fileno(self) -> int:
        """Readable when `poll` or `can_post` may have something new."""
        return self._wakeup

    @property
    def can_post(self) -> bool:
        """Whether everything posted has arrived on the other side, so that its vectors may be overwritten and another
        vector may be posted."""
        with self._lock:
            return self._posted == self._arrived and self._lost is None

    @property
    def all_arrived(self) -> bool:
        """Whether the other side has all that was posted; can be asked of a link that is lost, too."""
        with self._lock:
            return self._posted == self._arrived

    def post(self, message: Message, vector: Tensor | None = None, bits: int = 32) -> None:
        """Sends a message. If the connection is lost, the message is dropped, and the next `poll` raises.

        Args:
            message: one of `MACHINE_MESSAGES`. Without a vector it may be posted at any time.
            vector: float32 [d] on CPU, contiguous; must not change until `can_post`.
            bits: bits per value in transit; the vector arrives as `compression.round_` would leave it.

        Raises:
            ValueError: if the vector is of another kind, or if not `can_post`.
        """
        if vector is not None:
            if vector.shape != (self._numel,) or vector.dtype != torch.float32 or vector.device.type != "cpu":
                raise ValueError(
                    f"Vectors of this exchange are float32 [{self._numel}] on CPU, not {vector.dtype} "
                    f"{list(vector.shape)} on {vector.device}."
                )
            if not vector.is_contiguous():
                raise ValueError("A vector must be contiguous to be sent. Call .contiguous() on it.")
        with self._lock:
            if self._lost is not None:
                return
            if vector is not None and self._posted != self._arrived:
                raise ValueError("The last message has not arrived yet. Post a vector only when `can_post`.")
            self._posted += 1
            self._outbox.append((message, None if vector is None else vector.detach(), bits))
        os.eventfd_write(self._work, 1)

    def poll(self) -> tuple[Message, Tensor | None] | None:
        """The next message, if one has arrived. Its vector, float32 [d], may be read and written until the next call.

        Raises:
            ConnectionError: once, after the last message, if the other side is lost.
        """
        with self._lock:
            if self._held is not None:
                self._free.append(self._held)
                self._held = None
                os.eventfd_write(self._work, 1)  # an acknowledgement may have waited for a free buffer
            if len(self._inbox) <= 1:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wakeup)
            if self._inbox:
                message, self._held = self._inbox.popleft()
                if self._lost is not None:
                    os.eventfd_write(self._wakeup, 1)
                return message, self._held
            if self._lost is not None and not self._error_raised:
                self._error_raised = True
                raise ConnectionError(f"Lost the machine at {self.address[0]}:{self.address[1]}: {self._lost}.")
            return None

    def close(self) -> None:
        """Closes the connection; the other side's `poll` raises. What has not arrived there is dropped: see `can_post`.

        Stop watching `fileno` first.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        os.eventfd_write(self._work, 1)
        self._thread.join()
        os.close(self._work)
        os.close(self._wakeup)
        self._wakeup = -1

    # --- the thread ---

    def _run(self) -> None:
        try:
            self._exchange()
            reason = "closed on this side"
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: torch's
            reason = str(error)
        self._connection.close()
        with self._lock:
            self._lost = reason
            self._outbox.clear()
        os.eventfd_write(self._wakeup, 1)

    def _exchange(self) -> None:
        """Sends and receives in turns whatever there is, until this side closes.

        Raises:
            OSError: if the connection breaks, or the other side gives no sign of life.
            ValueError: if the other side sends something that the protocol does not allow.
        """
        arriving, leaving = self._arriving(), self._leaving()
        unfilled, unsent = next(arriving), memoryview(b"")
        heard, writable, records = time.monotonic(), True, 0
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            selector.register(self._work, selectors.EVENT_READ)
            while not self._closed:
                received = self._attempt(self._connection.recv_into, unfilled)
                if received is not None:
                    if not received:
                        raise ConnectionResetError("the other side closed the connection")
                    heard = time.monotonic()
                    self.bytes_moved += received
                    unfilled = unfilled[received:] or next(arriving)
                unsent = unsent or next(leaving)
                sent = None
                if unsent and writable:
                    try:
                        sent = self._attempt(self._connection.send, unsent[:_RECORD])
                    except OSError:  # reading will raise the reason, after what arrived before the end
                        writable = False
                if sent is not None:
                    self.bytes_moved += sent
                    unsent = unsent[sent:]
                    records += 1
                    if records == _MOST_RECORDS:  # Python's ssl cannot renew a key
                        raise ConnectionAbortedError(
                            "this key has encrypted as much as it may, and a new link gets a new one"
                        )
                if received is not None or sent is not None:
                    continue
                # Checked after reading: a process that was itself stopped first finds what arrived in the meantime.
                if time.monotonic() - heard > self._silence:
                    raise TimeoutError(f"no sign of life in {self._silence:g} s")
                awaits_room = selectors.EVENT_WRITE if unsent and writable else 0
                selector.modify(self._connection, selectors.EVENT_READ | awaits_room)
                selector.select(HEARTBEAT / 2)
                with suppress(BlockingIOError):
                    os.eventfd_read(self._work)

    @staticmethod
    def _attempt(move: Callable[[memoryview], int], data: memoryview) -> int | None:
        """The number of bytes moved, or None if the connection is not ready."""
        try:
            return move(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _arriving(self) -> Iterator[memoryview]:
        """Yields the memory to be filled next with received bytes, and handles it once it is full."""
        frame = memoryview(bytearray(_FRAME.size))
        awaited: Message | None = None  # a message whose vector is not complete yet
        vector, bits = torch.empty(0), 0
        pieces: deque[Tensor] = deque()
        while True:
            yield frame
            what, its_bits, body = _FRAME.unpack(frame)
            if what == _ARRIVED:
                with self._lock:
                    self._arrived += 1
                os.eventfd_write(self._wakeup, 1)
            elif what == _MESSAGE and awaited is None:
                message = MACHINE_MESSAGES.unpack(body)
                if not its_bits:
                    self._deliver(message, None)
                    continue
                if its_bits not in BITS or not self._free:
                    raise ValueError(f"a vector of {its_bits} bits a value, with {len(self._free)} buffers free")
                awaited, bits = message, its_bits
                with self._lock:
                    vector = self._free.pop()
                pieces = deque(vector.split(_PIECE_VALUES))
            elif what == _PIECE and awaited is not None:
                piece = pieces.popleft()
                if bits == 32:
                    yield piece.numpy().data.cast("B")
                else:
                    encoded = torch.empty(encoded_bytes(piece.numel(), bits), dtype=torch.uint8)
                    yield encoded.numpy().data
                    decode(encoded, bits, piece)
                if not pieces:
                    self._deliver(awaited, vector)
                    awaited = None
            elif what != _BEAT:
                raise ValueError(f"an unexpected frame of kind {what}")

    def _deliver(self, message: Message, vector: Tensor | None) -> None:
        with self._lock:
            self._inbox.append((message, vector))
            self._unacknowledged += 1
        os.eventfd_write(self._wakeup, 1)

    def _leaving(self) -> Iterator[memoryview]:
        """Yields the bytes to be sent next; none if there is nothing to send."""
        beaten = 0.0
        pieces: deque[Tensor] = deque()
        bits = 32
        while True:
            if time.monotonic() - beaten >= HEARTBEAT:
                beaten = time.monotonic()
                yield _frame(_BEAT)
            elif self._unacknowledged and self._free:
                with self._lock:
                    self._unacknowledged -= 1
                yield _frame(_ARRIVED)
            elif pieces:
                yield _frame(_PIECE)
                piece = pieces.popleft()
                yield (piece if bits == 32 else encode(piece, bits)).numpy().data.cast("B")
            elif self._outbox:
                message, vector, bits = self._outbox.popleft()
                if vector is not None:
                    pieces.extend(vector.split(_PIECE_VALUES))
                yield _frame(_MESSAGE, 0 if vector is None else bits, MACHINE_MESSAGES.pack(message))
            else:
                yield memoryview(b"")


def _frame(what: int, bits: int = 0, message: bytes = b"") -> memoryview:
    return memoryview(_FRAME.pack(what, bits, message))
