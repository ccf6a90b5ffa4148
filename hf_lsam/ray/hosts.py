"""Hosts: Ray actors, each of which manages one process on its node.

No process that trains or exchanges vectors is Ray's own: it is the child of a host, in a session of its own, with its
output in a file. What matters is what becomes of it when its host dies:

    server, relay   die with it. The supervisor starts another one, and two of a kind would split the run.
    worker          survives: it finds its server gone, continues alone, saves a checkpoint and ends with an error, as
                    any external worker does. If its relay is still alive, it is told to save and leave (`end_orphan`).

A host dies with the node's Ray (its raylet), with the supervisor, and when Ray's head does not come back.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ray

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
LOG_LINES = 5  # how many lines of its log are quoted when a process has ended with an error
_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


class Host:
    """Manages one process.

    Args:
        log: file to which the output of the process is appended.

    Process: an actor's own, in its main thread, because the kernel takes the death of the thread that started a process
    for the death of its parent. Blocking: where a method says so, else never.
    """

    def __init__(self, log: Path):
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        # An idle actor may not notice that its raylet has died.
        threading.Thread(target=_end_with, args=[os.getppid()], daemon=True).start()

    def where(self) -> tuple[str, str]:
        """Ray's id of the node, and the node's address."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def signal(self, number: int) -> None:
        """Sends a signal to the process, if it runs."""
        if (process := self._running) is not None:
            process.send_signal(number)

    def code(self) -> int | None:
        """The exit code of the process: None while it runs, negative if a signal ended it."""
        assert self._process is not None  # asked of a worker's host, once it has started its process
        return self._process.poll()

    def last_lines(self) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    @property
    def _running(self) -> subprocess.Popen[bytes] | None:
        """The process, if it runs."""
        return self._process if self._process is not None and self._process.poll() is None else None

    def _start(self, words: Sequence[str], dies_with_host: bool, folder: Path | None = None, **environment: str) -> int:
        """Starts Python with `words`, in `folder`; returns its pid."""
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_dying_with(os.getpid()) if dies_with_host else None,
            )
        return self._process.pid


class WorkerHost(Host):
    """Manages one worker: the user's script, as an external worker of the relay on its node.

    Its CUDA_VISIBLE_DEVICES is the one that Ray gives the actor.
    """

    def start(self, words: Sequence[str], folder: Path | None, relay: Path, number: int, num_workers: int) -> int:
        """Starts the worker, unless it has been started already.

        Args:
            words: the script and its arguments.
            folder: its working directory, None for the actor's own.
            relay: run folder of the relay.
            number: number of this worker, out of `num_workers`.

        Returns:
            its pid.

        Raises:
            FileNotFoundError: if `folder` is not on this node.
        """
        if self._process is not None:
            return self._process.pid
        if folder is not None and not folder.is_dir():
            raise FileNotFoundError(
                f"The script is to start in {folder}, which node {self.where()[1]} does not have. Start from a "
                "folder that all nodes share, or upload it with ray job submit --working-dir."
            )
        return self._start(
            words,
            dies_with_host=False,
            folder=folder,
            HF_LSAM_SERVER_ADDRESS=str(relay),
            HF_LSAM_WORKER=str(number),
            HF_LSAM_NUM_WORKERS=str(num_workers),
        )


def _end_with(raylet: int) -> None:
    while os.getppid() == raylet:
        time.sleep(1.0)
    os._exit(1)


def _dying_with(host: int) -> Callable[[], None]:
    """What a new process does so that it is killed when the host's main thread dies."""
    libc = ctypes.CDLL(None)  # loaded now, because nothing may be loaded between fork and exec

    def die_with_host() -> None:
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != host:  # it has died already
            os._exit(1)

    return die_with_host
