"""Exchange between processes of one machine: vectors through shared memory, control through a Unix socket.

A run folder (mode 0700) holds

    run.json         what the first worker decided: length, fingerprint, settings, process of the server
    parameters.json  the manifest of names, shapes and dtypes, for the error of a worker that does not match
    anchor_0/1       two copies of y, float32 [d]; the server writes them in turn
    version          int64 [2]: (last version complete, last version begun)
    steps            int64 [1 + workers]: steps begun elsewhere, by the server; then each worker's, by itself
    mailbox_N        float32 [d], the Nth join's: written by its worker, read by the server
    socket           Unix stream socket; its frames are those of `messages`
    snapshot.safetensors, lock, create, server.json    the server's last saved state; who serves the folder

Who may touch what, and when. A worker writes its mailbox only while the mailbox is its own: from the server's reply to
one push until it sends the next. The server reads it only in between. The frames cross in order, so neither ever sees
a half-written mailbox. A mailbox lives as long as one join: a worker that was taken for dead and wakes in the middle of
a copy writes into a file without a name, never into its successor's. The anchor has one writer and any number of
readers that never ask: version v lies in slot v % 2, the writer announces "begun v + 1" before it touches the other
slot, and a reader that finds "begun" two ahead after its copy knows that the slot may have changed under it and copies
again.

    writer                  reader
    begun <- v + 2
    ---- barrier            v <- complete
    slot v % 2 <- y         ---- barrier
    ---- barrier            copy <- slot v % 2
    complete <- v + 2       ---- barrier
                            whole if begun < v + 2

All four are needed where the processor may let stores and loads of different words pass each other (aarch64): without
the writer's first or the reader's second a copy holds the new slot's words while "begun" is still the old one, and
without the others "complete" is seen before what it announces. x86-64 keeps stores among stores and loads among loads
in order by itself.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from .messages import WORKER_MESSAGES, Message

with suppress(ImportError):  # on Windows, where one worker trains without any of this; see `missing_here`
    import fcntl

logger = logging.getLogger(__name__)

FLOAT_BYTES = 4
MAX_WORKERS = 4096  # external ones at a time
LAUNCH_PREFIX = "hf_lsam-"  # of the folders that launches make for themselves
# What tells others that this process lives. A child that is forked, such as a worker of a DataLoader, would hold it
# open, and the process would not be known to have left, or died, before all its children have.
_signs_of_life: weakref.WeakSet[socket.socket | TextIO] = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [sign.close() for sign in list(_signs_of_life)])


class Channel:
    """A stream socket that carries `WORKER_MESSAGES`.

    Process: any; two threads may `send`, of which the one that does all else may `close`.
    Blocking: `wait` until a frame or `timeout`; all else never.
    """

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._sending = threading.Lock()  # so that the descriptor is not another file's by then
        self._unread = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends one frame, whole or not at all: the kernel takes so small a message in one piece.

        Raises:
            ConnectionError: if the peer is gone.
            BlockingIOError: if it has left some hundred frames unread.
        """
        with self._sending:
            self._socket.settimeout(0.0)
            self._socket.sendall(WORKER_MESSAGES.pack(message))

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
        self.shut()  # a copy of the descriptor may be open in a child that is no Python's
        with self._sending:
            self._socket.close()


def missing_here() -> str | None:
    """Why no workers can exchange anything on this operating system, and what to do; None where they can."""
    if sys.platform == "linux":
        return None
    what, instead = {
        "win32": ("Windows has neither file locks nor sockets of that kind", "in WSL (Windows Subsystem for Linux)"),
        "darwin": ("macOS has no such files in memory, and it was never tried there", "on Linux, a container too"),
    }.get(sys.platform, (f"it was never tried on {sys.platform}", "on Linux"))
    return (
        f"Several workers, and workers of a server, exchange vectors through Linux's shared memory: {what}. Train with "
        f"one worker (plain `python script.py`, without server_address), or run several {instead}."
    )


def _allocate(path: Path, size: int) -> None:
    """Creates a file whose pages exist, so that a full /dev/shm is an error here and not a SIGBUS at some write."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _allocate_shared(path: Path, numel: int, num_workers: int) -> None:
    for name in ("anchor_0", "anchor_1"):
        _allocate(path / name, numel * FLOAT_BYTES)
    _allocate(path / "version", 32)
    _allocate(path / "between_machines", 8)
    _allocate(path / "steps", 8 * (1 + num_workers + MAX_WORKERS))


def _map(path: Path, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The file as a tensor [numel] that all processes which map it share; torch would make one that is not there.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    path.stat()
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


_SHARED_FILES = ("anchor_0", "anchor_1", "version", "between_machines", "steps")


def _barrier() -> None:
    """No access to memory before it is seen after one that follows it, by any process, on x86-64 and on aarch64.

    Python has no barrier of its own. Giving a lock back orders all that precedes it, taking one all that follows, and
    neither processor lets the second pass the first (on aarch64: a load-acquire after a store-release).
    """
    lock = threading.Lock()
    lock.acquire()
    lock.release()
    lock.acquire()


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
        self._version = _map(self.path / "version", 4, torch.int64)  # complete, begun, final, best step
        self._between_machines = _map(self.path / "between_machines", 1, torch.int64)
        self._slots = [_map(self.path / f"anchor_{i}", self.numel) for i in (0, 1)]
        self._steps = _map(self.path / "steps", 1 + int(self.run["num_workers"]) + MAX_WORKERS, torch.int64)

    @classmethod
    def create(
        cls, path: Path, initial: Tensor, num_workers: int, manifest: list[Any], run: dict[str, Any]
    ) -> RunFolder:
        """Allocates the files of a run and publishes `initial` as version 0.

        Args:
            path: an existing folder; run.json appears in it last.
            initial: the first anchor, float32 [d].
            num_workers: workers that begin together, 0 if they come and go; as many mailboxes must find room.
            manifest: `ParameterLayout.manifest`.
            run: further contents of run.json.

        Raises:
            OSError: if the file system has no room. Names the bytes needed and the remedy; nothing is left behind.
        """
        size = initial.numel() * FLOAT_BYTES
        contents = {**run, "numel": initial.numel(), "num_workers": num_workers}
        try:
            path.chmod(0o700)
            _allocate_shared(path, initial.numel(), num_workers)
            free = shutil.disk_usage(path).free
            if free < num_workers * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            (path / "parameters.json").write_text(json.dumps(manifest))
            (path / "run.json.new").write_text(json.dumps(contents))
            _map(path / "anchor_0", initial.numel()).copy_(initial)
            os.rename(path / "run.json.new", path / "run.json")
        except OSError as error:
            free = shutil.disk_usage(path).free
            for name in (*_SHARED_FILES, "parameters.json", "run.json.new"):
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()
            raise OSError(
                error.errno,
                f"{path.parent} has no room for the exchange between {num_workers} workers: {num_workers + 2} vectors "
                f"of {size / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are free ({error.strerror}). Enlarge it "
                "(`mount -o remount,size=...` or `docker run --shm-size=...`), or set `shared_memory_dir` to a folder "
                "with room, on a local disk for example.",
            ) from error
        return cls(path)

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Opens a folder whose server has ended; makes the shared files again if it ended cleanly.

        Raises:
            FileNotFoundError: if no run was ever created in it.
            RuntimeError: if nothing is left of its anchor.
        """
        run = json.loads((path / "run.json").read_text())
        if not (path / "version").exists():
            if not (path / "snapshot.safetensors").exists():
                raise RuntimeError(f"{path} holds neither an anchor nor a snapshot to go on from. Use a new folder.")
            for name in _SHARED_FILES:
                (path / name).unlink(missing_ok=True)
            _allocate_shared(path, int(run["numel"]), int(run["num_workers"]))
        for mailbox in path.glob("mailbox_*"):
            mailbox.unlink()
        for unfinished in path.glob(".snapshot.safetensors.*"):  # by a server that was killed while it saved
            shutil.rmtree(unfinished)
        return cls(path)

    @classmethod
    def create_or_open(cls, path: Path, initial: Tensor, manifest: list[Any], run: dict[str, Any]) -> RunFolder:
        """Opens the run in `path`; the first worker that comes creates it, with `create`'s arguments.

        Raises:
            FileNotFoundError: if there is a run whose server has ended, or not yet opened it again.
        """
        with (path / "create").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "run.json").exists():
                return cls.create(path, initial, 0, manifest, run)
        return cls(path)

    @property
    def manifest(self) -> list[Any]:
        manifest: list[Any] = json.loads((self.path / "parameters.json").read_text())
        return manifest

    @property
    def snapshot_path(self) -> Path:
        """Where the server saves its state."""
        return self.path / "snapshot.safetensors"

    # --- mailboxes: one a join ---

    def make_mailbox(self, number: int) -> Tensor:
        """Server only: allocates and maps the mailbox of one join, float32 [d].

        Raises:
            OSError: if there is no room; nothing is left behind.
        """
        path = self.path / f"mailbox_{number}"
        try:
            _allocate(path, self.numel * FLOAT_BYTES)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return _map(path, self.numel)

    def drop_mailbox(self, number: int) -> None:
        """Server only: takes the name away; who has it mapped keeps a file of its own."""
        (self.path / f"mailbox_{number}").unlink(missing_ok=True)

    def mailbox(self, number: int) -> Tensor:
        """Maps the mailbox of one join, float32 [d]."""
        return _map(self.path / f"mailbox_{number}", self.numel)

    # --- the steps that were begun: each worker writes its own, all read the sum ---

    @property
    def steps_begun(self) -> int:
        """By all workers of the run: those of this folder, and elsewhere as far as the server knows."""
        return int(self._steps.sum())

    @property
    def steps_begun_here(self) -> int:
        """By the workers of this folder, also by those that have left."""
        return int(self._steps[1:].sum())

    def begin_step(self, worker: int) -> None:
        """Worker only: counts one more step of its own."""
        self._steps[1 + worker] += 1

    def set_steps_begun_elsewhere(self, steps: int) -> None:
        """Server only: by workers of other machines, and before this folder was made."""
        self._steps[0] = steps

    # --- what crosses links to other machines ---

    @property
    def bytes_between_machines(self) -> int:
        """That the server of this machine has sent to and received from others."""
        return int(self._between_machines[0])

    def set_bytes_between_machines(self, count: int) -> None:
        """Server only."""
        self._between_machines[0] = count

    # --- the anchor: one writer ---

    def publish(self, vector: Tensor, version: int) -> None:
        """Server only: makes `vector` readable as `version`, which must be above the last."""
        if (version - self.version) % 2 == 0:  # versions were left out: what is being read must not be written over
            self.publish(vector, version - 1)
        self._version[1] = version  # begun: from here on a reader of version - 2 will copy again
        _barrier()
        self._slots[version % 2].copy_(vector)
        _barrier()
        self._version[0] = version  # complete

    def end(self, best_step: int) -> None:
        """Server only: what is published is final. `best_step`: of the best checkpoint, or -1."""
        self._version[3] = best_step
        _barrier()
        self._version[2] = 1

    def next_version(self, at_least: int) -> int:
        """Server only, after a restart: a version above all that were ever begun, in the slot that nobody reads."""
        version: int = max(at_least, *self._version[:2].tolist()) + 1
        return version + (version - self.version + 1) % 2

    # --- the anchor: many readers ---

    @property
    def version(self) -> int:
        """The newest complete version; one read of shared memory, that precedes all that follow."""
        version = int(self._version[0])
        _barrier()
        return version

    @property
    def best_step(self) -> int | None:
        """What `end` was given, or None as long as the run goes on; also when the server and the files are gone."""
        final = int(self._version[2])
        _barrier()
        return int(self._version[3]) if final else None

    def slot(self, version: int) -> Tensor:
        """The shared copy that holds `version`, valid as long as `is_whole(version)`."""
        return self._slots[version % 2]

    def is_whole(self, version: int) -> bool:
        """Whether a copy of `slot(version)` that has just ended cannot have been written over meanwhile."""
        _barrier()
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
        (self.path / "socket.new").unlink(missing_ok=True)  # of a server that was killed right here
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
        while True:
            try:
                return self.try_connect()
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                if time.monotonic() > deadline or not still_coming():
                    raise ConnectionError(f"no server listens in {self.path}") from None
                time.sleep(0.01)

    def try_connect(self) -> Channel:
        """Worker only: connects to the server if it listens; never waits.

        Raises:
            OSError: if it does not.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(0.0)
        try:
            with self._reachable("socket") as address:
                connection.connect(address)
        except OSError:
            connection.close()
            raise
        _signs_of_life.add(connection)
        return Channel(connection)

    def clear(self) -> None:
        """Server only: removes what nobody needs once the run rests; its snapshot and description stay."""
        for name in (*_SHARED_FILES, "socket", "server.json"):
            (self.path / name).unlink(missing_ok=True)
        for mailbox in self.path.glob("mailbox_*"):
            mailbox.unlink()

    def remove(self) -> None:
        """Deletes the folder; mappings that are still open stay valid until they are dropped."""
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def served_by_this_process(path: Path) -> Iterator[None]:
    """Inside, this process is the server of `path`, and no other can be; the lock goes with the process.

    Raises:
        RuntimeError: if another process serves it. Names its run and its pid.
    """
    with (path / "lock").open("a") as lock:
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:  # not a worker that is only looking whether there is a server
                    raise RuntimeError(_taken(path)) from None
                time.sleep(0.02)
        record = path / "server.json"
        run_id = json.loads(record.read_text())["run"] if record.exists() else secrets.token_hex(4)
        (path / "server.json.new").write_text(json.dumps({"run": run_id, "pid": os.getpid()}))
        os.rename(path / "server.json.new", record)
        yield


def is_served(path: Path) -> bool:
    """Whether a living process serves the folder."""
    return _is_locked(path / "lock")


def make_launch_folder(parent: Path, name: str | None = None) -> tuple[Path, TextIO]:
    """A new folder in `parent` for the run of a launch, and the lock that tells that its first worker lives.

    Folders of launches that were killed with all their processes, so that none could remove them, are removed.

    Args:
        name: what follows `LAUNCH_PREFIX`; a folder of that name whose owner has died is taken over as it is. None
            makes one up.

    Returns:
        the folder, and an open file to be closed when the run is left.
    """
    path = None if name is None else parent / (LAUNCH_PREFIX + name)
    for stale in dead_launches(parent):
        if stale != path:
            logger.warning("%s is left of a launch of which nothing lives: it is removed", stale)
            shutil.rmtree(stale, ignore_errors=True)
    if path is None:
        path = Path(tempfile.mkdtemp(prefix=LAUNCH_PREFIX, dir=parent))
    else:
        path.mkdir(mode=0o700, exist_ok=True)
    beside = path / "launch.new"
    held = beside.open("w")
    _signs_of_life.add(held)
    fcntl.flock(held, fcntl.LOCK_EX)
    beside.rename(path / "launch")  # whoever finds it finds it locked
    return path, held


def dead_launches(parent: Path) -> list[Path]:
    """The folders in `parent` of this user's launches of which nothing lives."""
    return [folder for folder in parent.glob(f"{LAUNCH_PREFIX}*") if _is_of_dead_launch(folder)]


def _is_of_dead_launch(folder: Path) -> bool:
    try:
        ours = (folder / "launch").stat().st_uid == os.getuid()
    except FileNotFoundError:  # never a launch's, or its launch has just removed it
        return False
    return ours and not _is_locked(folder / "launch") and not is_served(folder)


def _is_locked(path: Path) -> bool:
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _taken(path: Path) -> str:
    try:
        owner = json.loads((path / "server.json").read_text())
    except FileNotFoundError:  # it has not written it yet, or has just ended
        owner = {"run": "unknown", "pid": "unknown"}
    return (
        f"{path} is served already, by run {owner['run']}, pid {owner['pid']}. Two runs in one folder would write over "
        "each other's anchor. Give this run a folder of its own, or end the other."
    )
