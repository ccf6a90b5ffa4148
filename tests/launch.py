"""Starts real processes through the real launcher, for tests."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
# What must happen on an idle machine within a second may take this long on one that is busy.
PATIENCE = 240.0
# All that tests start inherits it, and so do the servers that outlive who started them: sessions on one machine can
# tell whose a process is.
SESSION = "HF_LSAM_TEST_SESSION"


def own_processes() -> list[tuple[int, str]]:
    """(pid, command line) of this process's descendants, and of what they have started and left behind."""
    found = {process.pid: process for process in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or another user's
            if process.pid != os.getpid() and process.environ().get(SESSION) == os.environ[SESSION]:
                found[process.pid] = process
    return list(_running(found.values()))


def _running(processes) -> Iterator[tuple[int, str]]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, " ".join(process.cmdline())


def own_shared_memory() -> set[Path]:
    """Folders of runs in /dev/shm, except those that a process of another test session, or of no test, has open."""
    folders = set(SHARED_MEMORY.glob("hf_lsam-*"))
    if not folders:
        return folders
    ours = {os.getpid(), *(pid for pid, _ in own_processes())}
    theirs = {path for pid in psutil.pids() if pid not in ours for path in _open_files(pid)}
    return {folder for folder in folders if not any(path.startswith(f"{folder}/") for path in theirs)}


def _open_files(pid: int) -> Iterator[str]:
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        yield from (line.split(maxsplit=5)[5] for line in (process / "maps").read_text().splitlines() if "/" in line)
        for descriptor in (process / "fd").iterdir():
            with suppress(FileNotFoundError):
                yield os.readlink(descriptor)


def wait_until(condition: Callable[[], object], explain: Callable[[], object] = str) -> None:
    """Returns once the condition holds.

    Raises:
        AssertionError: with what `explain` says, if it still does not after `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


def free_port() -> int:
    """A port of this machine that nobody listens on; the kernel gives it to nobody who asks for any."""
    first_given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(1024, first_given_away))) as probe:
            return probe.getsockname()[1]


def accelerate_launch(
    script: str | Path,
    *arguments: str,
    num_processes: int = 2,
    multi_gpu: bool = True,
    check: bool = True,
    extra: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.CompletedProcess:
    """Runs `accelerate launch` on CPU workers.

    Args:
        script: a path, or the source of a script.
        num_processes: workers.
        multi_gpu: without it `accelerate launch` starts one process on a CPU machine.
        check: raise, with the output, if the run fails.
        extra: further options of `accelerate launch`.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu"] if multi_gpu else []
    command += ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", *extra, str(script), *arguments]
    # Warnings are errors in the tests' own process; the workers' are looked at where a test is about them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if check and run.returncode != 0:
        raise AssertionError(f"exit code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}")
    return run


def write_script(path: Path, source: str) -> Path:
    """Writes an indented source text as a script."""
    path.write_text(textwrap.dedent(source))
    return path
