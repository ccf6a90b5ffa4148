"""One end of an exchange with another machine: messages over an authenticated connection, vectors over Gloo.

    frames      messages, their acknowledgements, and a heartbeat twice a second; all of one size
    vectors     over the Gloo pair beside, each after the message that names its SHA-256; float32, or in fewer bits
                (see `compression`)

A vector that is not what was announced ends the connection.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Work

from ..compression import BITS, decode, encode, encoded_bytes
from .messages import MACHINE_MESSAGES, Message
from .wire import Wire

HEARTBEAT = 0.5  # seconds

_FRAME = struct.Struct(f"<BB{MACHINE_MESSAGES.size}s32s")  # what, bits a value of its vector or 0, message, SHA-256
_BEAT, _MESSAGE, _READY, _ARRIVED = range(4)  # what a frame is; the receiver of a vector is ready before it is sent
_VECTOR_TAG, _ABORT_TAG = 1, 2
_CHUNK = 1 << 22  # elements; a vector crosses in pieces, so that one that stands still is told from one that is large
_CLOSING = 1.5  # seconds


class Peer:
    """One end of an exchange with another machine; made by `Listener.accept` and `connect`.

    Messages arrive in the order they were posted, each with its vector, if it has one. Three threads do the waiting:
    one for the connection and the heartbeats, one that sends and one that receives vectors. The receiving one fills a
    buffer while the owner holds another; as long as neither is free, the other side's post waits.

    Process: one thread owns it; code that keeps the interpreter's lock for `silence` seconds loses the connection.
    Blocking: `close` only, for moments, at most two seconds.
    """

    def __init__(self, wire: Wire, group: ProcessGroupGloo, numel: int, silence: float, address: tuple[str, int]):
        self.address = address
        self._wire = wire
        self._group: Any = group  # torch's stub knows neither `send` nor `recv`
        self._numel = numel
        self._silence = silence
        self._changed = threading.Condition()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._outbox: deque[tuple[Message, Tensor | None, int]] = deque()
        self._announced: deque[tuple[Message, int, bytes]] = deque()  # messages whose vectors are still to come
        self._inbox: deque[tuple[Message, Tensor | None]] = deque()
        self._free = [torch.empty(numel, dtype=torch.float32) for _ in range(2)]
        self._held: Tensor | None = None
        self._posted = 0
        self._arrived = 0
        self._ready = False  # the other side has a free buffer for the vector that was announced
        self._delivering = False  # acknowledged a message, and about to put it into the inbox
        self._lost: str | None = None  # why
        self._closed = False
        self._error_raised = False  # whether `poll` has raised the error
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=f"hf_lsam-peer-{work.__name__}", daemon=True)
            for work in (self._watch, self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # an interpreter that ends under a thread inside Gloo aborts

    def fileno(self) -> int:
        """Readable when `poll` or `can_post` may have something new."""
        return self._wakeup

    @property
    def can_post(self) -> bool:
        """Whether all that was posted has arrived on the other side, so that its vectors may be written again."""
        with self._changed:
            return self._posted == self._arrived and self._lost is None

    def post(self, message: Message, vector: Tensor | None = None, bits: int = 32) -> None:
        """Sends a message. Dropped if the connection is lost: the next `poll` says so.

        Args:
            message: one of `MACHINE_MESSAGES`. Without a vector it may be posted at any time.
            vector: float32 [d] on CPU, contiguous; to be left as it is until `can_post`.
            bits: of each of its values on the way; it arrives as `compression.rounded` would make it.

        Raises:
            ValueError: if the vector is not such a one, or not `can_post`.
        """
        if vector is not None:
            if vector.shape != (self._numel,) or vector.dtype != torch.float32 or vector.device.type != "cpu":
                raise ValueError(
                    f"Vectors of this exchange are float32 [{self._numel}] on CPU, not {vector.dtype} "
                    f"{list(vector.shape)} on {vector.device}."
                )
            if not vector.is_contiguous():
                raise ValueError("A vector must be contiguous to be sent. Call .contiguous() on it.")
        with self._changed:
            if self._lost is not None:
                return
            if vector is not None and self._posted != self._arrived:
                raise ValueError("The last message has not arrived yet. Post a vector only when `can_post`.")
            self._posted += 1
            self._outbox.append((message, None if vector is None else vector.detach(), bits))
            self._changed.notify_all()

    def poll(self) -> tuple[Message, Tensor | None] | None:
        """The next message, if one has arrived. Its vector float32 [d] may be read and written until the next call.

        Raises:
            ConnectionError: once, after the last message, if the other side is lost.
        """
        with self._changed:
            if self._held is not None:
                self._free.append(self._held)
                self._held = None
                self._changed.notify_all()
            if len(self._inbox) <= 1:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wakeup)
            if self._inbox:
                message, self._held = self._inbox.popleft()
                if self._lost is not None:
                    os.eventfd_write(self._wakeup, 1)
                return message, self._held
            if self._lost is not None and not self._error_raised and not self._delivering:
                self._error_raised = True
                raise ConnectionError(f"Lost the machine at {self.address[0]}:{self.address[1]}: {self._lost}.")
            return None

    def close(self) -> None:
        """Leaves; the other side's `poll` raises. What has not arrived there is dropped: see `can_post`.

        Unregister `fileno` first.
        """
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._lose("closed on this side")
        deadline = time.monotonic() + _CLOSING
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():  # see `_cross`
                atexit.register(thread.join)
        self._wire.socket.close()
        os.close(self._wakeup)
        self._wakeup = -1
        if not any(thread.is_alive() for thread in self._threads):
            self._group = None  # and with it Gloo's threads and connections

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: Gloo's, whose texts do not tell more
            self._lose(str(error).partition(". This is typically")[0])

    def _lose(self, reason: str) -> None:
        """Ends the connection and whatever waits for it."""
        with self._changed:
            if self._lost is None:
                self._lost = reason
                os.eventfd_write(self._wakeup, 1)
            self._changed.notify_all()
        with suppress(OSError):
            self._wire.socket.shutdown(socket.SHUT_RDWR)
        with suppress(RuntimeError):
            # `abort` and `shutdown` of the group leave waiting operations waiting. One that times out does not: it
            # closes the pair, and all that wait for it return.
            never_sent = torch.empty(1)
            self._group.recv([never_sent], 1 - self._wire.rank, _ABORT_TAG).wait(timedelta(milliseconds=1))

    def _watch(self) -> None:
        """Reads the connection, and keeps both sides sure of each other."""
        heard = time.monotonic()
        beaten = -math.inf
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.socket, selectors.EVENT_READ)
            while self._lost is None:
                if time.monotonic() - beaten >= HEARTBEAT:
                    beaten = time.monotonic()
                    with suppress(OSError):  # reading tells, and first brings in what came before the end
                        self._send_frame(_BEAT)
                selector.select(HEARTBEAT / 2)
                while (body := self._wire.receive(_FRAME.size)) is not None:
                    heard = time.monotonic()
                    self._take(*_FRAME.unpack(body))
                # Asked after reading: a process that was itself stopped finds what came in the meantime.
                if time.monotonic() - heard > self._silence:
                    raise TimeoutError(f"no sign of life in {self._silence:g} s")

    def _take(self, what: int, bits: int, frame: bytes, digest: bytes) -> None:
        with self._changed:
            if what == _MESSAGE:
                if bits not in (0, *BITS):
                    raise ValueError(f"a vector of {bits} bits a value was announced")
                self._announced.append((MACHINE_MESSAGES.unpack(frame), bits, digest))
            elif what == _READY:
                self._ready = True
            elif what == _ARRIVED:
                self._arrived += 1
                os.eventfd_write(self._wakeup, 1)
            self._changed.notify_all()

    def _send(self) -> None:
        while self._until(lambda: self._outbox):
            message, vector, bits = self._outbox.popleft()
            if vector is None:
                self._send_frame(_MESSAGE, message)
                continue
            if bits < 32:
                vector = encode(vector, bits)
            digest = hashlib.sha256()
            for chunk in vector.split(_CHUNK):
                digest.update(chunk.numpy())
            self._send_frame(_MESSAGE, message, bits, digest.digest())
            if not self._until(lambda: self._ready):
                return
            self._ready = False
            for _ in self._cross(self._group.send, vector):
                pass

    def _receive(self) -> None:
        while self._until(lambda: self._announced and (self._free or not self._announced[0][1])):
            message, bits, announced = self._announced.popleft()
            vector = None
            if bits:
                vector = self._free.pop()
                arriving = vector if bits == 32 else torch.empty(encoded_bytes(self._numel, bits), dtype=torch.uint8)
                digest = hashlib.sha256()
                self._send_frame(_READY)
                for chunk in self._cross(self._group.recv, arriving):
                    digest.update(chunk.numpy().data)
                if digest.digest() != announced:
                    raise ConnectionAbortedError("a vector arrived changed")
                if bits < 32:
                    decode(arriving, bits, vector)
            self._delivering = (
                True  # the other side may close once it has the acknowledgement, and the message is to be read
            )
            try:
                self._send_frame(_ARRIVED)  # before the owner sees it, who may then close
            finally:
                with self._changed:
                    self._delivering = False
                    self._inbox.append((message, vector))
                    os.eventfd_write(self._wakeup, 1)

    def _until(self, condition: Callable[[], object]) -> bool:
        """Waits for the condition; False if the connection is lost."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._lost is not None)
            return self._lost is None

    def _send_frame(self, what: int, message: Message | None = None, bits: int = 0, digest: bytes = bytes(32)) -> None:
        frame = b"" if message is None else MACHINE_MESSAGES.pack(message)
        self._wire.send(_FRAME.pack(what, bits, frame, digest))

    def _cross(self, way: Callable[[list[Tensor], int, int], Work], vector: Tensor) -> Iterator[Tensor]:
        """Sends or receives a vector; yields its pieces as they have crossed.

        Raises:
            RuntimeError: if the connection is lost, or a piece has not crossed in time. The wait has an end of its own
                because Gloo forgets to wake it if the connection breaks in the moment at which the piece begins.
        """
        chunks = vector.split(_CHUNK)
        under_way = [way([chunk], 1 - self._wire.rank, _VECTOR_TAG) for chunk in chunks]
        for chunk, work in zip(chunks, under_way, strict=True):
            work.wait(timedelta(seconds=self._silence))
            yield chunk
