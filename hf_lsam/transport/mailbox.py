"""Exchange between processes of one machine: vectors through shared memory, control messages through a Unix socket.

A run folder (mode 0700) holds

    run.json         what the first worker decided: length, fingerprint, settings
    parameters.json  the manifest of names, shapes and dtypes, for the error message of a worker that does not match
    anchor_0/1       two copies of y, float32 [d]; the server writes them in turn
    version          int64 [4]: last version complete, last version begun, whether it is final, best step
    between_machines int64 [2]: bytes that this machine's server has sent to and received from others, exchange steps
    steps            int64 [1 + workers]: steps begun elsewhere, written by the server; then each worker's, by itself
    mailbox_N        float32 [d], of the Nth join: written by its worker, read by the server
    socket           Unix stream socket; its frames are those of `messages`
    snapshot.safetensors    the server's last saved state
    server.json, lock       the process that serves the folder, and its lock
    create                  lock of the worker that creates a run in the folder

Who may access what, and when. A worker writes its mailbox only while it owns it: from the server's answer to one push
until it sends the next. The server reads it only in between. Frames arrive in order, so neither side ever sees a
half-written mailbox. A mailbox lasts as long as one join: a worker that was taken for dead and wakes in the middle of a
copy writes into a file without a name, never into its successor's. The anchor has one writer and any number of readers,
which need no permission: version v is in slot v % 2, the writer announces "begun v + 1" before it touches the other
slot, and a reader that finds "begun" two ahead after its copy knows that the slot may have changed during the copy, and
copies again.

    writer                  reader
    begun <- v + 2
    ---- barrier            v <- complete
    slot v % 2 <- y         ---- barrier
    ---- barrier            copy <- slot v % 2
    complete <- v + 2       ---- barrier
                            whole if begun < v + 2

All four barriers are needed where the processor may reorder stores and loads of different words (aarch64): without the
writer's first or the reader's second, a copy may hold words of the new version while "begun" still reads as the old
one; without the other two, "complete" may be seen before what it announces. x86-64 keeps stores in order among stores,
and loads among loads, without them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_atomically
from .channel import Channel, signs_of_life

with suppress(ImportError):  # on Windows, where one worker trains without any of this; see `missing_here`
    import fcntl

FLOAT_BYTES = 4
MAX_WORKERS = 4096  # external workers at a time


def _allocate(path: Path, size: int) -> None:
    """Creates a file and allocates its pages, so that a full /dev/shm is an error here and not a SIGBUS at a write."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _allocate_shared(path: Path, numel: int, num_workers: int) -> None:
    for name in ("anchor_0", "anchor_1"):
        _allocate(path / name, numel * FLOAT_BYTES)
    _allocate(path / "version", 32)
    _allocate(path / "between_machines", 16)
    _allocate(path / "steps", 8 * (1 + num_workers + MAX_WORKERS))


def _map(path: Path, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The file as a tensor [numel], shared by all processes that map it. Torch alone would create a missing file.

    Raises:
        FileNotFoundError: if it does not exist.
    """
    path.stat()
    return torch.from_file(str(path), shared=True, size=numel, dtype=dtype)


_SHARED_FILES = ("anchor_0", "anchor_1", "version", "between_machines", "steps")


def _barrier() -> None:
    """A full barrier on x86-64 and aarch64: no process sees a later access to memory before an earlier one.

    Python has no barrier of its own. Releasing a lock orders all accesses before it, acquiring one orders all accesses
    after it, and neither processor lets the acquire pass the release (on aarch64: a load-acquire after a
    store-release).
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
        self._inode = (self.path / "version").stat().st_ino
        self._version = _map(self.path / "version", 4, torch.int64)  # complete, begun, final, best step
        self._between_machines = _map(self.path / "between_machines", 2, torch.int64)
        self._slots = [_map(self.path / f"anchor_{i}", self.numel) for i in (0, 1)]
        self._steps = _map(self.path / "steps", 1 + int(self.run["num_workers"]) + MAX_WORKERS, torch.int64)

    @classmethod
    def create(
        cls, path: Path, initial: Tensor, num_workers: int, manifest: list[Any], run: dict[str, Any]
    ) -> RunFolder:
        """Allocates the files of a run and publishes `initial` as version 0.

        Args:
            path: an existing folder; run.json is written last.
            initial: the first anchor, float32 [d].
            num_workers: workers that begin together, 0 if they come and go; there must be room for as many mailboxes.
            manifest: `ParameterLayout.manifest`.
            run: further contents of run.json.

        Raises:
            OSError: if the file system has no room. Names the bytes needed and the remedy, and leaves nothing behind.
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
            _map(path / "anchor_0", initial.numel()).copy_(initial)
            write_atomically(path / "run.json", json.dumps(contents))
        except OSError as error:
            free = shutil.disk_usage(path).free
            for name in (*_SHARED_FILES, "parameters.json"):
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):
                path.rmdir()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG):
                raise
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
        """Opens a folder whose server has ended; creates the shared files anew if it ended cleanly and removed them.

        Raises:
            FileNotFoundError: if no run was ever created in it.
            RuntimeError: if it holds neither an anchor nor a snapshot.
        """
        run = json.loads((path / "run.json").read_text())
        if not (path / "version").exists():
            if not (path / "snapshot.safetensors").exists():
                raise RuntimeError(f"{path} holds neither an anchor nor a snapshot to resume from. Use a new folder.")
            for name in _SHARED_FILES:
                (path / name).unlink(missing_ok=True)
            _allocate_shared(path, int(run["numel"]), int(run["num_workers"]))
        for mailbox in path.glob("mailbox_*"):
            mailbox.unlink()
        for unfinished in path.glob(".snapshot.safetensors.*"):  # left by a server that was killed while saving
            shutil.rmtree(unfinished)
        return cls(path)

    @classmethod
    def create_or_open(cls, path: Path, initial: Tensor, manifest: list[Any], run: dict[str, Any]) -> RunFolder:
        """Opens the run in `path`; the first worker to arrive creates it, with `create`'s arguments.

        Raises:
            FileNotFoundError: if there is a run whose server has ended, or has not reopened it yet.
        """
        with (path / "create").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "run.json").exists():
                return cls.create(path, initial, 0, manifest, run)
        return cls(path)

    @property
    def was_made_anew(self) -> bool:
        """Whether a server has ended cleanly since this folder was opened, and another has made new shared files."""
        return (self.path / "version").stat().st_ino != self._inode

    @property
    def manifest(self) -> list[Any]:
        """`ParameterLayout.manifest` of the worker that created the run."""
        manifest: list[Any] = json.loads((self.path / "parameters.json").read_text())
        return manifest

    @property
    def snapshot_path(self) -> Path:
        """Where the server saves its state."""
        return self.path / "snapshot.safetensors"

    # --- mailboxes: one per join ---

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
        """Server only: unlinks the mailbox; a worker that has it mapped keeps a file that has no name."""
        (self.path / f"mailbox_{number}").unlink(missing_ok=True)

    def mailbox(self, number: int) -> Tensor:
        """Maps the mailbox of one join, float32 [d]."""
        return _map(self.path / f"mailbox_{number}", self.numel)

    # --- steps begun: each worker writes its own, all read the sum ---

    @property
    def steps_begun(self) -> int:
        """Steps begun by all workers of the run: in this folder, and elsewhere as far as the server knows."""
        return int(self._steps.sum())

    @property
    def steps_begun_here(self) -> int:
        """Steps begun by the workers of this folder, including those that have left."""
        return int(self._steps[1:].sum())

    def begin_step(self, worker: int) -> None:
        """Worker only: counts one more of its own steps."""
        self._steps[1 + worker] += 1

    @property
    def steps_begun_elsewhere(self) -> int:
        """Steps begun by workers of other machines, and before this folder was made."""
        return int(self._steps[0])

    def set_steps_begun_elsewhere(self, steps: int) -> None:
        """Server only: sets `steps_begun_elsewhere`."""
        self._steps[0] = steps

    # --- what crosses links to other machines ---

    @property
    def bytes_between_machines(self) -> int:
        """Bytes that this machine's server has sent to and received from others."""
        return int(self._between_machines[0])

    @property
    def exchange_steps(self) -> int:
        """How many steps each worker makes between two exchanges with other machines; 0 if that is not known."""
        return int(self._between_machines[1])

    def set_between_machines(self, moved: int, exchange_steps: int) -> None:
        """Server only: sets `bytes_between_machines` and `exchange_steps`."""
        self._between_machines[0], self._between_machines[1] = moved, exchange_steps

    # --- the anchor: one writer ---

    def publish(self, vector: Tensor, version: int) -> None:
        """Server only: makes `vector` readable as `version`, which must be above the last."""
        if (version - self.version) % 2 == 0:  # versions were skipped, and this one would overwrite the slot being read
            self.publish(vector, version - 1)
        self._version[1] = version  # begun: from here on, readers of version - 2 will copy again
        _barrier()
        self._slots[version % 2].copy_(vector)
        _barrier()
        self._version[0] = version  # complete

    def end(self, best_step: int) -> None:
        """Server only: declares the published anchor final. `best_step`: of the best checkpoint, or -1."""
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
        """The newest complete version. One read of shared memory, ordered before all that follow."""
        version = int(self._version[0])
        _barrier()
        return version

    @property
    def best_step(self) -> int | None:
        """What `end` was given, or None while the run continues; readable also when server and files are gone."""
        final = int(self._version[2])
        _barrier()
        return int(self._version[3]) if final else None

    def slot(self, version: int) -> Tensor:
        """The shared copy that holds `version`, valid as long as `is_whole(version)`."""
        return self._slots[version % 2]

    def is_whole(self, version: int) -> bool:
        """Whether a copy of `slot(version)` that has just ended is intact: the slot was not written to meanwhile."""
        _barrier()
        return int(self._version[1]) < version + 2

    # --- the socket ---

    @contextmanager
    def _reachable(self, name: str) -> Iterator[str]:
        """The address of `name` through an open descriptor of the folder: Unix addresses have only 107 characters."""
        folder = os.open(self.path, os.O_PATH | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{folder}/{name}"
        finally:
            os.close(folder)

    def listen(self) -> socket.socket:
        """Server only: makes the listening socket, which appears under its name once it accepts connections."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        (self.path / "socket.new").unlink(missing_ok=True)  # left by a server that was killed before the rename below
        with self._reachable("socket.new") as address:
            listener.bind(address)
        listener.listen(128)
        os.rename(self.path / "socket.new", self.path / "socket")
        return listener

    def connect(self, still_coming: Callable[[], bool], timeout: float) -> Channel:
        """Worker only: connects to the server, waiting for it to listen.

        Args:
            still_coming: called repeatedly; False ends the wait (the server process died at its start).
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
        signs_of_life.add(connection)
        return Channel(connection)

    def clear(self) -> None:
        """Server only: removes what nobody needs while no server runs; the run's snapshot and description stay."""
        for name in (*_SHARED_FILES, "socket", "server.json"):
            (self.path / name).unlink(missing_ok=True)
        for mailbox in self.path.glob("mailbox_*"):
            mailbox.unlink()

    def remove(self) -> None:
        """Deletes the folder; mappings that are still open stay valid until they are dropped."""
        shutil.rmtree(self.path, ignore_errors=True)
