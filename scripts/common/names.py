"""Names under which finished runs are kept: a run is found again only if settings and data are still the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from recipes.common.configuration import resolve

READ = ("_file", "_dir", "_name", "_path")  # how the keys end whose values may name a file or a folder
WRITTEN = ("output_dir", "shared_memory_dir")
MOST_BYTES = 2**26


def names_of(runs: Sequence[dict[str, Any]]) -> list[str]:
    """A name for each run, 16 characters, that differs if any value does, or the contents of a file that one names.

    Args:
        runs: for each run all that determines it, as JSON holds it. A file or folder that a value names counts by its
            contents; a file of more than `MOST_BYTES` by its size and the time of its last change, as reading it takes
            too long.
    """
    contents = cache(_contents)

    def known(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: known(inner, each) for inner, each in value.items()}
        if value and isinstance(value, str) and key.endswith(READ) and key not in WRITTEN:
            path = Path(resolve(value)).expanduser()
            return contents(path) if path.exists() else value
        return value

    texts = (json.dumps(known("", run), sort_keys=True, default=str) for run in runs)
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts]


def _contents(path: Path) -> str:
    """A digest of a file, or of all files in a folder and their names there."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
        state = file.stat()
        if state.st_size <= MOST_BYTES:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            content = f"{state.st_size} {state.st_mtime_ns}"
        digest.update(f"{file.relative_to(path)} {content}\n".encode())
    return digest.hexdigest()
