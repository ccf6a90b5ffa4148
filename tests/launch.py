"""Starts real processes through the real launcher, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil


def own_processes() -> list[tuple[int, str]]:
    """(pid, command line) of this process's descendants, and of servers of runs that were started from here."""
    processes = psutil.Process().children(recursive=True)
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append((process.pid, " ".join(process.cmdline())))
        except psutil.NoSuchProcess:
            continue
    return found


def accelerate_launch(
    script: str | Path,
    *arguments: str,
    num_processes: int = 2,
    multi_gpu: bool = True,
    timeout: float = 240,
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
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if check and run.returncode != 0:
        raise AssertionError(f"exit code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}")
    return run


def write_script(path: Path, source: str) -> Path:
    """Writes an indented source text as a script."""
    path.write_text(textwrap.dedent(source))
    return path
