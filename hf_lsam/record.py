"""The record of a run, in `output_dir/lsam/`: what the run is, and what each worker has logged.

    run.json             what the run is, written by worker 0 when it has joined (see `describe`)
    worker-<rank>.jsonl  one JSON object per line, appended at each log point and every few seconds

A worker's lines, each with "time" (unix seconds) and "step" (its local step):

    {"begin": true, "pid": ..., "process_started": ..., "host": ...}     it has joined, or rejoined
    {"loss": ..., "learning_rate": ..., "lsam/drift": ..., ...}          a log point
    {"between_logs": true, "loss": ..., "lsam/anchor_version": ..., ...}  a step between log points, some seconds after
                                                                         the last entry; and the last step
    {"eval_loss": ..., "eval_accuracy": ..., ...}                        worker 0: an evaluation of the anchor
    {"loaded_step": ...}                                                 worker 0: its model now holds the best anchor,
                                                                         of that step; later evaluations have it too
    {"end": true, "error": null or a text}                               it has left

JSON cannot represent numbers that are not finite: they are written as the strings "NaN", "Infinity" and "-Infinity",
and `read_record` converts them back. Each line is a single write; the reader skips lines that were torn by a killed
worker or a full disk.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from .files import write_atomically
from .version import __version__

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "lsam"
BYTES = ("lsam/bytes_pushed", "lsam/bytes_pulled")  # a worker's, counted since it last joined
PACKAGES = ("torch", "transformers", "accelerate", "peft")
_WHAT_IT_TOOK = ("_runtime", "_per_second", "_time", "_tokens")  # suffixes of an evaluation's items that are its cost
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class RecordWriter:
    """Writes one worker's part of the record. A failed write is warned about once, and never ends a run.

    Args:
        output_dir: the run's folder; None writes nothing.
        rank: rank of this worker.

    Process: the training thread. Blocking: on the disk, for one short line.
    """

    def __init__(self, output_dir: Path | None, rank: int):
        self._folder = None if output_dir is None else output_dir / FOLDER
        self._rank = rank
        self._begun = False
        self._before: list[dict[str, Any]] = []  # entries logged before the run has begun: evaluations
        self._warned = False

    def begin(self, resumed: bool, step: int, run: dict[str, Any] | None = None) -> None:
        """Opens the record: that of a resumed run is continued, any other is started anew.

        Args:
            resumed: whether training continues from a checkpoint.
            step: the local step at which it begins.
            run: what `describe` returned, at worker 0; None at the others.
        """
        if self._folder is None:
            return
        self._begun = True
        process = {"begin": True, "pid": os.getpid(), "process_started": psutil.Process().create_time()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if run is not None:
                self._write_run(self._folder / "run.json", run, resumed)
            if not resumed:
                self._path.write_bytes(b"")
        except OSError as error:
            self._warn(error)
        self._append({"time": time.time(), "step": step, **process, "host": socket.gethostname()})
        for entry in self._before:
            self._append(entry)
        self._before = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one log point. If called before `begin`, it is written then."""
        if self._folder is None:
            return
        entry = {"time": time.time(), "step": step, **metrics}
        if self._begun:
            self._append(entry)
        else:
            self._before.append(entry)

    def end(self, step: int, error: BaseException | None) -> None:
        """Writes the last line of a worker that leaves, with the error that made it leave, if any."""
        if self._begun:
            text = None if error is None else f"{type(error).__name__}: {error}".removesuffix(": ")
            self._append({"time": time.time(), "step": step, "end": True, "error": text})

    @property
    def _path(self) -> Path:
        assert self._folder is not None  # otherwise nothing has begun
        return worker_file(self._folder.parent, self._rank)

    def _write_run(self, path: Path, run: dict[str, Any], resumed: bool) -> None:
        if resumed and path.exists():
            try:
                before = json.loads(path.read_bytes())
                run = {**run, "run_id": before["run_id"], "started": before["started"]}
            except (ValueError, KeyError, TypeError):
                logger.warning("%s is damaged: the resumed run gets a new one.", path)
        write_atomically(path, json.dumps(run, indent=2, default=str) + "\n")

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps({key: _to_json(value) for key, value in entry.items()}, default=str).encode() + b"\n"
        try:
            with self._path.open("ab+", buffering=0) as file:
                if file.tell() and not _ends_a_line(file):
                    line = b"\n" + line
                if file.write(line) < len(line):
                    raise OSError("the disk took a part of a line only")
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "The record of the run in %s cannot be written (%s), so `hf-lsam monitor` will miss part of it. "
                "Training goes on. Free some space there, or make it writable for this user.",
                self._folder,
                error,
            )


def describe(num_workers: int, configuration: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The contents of run.json.

    Args:
        num_workers: n.
        configuration: LSAM's fields and the others that matter.
        model: "name" (None if it has none), "class", "adapter" (whether peft wraps it), "labels" (of a classifier
            that is adapted, else None) and "trainable_parameters".

    Returns:
        format, run_id, started (unix seconds), num_workers, host and pid (those of worker 0; each worker's are in its
        own file), model, configuration, versions and hardware.
    """
    return {
        "format": FORMAT,
        "run_id": secrets.token_hex(8),
        "started": time.time(),
        "num_workers": num_workers,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "model": model,
        "configuration": configuration,
        "versions": versions(),
        "hardware": hardware(),
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "hf_lsam": __version__,  # not from the metadata: the package need not be installed to be used
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """`cpu`, `cores` that this process may use, `memory_gib` and `gpus` (names)."""
    import torch  # not at the top, so that merely reading a record does not wait for it

    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


@dataclass(frozen=True)
class Record:
    """What `read_record` returns.

    Args:
        run: the contents of run.json.
        workers: for each rank that has written anything, its lines in the order in which they were written.
    """

    run: dict[str, Any]
    workers: dict[int, list[dict[str, Any]]]

    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations of the anchor, in the order in which they were made; see `is_metric`."""
        return [entry for entry in self.workers.get(0, []) if any(name.startswith("eval_") for name in entry)]

    def latest_evaluation(self) -> tuple[int, dict[str, float]]:
        """What was measured at the anchor that the model holds, or at the one that was evaluated last.

        Returns:
            the step of that anchor, and the results by their names, of all data sets; 0 and none without evaluations.
        """
        of_step: dict[int, dict[str, float]] = {}
        newest = 0
        for entry in self.workers.get(0, []):
            measured = {name: value for name, value in entry.items() if is_metric(name, value)}
            if measured or "loaded_step" in entry:
                newest = entry.get("loaded_step", entry["step"])
                of_step.setdefault(newest, {}).update(measured)
        return newest, of_step.get(newest, {})

    def points(self, rank: int, since_it_joined: bool = False) -> list[dict[str, Any]]:
        """A worker's log points, and its entries between them: the lines that say what it has exchanged.

        Args:
            rank: of the worker; without any line it has no points.
            since_it_joined: only those since it last joined or rejoined.
        """
        entries = self.workers.get(rank, [])
        joined = (index for index, entry in enumerate(entries) if entry.get("begin"))
        begin = max(joined, default=0) if since_it_joined else 0
        return [entry for entry in entries[begin:] if "lsam/anchor_version" in entry]

    def made_once(self) -> Record:
        """The record without the lines of steps that a resumed worker has repeated; byte counts continue across
        resumptions."""
        return Record(self.run, {rank: _made_once(entries) for rank, entries in self.workers.items()})


def is_metric(name: str, value: Any) -> bool:
    """Whether an item of an evaluation is a result, and not its cost in time or tokens."""
    return name.startswith("eval_") and isinstance(value, (int, float)) and not name.endswith(_WHAT_IT_TOOK)


def _made_once(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    before = dict.fromkeys(BYTES, 0)
    offset = dict(before)
    for entry in entries:
        if entry.get("begin"):
            kept = [earlier for earlier in kept if earlier["step"] <= entry["step"] and not earlier.get("end")]
            offset = dict(before)
        elif BYTES[0] in entry:
            entry = entry | {name: entry.get(name, 0) + offset[name] for name in before}
            before = {name: entry[name] for name in before}
        kept.append(entry)
    return kept


class Tail:
    """Reads the lines that are added to a worker's file.

    Args:
        path: the file, which need not exist yet.
    """

    def __init__(self, path: Path):
        self._path = path
        self._first = b""
        self._offset = 0

    def new_entries(self) -> list[dict[str, Any]]:
        """The complete lines added since the last call; torn ones are skipped."""
        try:
            with self._path.open("rb") as file:
                if (first := file.readline()) != self._first:  # a new run has begun in this folder
                    self._first, self._offset = first, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        entries = []
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                entries.append({key: float(v) if v in _NOT_FINITE else v for key, v in entry.items()})
        return entries


class RecordReader:
    """Reads the record of a run repeatedly while it grows, without reading any line twice.

    Args:
        run_dir: the run's output_dir.
    """

    def __init__(self, run_dir: Path | str):
        self._run_dir = Path(run_dir)
        self._tails: dict[int, Tail] = {}
        self._record = Record({}, {})

    def read(self) -> Record:
        """The record as it is now.

        Raises:
            FileNotFoundError: if there is no record.
            ValueError: if run.json is damaged, or of a format that this version does not know.
        """
        run = _read_run(self._run_dir)
        if run["run_id"] != self._record.run.get("run_id"):  # a new run has begun in this folder
            self._tails = {rank: Tail(worker_file(self._run_dir, rank)) for rank in range(run["num_workers"])}
            self._record = Record({}, {})
        workers = dict(self._record.workers)
        for rank, tail in self._tails.items():
            if entries := tail.new_entries():
                workers[rank] = [*workers.get(rank, []), *entries]
        self._record = Record(run, workers)
        return self._record


def read_record(run_dir: Path | str) -> Record:
    """Reads the record of a run once, which also works while the run goes on; see `RecordReader.read`."""
    return RecordReader(run_dir).read()


def _read_run(run_dir: Path) -> dict[str, Any]:
    path = run_dir / FOLDER / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{run_dir} holds no record of a run: there is no {path}. Name the output_dir of a run with LSAM that has "
            "joined its server; it appears when training begins."
        )
    try:
        run = json.loads(path.read_bytes())
        known = run["format"] == FORMAT and run["num_workers"] > 0 and run["run_id"] is not None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Resume the run, which writes the file again.") from error
    if not known:
        raise ValueError(
            f"{path} has format {run['format']}, and this hf_lsam reads format {FORMAT}. Use the version that wrote it "
            f"({run.get('versions', {}).get('hf_lsam')})."
        )
    return run


def worker_file(run_dir: Path, rank: int) -> Path:
    """The file that holds a worker's lines."""
    return run_dir / FOLDER / f"worker-{rank}.jsonl"


def worker_state(entries: Sequence[dict[str, Any]]) -> str:
    """The state of a worker: "training", "finished", "failed" (it left with an error), "dead" (its process is gone, and
    it has not left) or "away" (it runs on another machine or in another container, where this cannot be checked, or it
    has not begun).

    Args:
        entries: its lines.
    """
    begin = next((index for index in reversed(range(len(entries))) if entries[index].get("begin")), None)
    if begin is None:
        return "away"
    ended = next((entry for entry in entries[begin:] if entry.get("end")), None)
    if ended is not None:
        return "finished" if ended["error"] is None else "failed"
    process = entries[begin]
    if process["host"] != socket.gethostname():
        return "away"
    try:
        running = psutil.Process(process["pid"])
        same = abs(running.create_time() - process["process_started"]) < 2 and running.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        same = False
    return "training" if same else "dead"


def _to_json(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of numpy or torch
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
