"""What every test must comply with: it leaves no process, thread, shared-memory file or environment variable behind.

Only what this process and its descendants have created counts: other test sessions may run on the machine, as they do
when pytest-xdist starts several processes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# As many test processes run as there are cores: threads that wait for each other would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from launch import SESSION, SHARED_MEMORY, STARTUP, own_processes, own_shared_memory

os.environ[SESSION] = f"{os.getpid()} {time.time()}"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(STARTUP), os.environ.get("PYTHONPATH"))))
# Set once by libraries at their first use and then left alone.
LIBRARY_VARIABLES = ("ACCELERATE_", "PYTEST_", "KMP_", "TORCHINDUCTOR_", "TRITON_", "MPLBACKEND", "TF_", "CUDA_MODULE_")
# Pools that a library starts once for the whole process.
LIBRARY_THREADS = ("tqdm", "pyarrow", "fsspec", "ThreadPoolExecutor", "asyncio", "TMonitor", "InductorSubproc")


def _state(known: set[Path]) -> dict[str, set]:
    return {
        "process": {f"{pid} {command}" for pid, command in own_processes()},
        "thread": {thread for thread in threading.enumerate() if not thread.name.startswith(LIBRARY_THREADS)},
        "shared-memory file": own_shared_memory(known),
        "environment variable": {
            (name, value) for name, value in os.environ.items() if not name.startswith(LIBRARY_VARIABLES)
        },
    }


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Fails a test that leaves something behind."""
    known = set(SHARED_MEMORY.iterdir())
    before = _state(known)
    yield
    deadline = time.monotonic() + 60  # what is being shut down may take a moment to go
    while True:
        after = _state(known)
        left = {what: after[what] - before[what] for what in before if after[what] - before[what]}
        if not left or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert not left, f"left behind: {left}"


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps one state per process; each test starts without it."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
