"""Files that are whole or absent, whenever the process that writes them is killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """Inside, a path beside `path`, to which a file is to be written; after, that file stands at `path`.

    Whoever opens `path` sees the old file or the new one, never a part. One process at a time may write to it.

    Args:
        durable: the disk has the file before it stands at `path`, and its name before this returns.

    Raises:
        OSError: if the file cannot be written; what stood at `path` before still stands, and nothing is left beside it.
    """
    # Always the same name: what a killed process has left there goes with the next file.
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
    """Writes `text` to `path`, whole or not at all; see `replacing`."""
    with replacing(path, durable) as partial:
        partial.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Has the kernel write a file, or a folder's names, to the disk."""
    windows = sys.platform == "win32"  # flushes what is open for writing alone, and no folders
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
