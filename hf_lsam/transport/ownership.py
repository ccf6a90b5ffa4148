"""Who serves a run folder, and which launch owns it: file locks, which end with the process that holds them."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ..files import write_atomically
from .channel import signs_of_life

with suppress(ImportError):  # on Windows, where one worker trains without any of this; see `missing_here`
    import fcntl

logger = logging.getLogger(__name__)

LAUNCH_PREFIX = "hf_lsam-"  # of the folders that launches make for themselves


def missing_here() -> str | None:
    """Why workers cannot exchange anything on this operating system, and what to do about it; None if they can."""
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


@contextmanager
def served_by_this_process(path: Path) -> Iterator[None]:
    """Makes this process the only server of `path` inside the `with` block; the lock ends with the process.

    Raises:
        RuntimeError: if another process serves it. Names that process's run and pid.
    """
    with (path / "lock").open("a") as lock:
        deadline = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:  # too long for a worker that only checks whether there is a server
                    raise RuntimeError(_taken(path)) from None
                time.sleep(0.02)
        record = path / "server.json"
        run_id = json.loads(record.read_text())["run"] if record.exists() else secrets.token_hex(4)
        write_atomically(record, json.dumps({"run": run_id, "pid": os.getpid()}))
        yield


def is_served(path: Path) -> bool:
    """Whether a living process serves the folder."""
    return _is_locked(path / "lock")


def make_launch_folder(parent: Path, name: str | None = None) -> tuple[Path, TextIO]:
    """Makes a folder in `parent` for the run of a launch, with a lock that shows that its first worker is alive.

    Removes the folders of launches that were killed with all their processes, so that none of them could.

    Args:
        name: what follows `LAUNCH_PREFIX`; a folder of that name whose owner has died is taken over as it is. None
            makes one up.

    Returns:
        the folder, and an open file to be closed when the run is left.

    Raises:
        PermissionError: if a folder of that name is there and is not this user's alone.
    """
    path = None if name is None else parent / (LAUNCH_PREFIX + name)
    for stale in dead_launches(parent):
        if stale != path:
            logger.warning("%s was left behind by a launch that has ended, and is removed", stale)
            shutil.rmtree(stale, ignore_errors=True)
    if path is None:
        path = Path(tempfile.mkdtemp(prefix=LAUNCH_PREFIX, dir=parent))
    else:
        path.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours_alone(path):
            raise PermissionError(
                errno.EPERM,
                f"{path} was there already, and it is another user's, or others may look into it: what workers "
                "exchange would lie open to them. Remove it, or set another shared_memory_dir",
            )
    beside = path / "launch.new"
    held = beside.open("w")
    signs_of_life.add(held)
    fcntl.flock(held, fcntl.LOCK_EX)
    beside.rename(path / "launch")  # only now, so that whoever finds it finds it locked
    return path, held


def dead_launches(parent: Path) -> list[Path]:
    """The folders in `parent` of this user's launches of which no process is alive."""
    return [folder for folder in parent.glob(f"{LAUNCH_PREFIX}*") if _is_of_dead_launch(folder)]


def _is_of_dead_launch(folder: Path) -> bool:
    # Whose the folder is comes first: another user's may hold anything, a link to a file of ours for one.
    return (
        _is_ours_alone(folder)
        and (folder / "launch").exists()
        and not _is_locked(folder / "launch")
        and not is_served(folder)
    )


def _is_ours_alone(folder: Path) -> bool:
    """Whether it is a folder of this user's that nobody else may look into."""
    try:
        status = folder.lstat()
    except OSError:  # its launch has just removed it
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


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
