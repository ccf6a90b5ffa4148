"""What every test is held to: it leaves no process, thread, shared-memory file or environment variable behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from launch import own_processes

SHARED_MEMORY = Path("/dev/shm")
# Set once by libraries at their first use and then left alone.
LIBRARY_VARIABLES = ("ACCELERATE_", "PYTEST_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "MPLBACKEND", "TF_", "CUDA_MODULE_")
# Pools that a library starts once for the whole process.
LIBRARY_THREADS = ("tqdm", "pyarrow", "fsspec", "ThreadPoolExecutor", "asyncio", "TMonitor", "InductorSubproc")


def _state() -> dict[str, set]:
    return {
        "process": {f"{pid} {command}" for pid, command in own_processes()},
        "thread": {thread for thread in threading.enumerate() if not thread.name.startswith(LIBRARY_THREADS)},
        "shared-memory file": set(SHARED_MEMORY.glob("hf_lsam-*")),
        "environment variable": {
            (name, value) for name, value in os.environ.items() if not name.startswith(LIBRARY_VARIABLES)
        },
    }


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Fails a test that leaves something behind."""
    before = _state()
    yield
    deadline = time.monotonic() + 10  # what is being shut down may take a moment to go
    while True:
        after = _state()
        left = {what: after[what] - before[what] for what in before if after[what] - before[what]}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert not left, f"left behind: {left}"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps one state a process; each test starts without."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
