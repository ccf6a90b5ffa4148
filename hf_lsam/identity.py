"""Who this process is: rank, device and run, from the launcher's environment, without a process group.

Under `accelerate launch` with n processes, Accelerate would turn them into one distributed job, and Trainer would
all-reduce, gather and wait in a dozen places. LSAM's workers are n single-device jobs instead: Accelerate sees
`DistributedType.NO` and one process, while process index and device remain those of the launcher. Every collective
becomes a no-op; logging, saving and progress bars still belong to process 0.

Before the workers have an anchor in common, and after, they communicate through the launcher's key-value store.

Workers may also be started individually, to join a server that is already running. The environment then says which
server (`SERVER_ADDRESS`), and which of how many workers each one is (`WORKER`, `NUM_WORKERS`). Such workers come and
go, and have no key-value store.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_RANK_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
_PIECE = 1 << 22  # bytes; the store closes the connection if a message exceeds 8 MiB

# SERVER_ADDRESS is read if the script sets none. WORKER and NUM_WORKERS must be set together.
SERVER_ADDRESS, WORKER, NUM_WORKERS = "HF_LSAM_SERVER_ADDRESS", "HF_LSAM_WORKER", "HF_LSAM_NUM_WORKERS"


@dataclass(frozen=True)
class Identity:
    """This process among the workers of a run.

    Args:
        rank: number of this worker in the run.
        local_rank: number of this worker on its machine.
        num_workers: how many workers the launcher started, on all machines; or how many the run is meant to have, if
            workers come and go.
        machine: number of this machine.
        num_machines: how many machines the launch has.
        local_workers: how many workers run on this machine.
        comes_and_goes: whether the worker was started individually and not by a launcher that starts all together.
    """

    rank: int = 0
    local_rank: int = 0
    num_workers: int = 1
    machine: int = 0
    num_machines: int = 1
    local_workers: int = 1
    comes_and_goes: bool = False

    @property
    def meets_others(self) -> bool:
        """Whether there are other workers, and a launcher's store to communicate with them."""
        return self.num_workers > 1 and not self.comes_and_goes

    @classmethod
    def from_environment(cls) -> Identity:
        """Reads RANK, LOCAL_RANK and WORLD_SIZE as set by torchrun and `accelerate launch`; with several machines also
        LOCAL_WORLD_SIZE, GROUP_RANK and GROUP_WORLD_SIZE. HF_LSAM_WORKER and HF_LSAM_NUM_WORKERS take precedence.

        Raises:
            ValueError: if the workers are spread over several machines and the launcher does not say which is which,
                or would restart one machine alone; if the launcher was asked for more processes than it started; or if
                HF_LSAM_WORKER and HF_LSAM_NUM_WORKERS do not fit together.
        """

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        if WORKER in os.environ or NUM_WORKERS in os.environ:
            worker, workers = number(WORKER, -1), number(NUM_WORKERS, 0)
            if not 0 <= worker < workers:
                raise ValueError(
                    f"{WORKER}={os.environ.get(WORKER)} and {NUM_WORKERS}={os.environ.get(NUM_WORKERS)} do not "
                    f"say which worker this is. Set both, {WORKER} from 0 to {NUM_WORKERS} - 1, or neither."
                )
            return cls(worker, num_workers=workers, comes_and_goes=True)
        workers = number("WORLD_SIZE", 1)
        here = number("LOCAL_WORLD_SIZE", workers)
        machine, machines = (number("GROUP_RANK", 0), number("GROUP_WORLD_SIZE", 1)) if here < workers else (0, 1)
        identity = cls(number("RANK", 0), number("LOCAL_RANK", 0), workers, machine, machines, here)
        if here < workers and machines == 1:
            raise ValueError(
                f"{workers} workers were started, {here} of them on this machine, and the launcher does not say "
                "which machine this is (GROUP_RANK, GROUP_WORLD_SIZE), so no server can be found. Start them "
                "with torchrun or `accelerate launch --num_machines`."
            )
        if machines > 1 and number("TORCHELASTIC_MAX_RESTARTS", 0):
            raise ValueError(
                "--max_restarts is set. With several machines, the launcher would restart the workers of one "
                "machine without the others, and they would wait for a run that nobody else joins. Remove it. "
                "When a machine fails, the others go on; to get it back, start all machines again with "
                "resume_from_checkpoint."
            )
        asked = _processes_asked_of_launcher()
        if asked is not None and asked > identity.num_workers:
            raise ValueError(
                f"`accelerate launch` was asked for {asked} processes and started {identity.num_workers}: without "
                "--multi_gpu it starts one process on a machine without GPUs, whatever --num_processes says. Add "
                "--multi_gpu, and on CPU also `use_cpu=True` in the training arguments."
            )
        return identity

    def require_workers(self, num_workers: int | None) -> None:
        """
        Raises:
            ValueError: if `num_workers` is set, and a different number of workers was started.
        """
        if num_workers not in (None, self.num_workers):
            raise ValueError(
                f"num_workers={num_workers}, but {self.num_workers} were started: the run would not be the one that "
                f"was configured. Launch with `accelerate launch --multi_gpu --num_processes {num_workers}` (on CPU "
                "too, with use_cpu=True: without --multi_gpu only one process starts there), or set num_workers to "
                "what you want."
            )


def _processes_asked_of_launcher() -> int | None:
    """--num_processes of the `accelerate launch` that is this process's parent; None if the parent is not one."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return None
    program = [Path(word).name for word in words[:4]]
    for length, name in enumerate(program, 1):
        # `accelerate launch`, `accelerate-launch` or `python -m accelerate.commands.launch`
        if "launch" in name and any("accelerate" in word for word in program[:length]):
            return _number_of_processes(words[length:])
    return None


def _number_of_processes(words: list[str]) -> int | None:
    """--num_processes among Accelerate's own options; whatever follows the script's name belongs to the script."""
    with suppress(SystemExit), redirect_stderr(io.StringIO()):  # raised if it was some other program after all
        return launch_command_parser().parse_args(words).num_processes
    return None


def pin(identity: Identity, use_cpu: bool, device: torch.device | None = None) -> torch.device:
    """Sets Accelerate's state in this process to that of one worker among many.

    A default process group that the user's script has opened (`Accelerator()` before the training arguments) is
    closed: any collective in it might wait for a worker that never gets there.

    Args:
        identity: this process.
        use_cpu: train on CPU even where there is a GPU.
        device: where the model already is; None chooses a device of this machine.

    Returns:
        the device this worker trains on.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    hidden = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        state = PartialState(cpu=use_cpu)
    finally:
        os.environ.update(hidden)
    assert state.distributed_type == DistributedType.NO
    state.process_index = identity.rank
    state.local_process_index = identity.local_rank
    state.device = device or state.device
    if state.device.type not in ("cpu", "mps"):
        module = torch.get_device_module(state.device)
        if device is None:  # if there are more workers than GPUs, they are assigned round-robin
            state.device = torch.device(state.device.type, identity.local_rank % module.device_count())
        module.set_device(state.device)
    return state.device


def is_pinned(identity: Identity) -> bool:
    """Whether Accelerate's state is still what `pin` made it; a second TrainingArguments resets it."""
    state = PartialState._shared_state
    return (
        state.get("distributed_type") == DistributedType.NO
        and state.get("num_processes") == 1
        and state.get("process_index") == identity.rank
    )


def detach(identity: Identity, device: torch.device) -> None:
    """Like `pin` with the model's `device`, for when an Accelerator may exist already, which keeps its device,
    precision and scaler."""
    if not PartialState._shared_state:
        pin(identity, device.type == "cpu", device)
        return
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        if state:
            state.update(distributed_type=DistributedType.NO, num_processes=1)


@contextmanager
def data_sharding(num_workers: int) -> Iterator[None]:
    """Inside, Accelerate prepares data loaders for one of `num_workers` processes, so that its own sharding is used."""
    states = [PartialState._shared_state, AcceleratorState._shared_state]  # the second holds a copy of the first
    for state in states:
        state["num_processes"] = num_workers
    try:
        yield
    finally:
        for state in states:
            state["num_processes"] = 1


class LaunchStore:
    """Communication among the workers of one launch, through the launcher's own TCPStore; the first use connects.

    Args:
        identity: this process.
        timeout: seconds that `get` waits for a key.

    All methods raise torch.distributed.DistError if the launcher is gone.

    Blocking: `get` and `take` until another worker has set the key. Process: any; never in a training step.
    """

    def __init__(self, identity: Identity, timeout: float = 600.0):
        self._identity = identity
        self._timeout = timeout

    @cached_property
    def _store(self) -> torch.distributed.Store:
        agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "False") == "True"
        store = torch.distributed.TCPStore(
            os.environ.get("MASTER_ADDR", "127.0.0.1"),
            int(os.environ.get("MASTER_PORT", 29500)),
            is_master=self._identity.rank == 0 and not agent_hosts,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._timeout),
        )
        # A restarted launch (--max_restarts) keeps its store, and must not find the keys of the previous attempt.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return torch.distributed.PrefixStore(f"hf_lsam/{attempt}", store)

    def set(self, key: str, value: Any) -> None:
        """Sets `key` to a JSON value."""
        self._store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """The JSON value of `key`.

        Raises:
            RuntimeError: if no worker sets it in time.
        """
        return json.loads(self._store.get(key))

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Collects one JSON value per worker at worker 0, in rank order; returns None at the others."""
        self.set(f"{key}/{self._identity.rank}", value)
        if self._identity.rank != 0:
            return None
        return [self.get(f"{key}/{rank}") for rank in range(self._identity.num_workers)]

    def count(self, key: str, times: int = 1) -> int:
        """Adds `times` to the counter `key` and returns the sum. No two callers get the same number, unless `times` is
        0."""
        return self._store.add(key, times)

    def put(self, key: str, data: bytes) -> None:
        """Sets `key` to `data`, of any length; an empty one tells those who `take` it that there will be no data."""
        for start in range(0, len(data), _PIECE):
            self._store.set(f"{key}/{start}", data[start : start + _PIECE])  # type: ignore[arg-type]  # its stub knows no bytes
        self._store.set(key, str(len(data)))  # last, so that whoever finds it finds the pieces as well

    def take_back(self, key: str) -> None:
        """Frees what was put: whoever takes it from now on gets empty bytes, without waiting."""
        length = int(self._store.get(key))
        self._store.set(key, "0")
        for start in range(0, length, _PIECE):  # not deleted, because somebody may be about to get it
            self._store.set(f"{key}/{start}", b"")  # type: ignore[arg-type]  # as above

    def take(self, key: str, seconds: float) -> bytes | None:
        """The bytes that were put; empty if they were taken back, or none were put; None if `key` is not set within
        `seconds`."""
        give_up = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > give_up:
                return None
            time.sleep(0.02)
        length = int(self._store.get(key))
        data = b"".join(self._store.get(f"{key}/{start}") for start in range(0, length, _PIECE))
        return data if len(data) == length else b""
