"""Exchange between machines: messages over a TCP connection, vectors over a private Gloo pair beside it.

The global side listens; every machine connects. One connection carries, in this order,

    challenge   global -> machine   a fresh nonce
    join        machine -> global   a fresh nonce, run, fingerprint, vector length, and an HMAC over all of it and
                                    the challenge: proof that the machine knows the secret
    answer      global -> machine   welcome or a reason to refuse, and an HMAC over it and all before: the same proof
    blobs       both ways           where Gloo listens (what its key-value store would hold), so that no second port
                                    and no store is needed
    frames      both ways           messages, their acknowledgements, and a heartbeat twice a second

All of them have a fixed size, and nothing is ever unpickled. After the answer each carries an HMAC under a key of this
connection alone, over its direction and its number, so that none can be forged, replayed, reordered or sent back. A
message that comes with a vector names the vector's SHA-256, and a vector that does not match it ends the connection.

Trust boundary. The secret decides who takes part, and what is said and sent is authentic. Nothing is encrypted: whoever
can read the network between the machines can read the vectors, and hence the weights. Whoever can reach the ports can
disturb a run, though not alter it. Networks that others use call for a tunnel (WireGuard, IPsec); Gloo's own TLS is not
in the wheels of PyTorch. Gloo listens on a port of its own on both sides, chosen by the system, at the address that the
connection above has; firewalls between the machines must let these through.
"""

from __future__ import annotations

import atexit
import hashlib
import hmac
import ipaddress
import logging
import math
import os
import secrets
import selectors
import socket
import stat
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import ProcessGroupGloo, Store, Work

logger = logging.getLogger(__name__)

HEARTBEAT = 0.5  # seconds
SECRET_BYTES = 32

_MAGIC = b"hf_lsam\x01"  # the last byte is the version of what follows
_NONCE_BYTES = 32
_MAC_BYTES = 32
_CHALLENGE = struct.Struct(f"<8s{_NONCE_BYTES}s")
_JOIN = struct.Struct(f"<8s{_NONCE_BYTES}s32s32sQ")  # magic, nonce, SHA-256 of the run id, fingerprint, vector length
_ANSWER = struct.Struct("<8sB")
_KEY_BYTES, _VALUE_BYTES = 64, 1024
_BLOB = struct.Struct(f"<{_KEY_BYTES}sH{_VALUE_BYTES}s")  # key, length, value
_FRAME = struct.Struct("<BBqqqq32s")  # what, whether a vector comes with it, header, SHA-256 of the vector
_JOIN_BYTES = _JOIN.size + _MAC_BYTES
_ANSWER_BYTES = _ANSWER.size + _MAC_BYTES

_GLOBAL, _MACHINE = 0, 1  # ranks in the Gloo pair, and directions of frames
_ROLES = (b"global..", b"machine.")  # in every proof, so that none is one of the other side
_BEAT, _MESSAGE, _READY, _ARRIVED = range(4)  # what a frame is; the receiver of a vector is ready before it is sent
_VECTOR_TAG, _ABORT_TAG = 1, 2
_CHUNK = 1 << 22  # elements; a vector crosses in pieces, so that one that stands still is told from one that is large
_CLOSING = 1.5  # seconds


class Refusal(IntEnum):
    """Why a machine may not join."""

    SECRET = 1
    RUN = 2
    FINGERPRINT = 3
    LENGTH = 4


_REFUSALS = {
    Refusal.SECRET: "One of the two does not know the secret of the other. Copy the secret file of the global server "
    "to this machine (scp -p).",
    Refusal.RUN: "It serves another run. Give all machines of a run the same run id and the address of its server.",
    Refusal.FINGERPRINT: "The trainable parameters of this machine are not those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
    Refusal.LENGTH: "The vectors of this machine have another length than those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
}


class JoinRefused(ValueError):
    """The global server does not take this machine, or is not the one that this machine may trust."""

    def __init__(self, reason: Refusal, address: tuple[str, int]):
        super().__init__(f"The server at {address[0]}:{address[1]} refused ({reason.name}). {_REFUSALS[reason]}")
        self.reason = reason


@dataclass(frozen=True)
class Header:
    """What a message says: four signed 64-bit integers, whose meaning is up to the two sides."""

    kind: int
    a: int = 0
    b: int = 0
    c: int = 0


_NO_HEADER = Header(0)


def new_secret(path: Path) -> None:
    """Writes a fresh secret, readable by this user only, at once or not at all.

    Raises:
        FileExistsError: if there is a file; machines may have copies of its secret.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    finally:
        Path(temporary).unlink()


def read_secret(path: Path) -> bytes:
    """The secret in the file that `new_secret` wrote, or a copy of it.

    Raises:
        ValueError: if others may read or have written the file, or if it holds no secret.
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        content = file.read(4096)
    if status.st_uid != os.geteuid():
        raise ValueError(
            f"{path} belongs to user {status.st_uid}, not to the user of this process ({os.geteuid()}), who could have "
            "put any secret there. Make a copy of your own, with mode 0600."
        )
    if mode := stat.S_IMODE(status.st_mode) & 0o177:
        raise ValueError(
            f"{path} has mode bits {mode:04o} set beyond 0600: other users may know the secret. Make a new one, or, if "
            f"nobody has read it, `chmod 600 {path}`."
        )
    try:
        secret = bytes.fromhex(content.decode("ascii"))
    except ValueError:
        secret = b""
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"{path} holds no secret: at least {2 * SECRET_BYTES} hexadecimal digits. Make a new one.")
    return secret


class Peer:
    """One end of an exchange with another machine; made by `Listener.accept` and `connect`.

    Messages arrive in the order they were posted, each with its vector, if it has one. Three threads do the waiting:
    one for the connection and the heartbeats, one that sends and one that receives vectors. The receiving one fills a
    buffer while the owner holds another; as long as neither is free, the other side's post waits.

    Process: one thread owns it; code that keeps the interpreter's lock for `silence` seconds loses the connection.
    Blocking: `close` only, for moments, at most two seconds.
    """

    def __init__(self, wire: _Wire, group: ProcessGroupGloo, numel: int, silence: float, address: tuple[str, int]):
        self.address = address
        self._wire = wire
        self._group = group
        self._numel = numel
        self._silence = silence
        self._changed = threading.Condition()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._outbox: deque[tuple[Header, Tensor | None]] = deque()
        self._announced: deque[tuple[Header, bool, bytes]] = deque()  # messages whose vectors are still to come
        self._inbox: deque[tuple[Header, Tensor | None]] = deque()
        self._free = [torch.empty(numel, dtype=torch.float32) for _ in range(2)]
        self._held: Tensor | None = None
        self._posted = 0
        self._arrived = 0
        self._ready = False  # the other side has a free buffer for the vector it was told of
        self._delivering = False  # told the other side that a message has arrived, and about to put it into the inbox
        self._lost: str | None = None  # why
        self._closed = False
        self._told = False  # whether `poll` has raised the error
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

    def post(self, header: Header, vector: Tensor | None = None) -> None:
        """Sends a message. Dropped if the connection is lost: the next `poll` says so.

        Args:
            header: what it says. Without a vector it may be posted at any time.
            vector: float32 [d] on CPU, contiguous; to be left as it is until `can_post`.

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
            self._outbox.append((header, None if vector is None else vector.detach()))
            self._changed.notify_all()

    def poll(self) -> tuple[Header, Tensor | None] | None:
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
                header, self._held = self._inbox.popleft()
                if self._lost is not None:
                    os.eventfd_write(self._wakeup, 1)
                return header, self._held
            if self._lost is not None and not self._told and not self._delivering:
                self._told = True
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
        except (OSError, RuntimeError) as error:  # RuntimeError: Gloo's, whose texts do not tell more
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
                        self._tell(_BEAT)
                selector.select(HEARTBEAT / 2)
                while (body := self._wire.receive(_FRAME.size)) is not None:
                    heard = time.monotonic()
                    self._take(*_FRAME.unpack(body))
                # Asked after reading: a process that was itself stopped finds what came in the meantime.
                if time.monotonic() - heard > self._silence:
                    raise TimeoutError(f"no sign of life in {self._silence:g} s")

    def _take(self, what: int, carries: int, kind: int, a: int, b: int, c: int, digest: bytes) -> None:
        with self._changed:
            if what == _MESSAGE:
                self._announced.append((Header(kind, a, b, c), bool(carries), digest))
            elif what == _READY:
                self._ready = True
            elif what == _ARRIVED:
                self._arrived += 1
                os.eventfd_write(self._wakeup, 1)
            self._changed.notify_all()

    def _send(self) -> None:
        while self._until(lambda: self._outbox):
            header, vector = self._outbox.popleft()
            if vector is None:
                self._tell(_MESSAGE, header)
                continue
            digest = hashlib.sha256()
            for chunk in vector.split(_CHUNK):
                digest.update(chunk.numpy())
            self._tell(_MESSAGE, header, digest.digest())
            if not self._until(lambda: self._ready):
                return
            self._ready = False
            for _ in self._cross(self._group.send, vector):
                pass

    def _receive(self) -> None:
        while self._until(lambda: self._announced and (self._free or not self._announced[0][1])):
            header, carries, announced = self._announced.popleft()
            vector = None
            if carries:
                vector = self._free.pop()
                digest = hashlib.sha256()
                self._tell(_READY)
                for chunk in self._cross(self._group.recv, vector):
                    digest.update(chunk.numpy())
                if digest.digest() != announced:
                    raise ConnectionAbortedError("a vector arrived changed")
            self._delivering = True  # the other side may close as soon as it is told, and the message is to be read
            try:
                self._tell(_ARRIVED)  # before the owner sees it, who may then close
            finally:
                with self._changed:
                    self._delivering = False
                    self._inbox.append((header, vector))
                    os.eventfd_write(self._wakeup, 1)

    def _until(self, condition: Callable[[], object]) -> bool:
        """Waits for the condition; False if the connection is lost."""
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._lost is not None)
            return self._lost is None

    def _tell(self, what: int, header: Header = _NO_HEADER, digest: bytes | None = None) -> None:
        self._wire.send(_FRAME.pack(what, digest is not None, *astuple(header), digest or bytes(32)))

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


class Listener:
    """The global side: takes in the machines of one run.

    It has no thread that listens; `accept` does what is due: call it when `fileno` is readable, and now and then. A
    connection that has proved nothing costs one socket and some hundred bytes, for `handshake_timeout` seconds. Gloo's
    pair is made in a thread for each machine.

    Args:
        host: name or address to listen on.
        port: 0 lets the system choose.
        secret: at least 32 bytes, from `read_secret`.
        run_id: the run.
        fingerprint: 32 bytes, of the trainable parameters.
        numel: vector length d.
        allow_remote: listen beyond this machine; read the module's trust boundary first.
        silence: seconds without a sign of life, or for 16 MiB of a vector, after which a machine is lost.
        handshake_timeout: seconds a connection has to prove itself, and again to make the Gloo pair.
        max_strangers: connections that may be open without proof; more are closed at once.

    Raises:
        ValueError: if the host is not loopback and `allow_remote` is not set, or if an argument is out of range.
        OSError: if it cannot listen there.

    Process: one thread owns it. Blocking: construction, to resolve the host; `close`, `handshake_timeout` at most.
    """

    def __init__(
        self,
        host: str,
        port: int,
        secret: bytes,
        run_id: str,
        fingerprint: bytes,
        numel: int,
        allow_remote: bool = False,
        silence: float = 30.0,
        handshake_timeout: float = 10.0,
        max_strangers: int = 64,
    ):
        _check(secret, fingerprint, numel, silence)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        if not allow_remote and not ipaddress.ip_address(resolved[0].partition("%")[0]).is_loopback:
            raise ValueError(
                f"Listening on {resolved[0]} lets other machines connect. Only those that know the secret can join, "
                "but the vectors cross the network unencrypted. Set allow_remote=True if all who can read that network "
                "may know the weights, or let the run through a tunnel."
            )
        self._secret = secret
        self._expected = (_run_digest(run_id), fingerprint, numel)
        self._numel = numel
        self._silence = silence
        self._handshake_timeout = handshake_timeout
        self._max_strangers = max_strangers
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._joining: dict[threading.Thread, socket.socket] = {}
        self._joined: deque[Peer] = deque()
        self._closed = False
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.EpollSelector()
        self._socket = socket.create_server(resolved[:2], family=family, backlog=128)
        self._socket.setblocking(False)
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        atexit.register(self.close)

    def fileno(self) -> int:
        """Readable when `accept` has something to do."""
        return self._selector.fileno()

    def accept(self) -> list[Peer]:
        """Goes on with all handshakes as far as it can without waiting; returns the machines that have joined."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._socket:
                self._welcome_strangers()
            elif key.fileobj is self._wakeup:
                os.eventfd_read(self._wakeup)
            else:
                self._listen_to(key.fileobj)
        now = time.monotonic()
        for connection in [each for each, stranger in self._strangers.items() if stranger.deadline < now]:
            self._drop(connection, "it did not complete the handshake in time")
        self._joining = {thread: connection for thread, connection in self._joining.items() if thread.is_alive()}
        peers = []
        while self._joined:
            peers.append(self._joined.popleft())
        return peers

    def close(self) -> None:
        """Stops listening. Machines that `accept` has returned stay connected."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for connection in self._joining.values():
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._joining:
            thread.join()
        for peer in self._joined:
            peer.close()
        self._selector.close()
        for connection in (self._socket, *self._strangers):
            connection.close()
        os.close(self._wakeup)

    def _welcome_strangers(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # it has gone again, or this process has no file descriptor left
                logger.warning("could not take in a connection: %s", error)
                return
            if len(self._strangers) >= self._max_strangers:
                logger.info(
                    "closed a connection from %s: %d others have yet to prove themselves",
                    address[0],
                    len(self._strangers),
                )
                connection.close()
                continue
            connection.setblocking(False)
            nonce = secrets.token_bytes(_NONCE_BYTES)
            with suppress(OSError):
                connection.send(_CHALLENGE.pack(_MAGIC, nonce))
            self._strangers[connection] = _Stranger(address[:2], nonce, time.monotonic() + self._handshake_timeout)
            self._selector.register(connection, selectors.EVENT_READ)

    def _listen_to(self, connection: socket.socket) -> None:
        stranger = self._strangers[connection]
        try:
            chunk = connection.recv(_JOIN_BYTES - len(stranger.said))
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(connection, "it closed the connection before it had proved itself")
            return
        stranger.said += chunk
        if not _MAGIC.startswith(stranger.said[: len(_MAGIC)]):
            self._drop(connection, "it does not speak this protocol, or another version of it")
        elif len(stranger.said) == _JOIN_BYTES:
            self._judge(connection, stranger)

    def _judge(self, connection: socket.socket, stranger: _Stranger) -> None:
        join, proof = stranger.said[: _JOIN.size], stranger.said[_JOIN.size :]
        transcript = stranger.nonce + join
        if not hmac.compare_digest(proof, _proof(self._secret, _MACHINE, transcript)):
            answer, mac = _ANSWER.pack(_MAGIC, Refusal.SECRET), bytes(_MAC_BYTES)
        else:
            answer = _ANSWER.pack(_MAGIC, self._verdict(join))
            mac = _proof(self._secret, _GLOBAL, transcript + answer)
        refusal = answer[-1]
        if refusal:
            logger.warning("refused a machine at %s: %s", stranger.address[0], Refusal(refusal).name)
        with suppress(OSError):
            connection.send(answer + mac)
        if refusal:
            self._drop(connection, "refused")
            return
        self._forget(connection)
        wire = _Wire(connection, _session_key(self._secret, transcript), _GLOBAL)
        thread = threading.Thread(
            target=self._join, args=(wire, stranger.address), name=f"hf_lsam-joining-{stranger.address[0]}", daemon=True
        )
        self._joining[thread] = connection
        thread.start()

    def _verdict(self, join: bytes) -> int:
        """0, or the reason to refuse a machine that has proved itself."""
        stated = _JOIN.unpack(join)[2:]
        reasons = (Refusal.RUN, Refusal.FINGERPRINT, Refusal.LENGTH)
        wrong = (reason for reason, ours, its in zip(reasons, self._expected, stated, strict=True) if ours != its)
        return next(wrong, 0)

    def _join(self, wire: _Wire, address: tuple[str, int]) -> None:
        try:
            group = _make_pair(wire, self._handshake_timeout)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("a machine at %s did not complete its join: %s", address[0], error)
            wire.socket.close()
            return
        self._joined.append(Peer(wire, group, self._numel, self._silence, address))
        os.eventfd_write(self._wakeup, 1)

    def _drop(self, connection: socket.socket, reason: str) -> None:
        logger.info("closed a connection from %s: %s", self._strangers[connection].address[0], reason)
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._strangers[connection]


def connect(
    address: tuple[str, int],
    secret: bytes,
    run_id: str,
    fingerprint: bytes,
    numel: int,
    timeout: float = 60.0,
    silence: float = 30.0,
) -> Peer:
    """Joins the run at `address`, and tries again until `timeout` if nobody answers there.

    Args:
        address: host and port of the listener.
        secret, run_id, fingerprint, numel: as the listener's.
        timeout: seconds in all.
        silence: seconds without a sign of life, or for 16 MiB of a vector, after which the global side is lost.

    Raises:
        JoinRefused: if either side does not accept the other.
        ConnectionError: if it did not work in time.

    Blocking: until joined.
    """
    _check(secret, fingerprint, numel, silence)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _connect_once(address, secret, run_id, fingerprint, numel, deadline, silence)
        except (OSError, RuntimeError) as error:  # RuntimeError: Gloo's
            if time.monotonic() + HEARTBEAT >= deadline:
                raise ConnectionError(
                    f"Could not join the run at {address[0]}:{address[1]} within {timeout:g} s ({error}). Is the "
                    "global server up, and do firewalls let the two reach each other, also at the ports Gloo opens?"
                ) from error
            logger.info("no way to %s:%d yet: %s", *address, error)
        time.sleep(HEARTBEAT)


def _connect_once(
    address: tuple[str, int],
    secret: bytes,
    run_id: str,
    fingerprint: bytes,
    numel: int,
    deadline: float,
    silence: float,
) -> Peer:
    connection = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
    try:
        magic, challenge = _CHALLENGE.unpack(_read_exactly(connection, _CHALLENGE.size, deadline))
        if magic != _MAGIC:
            raise ConnectionError("what listens there does not speak this protocol, or another version of it")
        join = _JOIN.pack(_MAGIC, secrets.token_bytes(_NONCE_BYTES), _run_digest(run_id), fingerprint, numel)
        transcript = challenge + join
        connection.sendall(join + _proof(secret, _MACHINE, transcript))
        reply = _read_exactly(connection, _ANSWER_BYTES, deadline)
        answer, mac = reply[: _ANSWER.size], reply[_ANSWER.size :]
        # A refusal for want of proof cannot be proved to one who has another secret.
        if not hmac.compare_digest(mac, _proof(secret, _GLOBAL, transcript + answer)):
            raise JoinRefused(Refusal.SECRET, address)
        if refusal := answer[-1]:
            raise JoinRefused(Refusal(refusal), address)
        wire = _Wire(connection, _session_key(secret, transcript), _MACHINE)
        group = _make_pair(wire, max(deadline - time.monotonic(), HEARTBEAT))
        return Peer(wire, group, numel, silence, address)
    except BaseException:
        connection.close()
        raise


@dataclass
class _Stranger:
    """A connection that has proved nothing yet."""

    address: tuple[str, int]
    nonce: bytes
    deadline: float
    said: bytes = b""


class _Wire:
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
        whole = size + _MAC_BYTES
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


class _WireStore(Store):
    """What Gloo needs of a store to find its pair, over the wire: `set` sends, `get` receives."""

    def __init__(self, wire: _Wire, timeout: float):
        super().__init__()
        self._wire = wire
        self._deadline = time.monotonic() + timeout
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
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


def _make_pair(wire: _Wire, timeout: float) -> ProcessGroupGloo:
    """A process group of the two sides of `wire`, at the address that it has on this machine.

    Raises:
        OSError or RuntimeError: if the other side does not do the same within `timeout` seconds.
    """
    options = ProcessGroupGloo._Options()
    # By address: the host's name may resolve to another interface, or not at all.
    options._devices = [ProcessGroupGloo.create_device(hostname=wire.socket.getsockname()[0], lazy_init=False)]
    options._timeout = timedelta(seconds=timeout)
    return ProcessGroupGloo(_WireStore(wire, timeout), wire.rank, 2, options)


def _read_exactly(connection: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ConnectionResetError("the other side closed the connection during the handshake")
        data += chunk
    return data


def _proof(secret: bytes, rank: int, transcript: bytes) -> bytes:
    return hmac.digest(secret, _ROLES[rank] + transcript, "sha256")


def _session_key(secret: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, b"session." + transcript, "sha256")


def _run_digest(run_id: str) -> bytes:
    return hashlib.sha256(run_id.encode()).digest()


def _check(secret: bytes, fingerprint: bytes, numel: int, silence: float) -> None:
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"A secret has at least {SECRET_BYTES} bytes, not {len(secret)}. Make one with new_secret().")
    if len(fingerprint) != 32:
        raise ValueError(f"A fingerprint has 32 bytes, not {len(fingerprint)}.")
    if numel < 1:
        raise ValueError(f"A vector has at least one element, not {numel}.")
    if silence < 4 * HEARTBEAT:
        raise ValueError(
            f"silence={silence:g} s is less than {4 * HEARTBEAT:g} s: a few late heartbeats would end a run."
        )
