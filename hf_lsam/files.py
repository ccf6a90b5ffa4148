"""Files that are complete or absent, no matter when the process that writes them is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Yields a path next to `path` to write a file to; on exit the file is moved to `path`.

    Whoever opens `path` sees the old file or the new one, never part of one. Only one process at a time may write it.

    Args:
        durable: flush the file to disk before it is moved to `path`, and the folder before this returns.

    Raises:
        OSError: if the file cannot be written; an earlier file at `path` is then left as it was, and nothing next to
            it.
    """
    # Always the same name, so that the next write replaces what a killed process has left there.
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Writes `text` to `path`, completely or not at all; see `replacing`."""
    with replacing(path, durable) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Makes the kernel write a file, or the entries of a folder, to disk."""
    windows = sys.platform == "win32"  # it only flushes files that are open for writing, and no folders
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
