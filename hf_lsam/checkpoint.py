"""Files of tensors that are either whole or absent.

A save is written beside its target, flushed to the disk and renamed: whoever opens the target sees the old file or
the new one, never a part. safetensors only, so opening one executes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors` to `path`, atomically.

    Raises:
        OSError: if the file cannot be written; what stood at `path` before still stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, beside)
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or no safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}). It was cut short or is something else; resume from an "
            "older checkpoint."
        ) from error
