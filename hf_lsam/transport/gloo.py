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
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from .base import RefusedError
from .messages import Refusal
from .peer import HEARTBEAT, Peer
from .secret import SECRET_BYTES
from .wire import GLOBAL, MAC_BYTES, MACHINE, Wire, make_pair

logger = logging.getLogger(__name__)

_MAGIC = b"hf_lsam\x01"  # the last byte is the version of what follows
_NONCE_BYTES = 32
_CHALLENGE = struct.Struct(f"<8s{_NONCE_BYTES}s")
_JOIN = struct.Struct(f"<8s{_NONCE_BYTES}s32s32sQ")  # magic, nonce, SHA-256 of the run id, fingerprint, vector length
_ANSWER = struct.Struct("<8sB")
_JOIN_BYTES = _JOIN.size + MAC_BYTES
_ANSWER_BYTES = _ANSWER.size + MAC_BYTES
_ROLES = (b"global..", b"machine.")  # in every proof, so that none is one of the other side


_REFUSALS = {
    Refusal.SECRET: "One of the two does not know the secret of the other. Copy the secret file of the global server "
    "to this machine (scp -p).",
    Refusal.RUN: "It serves another run. Give all machines of a run the same run id and the address of its server.",
    Refusal.FINGERPRINT: "The trainable parameters of this machine are not those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
    Refusal.LENGTH: "The vectors of this machine have another length than those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
}


class JoinRefused(RefusedError):
    """The global server does not take this machine, or is not the one that this machine may trust."""

    def __init__(self, reason: Refusal, address: tuple[str, int]):
        super().__init__(f"The server at {address[0]}:{address[1]} refused ({reason.name}). {_REFUSALS[reason]}")
        self.reason = reason


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
        max_pending: connections that may be open without proof; more are closed at once.

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
        max_pending: int = 64,
    ):
        _check(secret, fingerprint, numel, silence)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        if not allow_remote and not ipaddress.ip_address(str(resolved[0]).partition("%")[0]).is_loopback:
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
        self._max_pending = max_pending
        self._pending: dict[socket.socket, _PendingConnection] = {}
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
                self._accept_connections()
            elif key.fileobj is self._wakeup:
                os.eventfd_read(self._wakeup)
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._read(key.fileobj)
        now = time.monotonic()
        for connection in [each for each, pending in self._pending.items() if pending.deadline < now]:
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
        for connection in (self._socket, *self._pending):
            connection.close()
        os.close(self._wakeup)

    def _accept_connections(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # it has gone again, or this process has no file descriptor left
                logger.warning("could not take in a connection: %s", error)
                return
            if len(self._pending) >= self._max_pending:
                logger.info(
                    "closed a connection from %s: %d others have yet to prove themselves",
                    address[0],
                    len(self._pending),
                )
                connection.close()
                continue
            connection.setblocking(False)
            nonce = secrets.token_bytes(_NONCE_BYTES)
            with suppress(OSError):
                connection.send(_CHALLENGE.pack(_MAGIC, nonce))
            self._pending[connection] = _PendingConnection(
                address[:2], nonce, time.monotonic() + self._handshake_timeout
            )
            self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        pending = self._pending[connection]
        try:
            chunk = connection.recv(_JOIN_BYTES - len(pending.received))
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._drop(connection, "it closed the connection before it had proved itself")
            return
        pending.received += chunk
        if not _MAGIC.startswith(pending.received[: len(_MAGIC)]):
            self._drop(connection, "it does not speak this protocol, or another version of it")
        elif len(pending.received) == _JOIN_BYTES:
            self._verify(connection, pending)

    def _verify(self, connection: socket.socket, pending: _PendingConnection) -> None:
        join, proof = pending.received[: _JOIN.size], pending.received[_JOIN.size :]
        transcript = pending.nonce + join
        if not hmac.compare_digest(proof, _proof(self._secret, MACHINE, transcript)):
            answer, mac = _ANSWER.pack(_MAGIC, Refusal.SECRET), bytes(MAC_BYTES)
        else:
            answer = _ANSWER.pack(_MAGIC, self._verdict(join))
            mac = _proof(self._secret, GLOBAL, transcript + answer)
        refusal = answer[-1]
        if refusal:
            logger.warning("refused a machine at %s: %s", pending.address[0], Refusal(refusal).name)
        with suppress(OSError):
            connection.send(answer + mac)
        if refusal:
            self._drop(connection, "refused")
            return
        self._forget(connection)
        wire = Wire(connection, _session_key(self._secret, transcript), GLOBAL)
        thread = threading.Thread(
            target=self._join, args=(wire, pending.address), name=f"hf_lsam-joining-{pending.address[0]}", daemon=True
        )
        self._joining[thread] = connection
        thread.start()

    def _verdict(self, join: bytes) -> int:
        """0, or the reason to refuse a machine that has proved itself."""
        stated = _JOIN.unpack(join)[2:]
        reasons = (Refusal.RUN, Refusal.FINGERPRINT, Refusal.LENGTH)
        wrong = (reason for reason, ours, its in zip(reasons, self._expected, stated, strict=True) if ours != its)
        return next(wrong, 0)

    def _join(self, wire: Wire, address: tuple[str, int]) -> None:
        try:
            group = make_pair(wire, self._handshake_timeout)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("a machine at %s did not complete its join: %s", address[0], error)
            wire.socket.close()
            return
        self._joined.append(Peer(wire, group, self._numel, self._silence, address))
        os.eventfd_write(self._wakeup, 1)

    def _drop(self, connection: socket.socket, reason: str) -> None:
        logger.info("closed a connection from %s: %s", self._pending[connection].address[0], reason)
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._pending[connection]


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
        connection.sendall(join + _proof(secret, MACHINE, transcript))
        reply = _read_exactly(connection, _ANSWER_BYTES, deadline)
        answer, mac = reply[: _ANSWER.size], reply[_ANSWER.size :]
        # A refusal for want of proof cannot be proved to one who has another secret.
        if not hmac.compare_digest(mac, _proof(secret, GLOBAL, transcript + answer)):
            raise JoinRefused(Refusal.SECRET, address)
        if refusal := answer[-1]:
            raise JoinRefused(Refusal(refusal), address)
        wire = Wire(connection, _session_key(secret, transcript), MACHINE)
        group = make_pair(wire, max(deadline - time.monotonic(), HEARTBEAT))
        return Peer(wire, group, numel, silence, address)
    except BaseException:
        connection.close()
        raise


@dataclass
class _PendingConnection:
    """A connection that has proved nothing yet."""

    address: tuple[str, int]
    nonce: bytes
    deadline: float
    received: bytes = b""


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
