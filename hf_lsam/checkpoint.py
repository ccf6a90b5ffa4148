"""Tensor files that are either complete or absent.

A save is written next to its target, flushed to disk and renamed: whoever opens the target sees the old file or the
new one, never part of one. The format is safetensors, so opening a file executes nothing. A checksum in the file's
header shows whether the tensors are those that were saved.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import flush, write_atomically
from .parameters import first_difference

WORKER_STATE = "lsam_worker.safetensors"
SERVER_STATE = "lsam_server.safetensors"
SEAL = "lsam_complete.json"


def save_tensors(path: Path, tensors: dict[str, Tensor], manifest: Sequence[Any] | None = None) -> None:
    """Writes `tensors` to `path`, atomically.

    Args:
        manifest: `ParameterLayout.manifest` of the parameters that the vectors in `tensors` belong to.

    Raises:
        OSError: if the file cannot be written; an earlier file at `path` is then left as it was.
    """
    # safetensors first writes to a file with a random name. In a folder of its own, what a killed process leaves behind
    # has a predictable place.
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.mkdir(parents=True, exist_ok=True)
    whole = beside / path.name
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, whole, {"crc32": _checksum(tensors), "manifest": json.dumps(manifest)})
        flush(whole)
        os.replace(whole, path)
    except SafetensorError as error:  # what safetensors raises when the disk is full
        raise OSError(f"{path} could not be written: {error}. The previous file is unchanged.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    flush(path.parent)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `save_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or is not a safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("crc32")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(_about_no_file(path, error)) from error
    if expected is not None and expected != _checksum(tensors):
        raise ValueError(
            f"{path} is damaged: its checksum does not match what was saved. The disk failed, or the file was "
            "edited. Resume from an older checkpoint."
        )
    return tensors


def refuse_other_parameters(path: Path, manifest: Sequence[Any]) -> None:
    """
    Raises:
        ValueError: if the vectors in `path` belong to other parameters than those of `manifest`, or if it is not a
            safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads((file.metadata() or {}).get("manifest", "null")) or []
    except SafetensorError as error:
        raise ValueError(_about_no_file(path, error)) from error
    if saved != [list(entry) for entry in manifest]:
        raise ValueError(
            f"{path} was saved with other trainable parameters: {first_difference(manifest, saved)} (in the "
            "file). Its values would end up in the wrong parameters. Resume with the model, the adapter and the "
            "frozen parameters that it was saved with; to train others, start a new run from the saved model."
        )


def seal(folder: Path) -> None:
    """Flushes a checkpoint of several files to disk, then writes one more file that marks it as complete."""
    # A partial seal, left by a process that was killed while writing it, is not part of the checkpoint either.
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(SEAL)]
    for path in files:
        flush(path)
    flush(folder)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    write_atomically(folder / SEAL, json.dumps(sizes), durable=True)


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint is complete: every file that existed when it was sealed still does, at its full length."""
    try:
        sizes = json.loads((folder / SEAL).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return False


def newest_sealed(output_dir: Path) -> Path | None:
    """The newest complete checkpoint-N in `output_dir`, or None."""
    return next((path for _, path in sorted(numbered(output_dir).items(), reverse=True) if is_sealed(path)), None)


def numbered(output_dir: Path) -> dict[int, Path]:
    """The checkpoint-N folders in `output_dir`, complete or not, keyed by N."""
    folders = [path for path in output_dir.glob("checkpoint-*") if path.name[11:].isdigit()]
    return {int(path.name[11:]): path for path in folders}


def _about_no_file(path: Path, error: SafetensorError) -> str:
    return (
        f"{path} is not a whole safetensors file ({error}). It was cut short or is something else; resume from an "
        "older checkpoint."
    )


def _checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, types, shapes and values."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
