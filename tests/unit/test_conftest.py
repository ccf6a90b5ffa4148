"""The check that a test leaves nothing behind: it sees all that the session has made, and nothing of another's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from launch import PATHS, SESSION, SHARED_MEMORY, own_processes, own_shared_memory, wait_until

# Makes the folder of a run, as a launch's first worker does, and holds it until it is killed. Nobody's child.
HOLDER = """
import os, sys, time
from pathlib import Path
from hf_lsam.transport.ownership import make_launch_folder
if os.fork():
    os._exit(0)
folder, lock = make_launch_folder(Path(sys.argv[1]))
print(os.getpid(), folder, flush=True)
os.close(1)
time.sleep(1000)
"""


@contextmanager
def holder(session: str) -> Iterator[tuple[int, Path]]:
    """The id of a process of that test session, and the folder it holds."""
    environment = {**os.environ, "PYTHONPATH": PATHS, SESSION: session}
    command = [sys.executable, "-c", HOLDER, str(SHARED_MEMORY)]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    process, folder = int(said[0]), Path(said[1])
    try:
        yield process, folder
    finally:
        kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def kill(process: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE)


def test_what_another_session_has_made_is_not_ours():
    with holder("another") as (_, folder):
        assert folder.exists()
        assert folder not in own_shared_memory()


def test_a_folder_is_ours_while_its_process_lives_and_after_it_was_killed():
    with holder(os.environ[SESSION]) as (process, folder):
        assert folder in own_shared_memory()
        kill(process)
        # A launch of another test removes what the dead have left.
        assert folder in own_shared_memory() or not folder.exists()


def test_a_process_whose_parent_has_ended_is_still_ours():
    """As the server of a run whose first worker was killed."""
    child = "import subprocess; print(subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=-3).pid)"
    pid = int(subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, check=True).stdout)
    try:
        # Between its fork and the end of its exec it has no environment.
        wait_until(lambda: pid in [ours for ours, _ in own_processes()])
    finally:
        kill(pid)
