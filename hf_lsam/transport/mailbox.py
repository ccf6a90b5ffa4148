"""Exchange between processes of one machine: vectors through shared memory, control through a Unix socket.

A run folder (mode 0700) holds

    run.json         what the first worker decided: length, fingerprint, settings, process of the server
    parameters.json  the manifest of names, shapes and dtypes, for the error of a worker that does not match
    anchor_0/1       two copies of y, float32 [d]; the server writes them in turn
    version          int64 [2]: (last version complete, last version begun)
    mailbox_R        float32 [d], written by worker R, read by the server
    socket           Unix stream socket; every message is one fixed `Message` frame, nothing is ever unpickled

Who may touch what, and when. A worker writes its mailbox only while the mailbox is its own: from the server's reply to
one push until it sends the next. The server reads it only in between. The frames cross in order, so neither ever sees
a half-written mailbox. The anchor has one writer and any number of readers that never ask: version v lies in slot
v % 2, the writer announces "begun v + 1" before it touches the other slot, and a reader that finds "begun" two ahead
after its copy knows that the slot may have changed under it and copies again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor

FLOAT_BYTES = 4


class Kind(IntEnum):
    """What a message says. Workers send the first group, the server the second."""

    JOIN = 1  # digest: fingerprint; a: vector length
    PUSH = 2  # a: local steps in the sum; b: anchor version the worker holds; loss: their mean
    FINISH = 3  # a: 1 if all are to stop (early stopping); b: best step, or -1
    SNAPSHOT = 4  # the server is to write its state into the run folder

    WELCOME = 11
    REFUSED = 12  # a: Refusal
    ACCEPTED = 13  # a: anchor version when the push came in
    REJECTED = 14  # a push with NaN or infinity
    STOP = 15  # another worker stopped the run early
    FINISHED = 16  # all have finished, the anchor is final; b: best step, or -1
    SNAPSHOT_DONE = 17  # a: 1 if written, 0 if it failed


class Refusal(IntEnum):
    """Why a JOIN was refused."""

    FINGERPRINT = 1
    TAKEN = 2
    TIMEOUT = 3


@dataclass(frozen=True)
class Message:
    """One control frame: a kind, the worker it is from or for, two integers, a loss and 32 bytes."""

    kind: Kind
    worker: int
    a: int = 0
    b: int = 0
    loss: float = 0.0
    digest: bytes = bytes(32)


_FRAME = struct.Struct("<IHHqqd32s")
_MAGIC = 0x4C53414D  # "LSAM"


class Channel:
    """A stream socket that carries `Message` frames.

    Blocking: `receive` never; `wait` until a frame or `timeout`; `send` only if the peer has left some hundred frames
    unread, which the protocol (one push under way a worker) cannot produce.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._unread = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Raises ConnectionError if the peer is gone."""
        self._socket.settimeout(None)
        fields = (message.kind, message.worker, message.a, message.b, message.loss, message.digest)
        self._socket.sendall(_FRAME.pack(_MAGIC, *fields))

    def receive(self) -> Message | None:
        """The next frame if one is there, else None.

        Raises:
            ConnectionError: if the peer closed the connection.
            ValueError: if the bytes are no frame.
        """
        return self._read(0.0)

    def wait(self, timeout: float | None = None) -> Message | None:
        """The next frame, or None after `timeout` seconds (None: wait for ever). Raises as `receive` does."""
        return self._read(timeout)

    def _read(self, timeout: float | None) -> Message | None:
        while len(self._unread) < _FRAME.size:
            self._socket.settimeout(timeout)
            try:
                chunk = self._socket.recv(4096)
            except (BlockingIOError, TimeoutError):
                return None
            if not chunk:
                raise ConnectionError("the other side closed the connection")
            self._unread += chunk
        frame, self._unread = self._unread[: _FRAME.size], self._unread[_FRAME.size :]
        magic, kind, *fields = _FRAME.unpack(frame)
        if magic != _MAGIC:
            raise ValueError("not a frame of this protocol")
        return Message(Kind(kind), *fields)

    def close(self) -> None:
        self._socket.close()


def _allocate(path: Path, size: int) -> None:
    """Creates a file whose pages exist, so that a full /dev/shm is an error here and not a SIGBUS at some write."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _map(path: Path, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The file as a tensor [numel] that all processes which map it share."""
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


class RunFolder:
    """The files of one run on one machine.

    Use `RunFolder.create` in the process that starts the run and `RunFolder(path)` everywhere else.

    Attributes:
        path: the folder.
        run: the contents of run.json.
        numel: d, length of the vectors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.run = json.loads((self.path / "run.json").read_text())
        self.numel = int(self.run["numel"])
        self._version = _map(self.path / "version", 2, torch.int64)
        self._slots = [_map(self.path / f"anchor_{i}", self.numel) for i in (0, 1)]

    @classmethod
    def create(cls, path: Path, initial: Tensor, num_workers: int, manifest: list, run: dict) -> RunFolder:
        """Allocates every file of a run and publishes `initial` as version 0.

        Args:
            path: an existing empty folder.
            initial: the first anchor, float32 [d].
            num_workers: how many mailboxes.
            manifest: `ParameterLayout.manifest`.
            run: further contents of run.json.

        Raises:
            OSError: if the file system has no room. Names the bytes needed and the remedy; nothing is left behind.
        """
        size = initial.numel() * FLOAT_BYTES
        vectors = ["anchor_0", "anchor_1", *(f"mailbox_{worker}" for worker in range(num_workers))]
        try:
            path.chmod(0o700)
            for name in vectors:
                _allocate(path / name, size)
            _allocate(path / "version", 16)
            (path / "parameters.json").write_text(json.dumps(manifest))
            (path / "run.json").write_text(json.dumps({**run, "numel": initial.numel(), "num_workers": num_workers}))
        except OSError as error:
            free = shutil.disk_usage(path).free
            shutil.rmtree(path, ignore_errors=True)
            raise OSError(
                error.errno,
                f"{path.parent} has no room for the exchange between {num_workers} workers: {len(vectors)} vectors of "
                f"{size / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free ({error.strerror}). Enlarge it "
                "(`mount -o remount,size=...` or `docker run --shm-size=...`), or set `shared_memory_dir` to a folder "
                "with room, on a local disk for example.",
            ) from error
        folder = cls(path)
        folder._slots[0].copy_(initial)
        return folder

    @property
    def manifest(self) -> list:
        return json.loads((self.path / "parameters.json").read_text())

    def mailbox(self, worker: int) -> Tensor:
        """Maps the mailbox of `worker`, float32 [d]."""
        return _map(self.path / f"mailbox_{worker}", self.numel)

    # --- the anchor: one writer ---

    def publish(self, vector: Tensor, version: int) -> None:
        """Server only: makes `vector` readable as `version`."""
        self._version[1] = version  # begun: from here on a reader of version - 2 will copy again
        self._slots[version % 2].copy_(vector)
        self._version[0] = version  # complete

    # --- the anchor: many readers ---

    @property
    def version(self) -> int:
        """The newest complete version; one read of shared memory."""
        return int(self._version[0])

    def slot(self, version: int) -> Tensor:
        """The shared copy that holds `version`, valid as long as `is_whole(version)`."""
        return self._slots[version % 2]

    def is_whole(self, version: int) -> bool:
        """Whether a copy of `slot(version)` that has just ended cannot have been written over meanwhile."""
        return int(self._version[1]) < version + 2

    # --- the socket ---

    @contextmanager
    def _reachable(self, name: str) -> Iterator[str]:
        """The address of `name` through an open descriptor of the folder: Unix addresses hold 107 characters only."""
        folder = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{folder}/{name}"
        finally:
            os.close(folder)

    def listen(self) -> socket.socket:
        """Server only: the listening socket. It appears under its name once it accepts connections."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._reachable("socket.new") as address:
            listener.bind(address)
        listener.listen(128)
        os.rename(self.path / "socket.new", self.path / "socket")
        return listener

    def connect(self, still_coming: Callable[[], bool], timeout: float) -> Channel:
        """Worker only: connects to the server, waiting for it to listen.

        Args:
            still_coming: asked again and again; False ends the wait (the server process died at its start).
            timeout: seconds.

        Raises:
            ConnectionError: if no server listens by then.
        """
        deadline = time.monotonic() + timeout
        while not (self.path / "socket").exists():
            if time.monotonic() > deadline or not still_coming():
                raise ConnectionError(f"no server listens in {self.path}")
            time.sleep(0.01)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._reachable("socket") as address:
            connection.connect(address)
        return Channel(connection)

    def remove(self) -> None:
        """Deletes the folder; mappings that are still open stay valid until they are dropped."""
        shutil.rmtree(self.path, ignore_errors=True)
