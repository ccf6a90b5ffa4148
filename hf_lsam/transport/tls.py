"""Links between machines: one TLS connection each, open to those that know the secret of the run.

The root listens at one port; every other machine connects to it. TLS 1.3 encrypts and authenticates: both sides prove
that they hold the key derived from the secret (see `secret`), nobody on the way can read what is sent, and data that
was changed, dropped, replayed or reflected on the way ends the connection and is never delivered. Then, in frames of
one size (see `messages`),

    OpenLink      machine -> root   run, fingerprint, vector length
    LinkOpened    root -> machine   or `Refused`, with the reason
    ...           both ways         the messages and vectors of `peer`

Trust boundary. The secret decides who takes part, and who can read what is sent. Anyone who can reach the port can
disturb a run, but can neither alter it nor read any of it.
"""

from __future__ import annotations

import atexit
import hashlib
import ipaddress
import logging
import os
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from contextlib import suppress

from .base import RefusedError
from .messages import MACHINE_MESSAGES, LinkOpened, Message, OpenLink, Refusal, Refused
from .peer import HEARTBEAT, Peer
from .secret import SECRET_BYTES, derive_certificate

logger = logging.getLogger(__name__)

_REFUSALS = {
    Refusal.SECRET: "One of the two does not know the secret of the other. Copy the secret file of the global server "
    "to this machine (scp -p).",
    Refusal.RUN: "It serves another run. Give this machine the address of its own run's server.",
    Refusal.FINGERPRINT: "The trainable parameters of this machine are not those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
    Refusal.LENGTH: "The vectors of this machine have another length than those of the run. Build the same model with "
    "the same frozen parameters on every machine.",
}


class JoinRefused(RefusedError):
    """The root server does not accept this machine, or is not one that this machine may trust."""

    def __init__(self, reason: Refusal, address: tuple[str, int]):
        super().__init__(f"The server at {address[0]}:{address[1]} refused ({reason.name}). {_REFUSALS[reason]}")
        self.reason = reason


class Listener:
    """The root's side: accepts the machines of one run.

    `accept` does what is due without waiting: call it when `fileno` is readable, and from time to time. A connection
    that has proved nothing costs a socket and a thread, for `handshake_timeout` seconds.

    Args:
        host: name or address to listen on.
        port: 0 lets the system choose.
        secret: at least 32 bytes, from `read_secret`.
        run_id: id of the run.
        fingerprint: 32 bytes, of the trainable parameters.
        numel: vector length d.
        allow_remote: listen beyond this machine; read the module's trust boundary first.
        silence: seconds without a sign of life after which a machine counts as lost.
        handshake_timeout: seconds that a connection has to prove itself.
        max_pending: pending connections, those without proof, that may be open at a time; more are closed at once.

    Raises:
        ValueError: if the host is not loopback and `allow_remote` is not set, or if an argument is out of range.
        OSError: if it cannot listen there.

    Process: one thread owns it. Blocking: construction, to resolve the host; `close`, briefly.
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
        self._expected = _open_link(run_id, fingerprint, numel)
        self._context = _context(secret, ssl.PROTOCOL_TLS_SERVER)
        _check_silence(silence)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, resolved = found[0]
        if not allow_remote and not ipaddress.ip_address(str(resolved[0]).partition("%")[0]).is_loopback:
            raise ValueError(
                f"Listening on {resolved[0]} lets other machines connect. Only those that know the secret can join or "
                "read anything, but whoever reaches the port can disturb a run. Set allow_remote=True if that network "
                "is to reach it."
            )
        self._silence = silence
        self._handshake_timeout = handshake_timeout
        self._max_pending = max_pending
        self._joining: dict[threading.Thread, ssl.SSLSocket] = {}
        self._joined: deque[Peer] = deque()
        self._closed = False
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._socket = socket.create_server(resolved[:2], family=family, backlog=128)
        self._socket.setblocking(False)
        self._selector = selectors.EpollSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        atexit.register(self.close)

    def fileno(self) -> int:
        """Readable when `accept` has something to do."""
        return self._selector.fileno()

    def accept(self) -> list[Peer]:
        """Accepts new connections; returns the machines that have joined since the last call."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)
        self._forget_ended()
        while (accepted := self._next_connection()) is not None:
            connection, address = accepted
            self._forget_ended()
            if len(self._joining) >= self._max_pending:
                logger.info(
                    "closed a connection from %s: %d others have not authenticated yet", address[0], self._max_pending
                )
                connection.close()
                continue
            try:
                connection.settimeout(self._handshake_timeout)
                connection.getpeername()  # of one that was reset there is none, and `wrap_socket` would not close it
                wrapped = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            except OSError as error:  # it was reset before it has said anything that could be read
                logger.info("closed a connection from %s: %s", address[0], error)
                connection.close()
                continue
            name = f"hf_lsam-joining-{address[0]}"
            thread = threading.Thread(target=self._join, args=(wrapped, address), name=name, daemon=True)
            self._joining[thread] = wrapped
            thread.start()
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
        self._selector.close()
        self._socket.close()
        for thread, connection in self._joining.items():
            with suppress(OSError):
                _shut(connection)
            thread.join()
        for peer in self._joined:
            peer.close()
        os.close(self._wakeup)

    def _next_connection(self) -> tuple[socket.socket, tuple[str, int]] | None:
        try:
            connection, address = self._socket.accept()
        except BlockingIOError:
            return None
        except OSError as error:  # the peer has gone already, or this process has no file descriptor left
            logger.warning("could not take in a connection: %s", error)
            return None
        return connection, address[:2]

    def _forget_ended(self) -> None:
        self._joining = {thread: connection for thread, connection in self._joining.items() if thread.is_alive()}

    def _join(self, connection: ssl.SSLSocket, address: tuple[str, int]) -> None:
        """Runs in a thread of its own, from the connection of a machine until it has joined or was refused."""
        try:
            connection.do_handshake()
            asked = _receive(connection)
            refusal = self._refusal(asked)
            connection.sendall(MACHINE_MESSAGES.pack(LinkOpened() if refusal is None else Refused(refusal)))
        except ssl.SSLError as error:
            logger.warning("refused a machine at %s: %s (%s)", address[0], Refusal.SECRET.name, error.reason or error)
            connection.close()
        except (OSError, ValueError) as error:
            logger.info("closed a connection from %s: %s", address[0], error)
            connection.close()
        else:
            if refusal is None:
                self._joined.append(Peer(connection, self._expected.numel, self._silence, address))
            else:
                logger.warning("refused a machine at %s: %s", address[0], refusal.name)
                connection.close()
        os.eventfd_write(self._wakeup, 1)

    def _refusal(self, asked: Message) -> Refusal | None:
        if not isinstance(asked, OpenLink):
            raise ValueError(f"the first message was {asked}")
        if asked.run != self._expected.run:
            return Refusal.RUN
        if asked.fingerprint != self._expected.fingerprint:
            return Refusal.FINGERPRINT
        if asked.numel != self._expected.numel:
            return Refusal.LENGTH
        return None


def connect(
    address: tuple[str, int],
    secret: bytes,
    run_id: str,
    fingerprint: bytes,
    numel: int,
    timeout: float = 60.0,
    silence: float = 30.0,
) -> Peer:
    """Joins the run at `address`; if nobody answers there, tries again until `timeout`.

    Args:
        address: host and port of the listener.
        secret, run_id, fingerprint, numel: the same as the listener's.
        timeout: seconds in total.
        silence: seconds without a sign of life after which the root counts as lost.

    Raises:
        JoinRefused: if either side does not accept the other.
        ConnectionError: if it did not succeed in time.

    Blocking: until joined.
    """
    opening = _open_link(run_id, fingerprint, numel)
    context = _context(secret, ssl.PROTOCOL_TLS_CLIENT)
    _check_silence(silence)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return _connect_once(address, context, opening, deadline, silence)
        except OSError as error:
            if time.monotonic() + HEARTBEAT >= deadline:
                raise ConnectionError(
                    f"Could not join the run at {address[0]}:{address[1]} within {timeout:g} s ({error}). Is the "
                    "global server up, and do firewalls let this machine reach that port?"
                ) from error
            logger.info("no way to %s:%d yet: %s", *address, error)
        time.sleep(HEARTBEAT)


def _connect_once(
    address: tuple[str, int], context: ssl.SSLContext, opening: OpenLink, deadline: float, silence: float
) -> Peer:
    def remaining() -> float:
        return max(deadline - time.monotonic(), 0.001)

    plain = socket.create_connection(address, timeout=remaining())
    connection = context.wrap_socket(plain, do_handshake_on_connect=False)
    try:
        connection.settimeout(remaining())
        try:
            connection.do_handshake()
        except ssl.SSLCertVerificationError:
            raise JoinRefused(Refusal.SECRET, address) from None
        connection.sendall(MACHINE_MESSAGES.pack(opening))
        connection.settimeout(remaining())
        match _receive(connection):
            case LinkOpened():
                return Peer(connection, opening.numel, silence, address)
            case Refused(reason) if reason in _REFUSALS:
                raise JoinRefused(reason, address)
            case answer:
                raise ConnectionError(f"what listens there answered {answer}")
    except BaseException:
        connection.close()
        raise


def _receive(connection: ssl.SSLSocket) -> Message:
    """The next message of a connection that has proved itself."""
    frame = b""
    while len(frame) < MACHINE_MESSAGES.size:
        chunk = connection.recv(MACHINE_MESSAGES.size - len(frame))
        if not chunk:
            raise ConnectionResetError("the other side closed the connection before the link was open")
        frame += chunk
    return MACHINE_MESSAGES.unpack(frame)


def _shut(connection: ssl.SSLSocket) -> None:
    """Interrupts what another thread does with the connection. `SSLSocket.shutdown` would discard the TLS state that
    this thread is using."""
    socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _context(secret: bytes, side: ssl._SSLMethod) -> ssl.SSLContext:
    """A TLS context that presents, and accepts, only the certificate derived from the secret."""
    if len(secret) < SECRET_BYTES:
        raise ValueError(f"A secret has at least {SECRET_BYTES} bytes, not {len(secret)}. Make one with new_secret().")
    key, certificate = derive_certificate(secret)
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # machines have different names and share one certificate
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate.decode())
    # Python's ssl reads keys from files only, so this is a file in memory, which no other process sees.
    with os.fdopen(os.memfd_create("hf_lsam", os.MFD_CLOEXEC), "wb") as file:
        file.write(key + certificate)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


def _open_link(run_id: str, fingerprint: bytes, numel: int) -> OpenLink:
    if len(fingerprint) != 32:
        raise ValueError(f"A fingerprint has 32 bytes, not {len(fingerprint)}.")
    if numel < 1:
        raise ValueError(f"A vector has at least one element, not {numel}.")
    return OpenLink(hashlib.sha256(run_id.encode()).digest(), fingerprint, numel)


def _check_silence(silence: float) -> None:
    if silence < 4 * HEARTBEAT:
        raise ValueError(
            f"silence={silence:g} s is less than {4 * HEARTBEAT:g} s: a few late heartbeats would end a run."
        )
