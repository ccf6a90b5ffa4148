"""A server process from start to end: who starts it, which run it serves, and what it leaves behind."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..transport.mailbox import RunFolder
from ..transport.ownership import served_by_this_process
from .role import Role
from .root import Root
from .service import Service

logger = logging.getLogger(__name__)

SIGTERM_CODE = 143


def run_server(
    run_dir: Path,
    resume: Path | bool | None = None,
    join_timeout: float = 600.0,
    idle_timeout: float = 600.0,
    parent: int | None = None,
    make_role: Callable[[RunFolder], Role] = Root,
    keeps_state: bool = True,
) -> None:
    """Serves the run in `run_dir` from this process. If there is none yet, waits for the first worker to create it.

    At the end, the folder of a launch is removed. A folder that external workers join keeps its last snapshot.

    Args:
        run_dir, resume, join_timeout, idle_timeout, parent: see `Service`.
        make_role: makes this server's role in the run from the run folder.
        keeps_state: whether this server keeps the state of the run. One that does not, a relay, continues the run that
            it finds in a folder that external workers join, as with `resume=True`: whatever its predecessor left there,
            the anchor is the root's.

    Raises:
        RuntimeError: if another process serves the folder, if it holds a run that is not to be resumed, or if no worker
            creates a run within `idle_timeout` seconds.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(SIGTERM_CODE))
    torch.set_num_threads(1)
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Read before the folder is served: once it is, a worker that was waiting for a server creates its run there.
    holds_a_run = (run_dir / "run.json").exists()
    with served_by_this_process(run_dir):
        if holds_a_run and not keeps_state and not json.loads((run_dir / "run.json").read_text())["num_workers"]:
            resume = True
        folder = _open(run_dir, holds_a_run, resume is True, idle_timeout)
        launched = bool(folder.run["num_workers"])
        server = Service(folder, make_role(folder), resume, join_timeout, idle_timeout, parent)

        def end(*_: object) -> None:
            server.waits_for_nobody = server.terminating and not launched
            server.terminating = True

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, signal.SIG_IGN if launched else end)  # a launch's workers get Ctrl-C themselves
        server.serve()
        if launched:
            folder.remove()
        elif server.save():  # if there is no room for the snapshot, the shared anchor stays in its place
            folder.clear()
    if server.terminating:
        sys.exit(SIGTERM_CODE)


def _open(run_dir: Path, holds_a_run: bool, resume: bool, idle_timeout: float) -> RunFolder:
    """Opens the run in `run_dir`; if there was none yet, waits for the one that the first worker creates."""
    if resume and holds_a_run:
        return RunFolder.reopen(run_dir)
    if holds_a_run:
        folder = RunFolder(run_dir) if (run_dir / "version").exists() else None
        if folder is None or not folder.run["num_workers"]:
            raise RuntimeError(
                f"{run_dir} holds the anchor of another run, which a new run would overwrite. Continue that run "
                "(--resume), or choose another folder."
            )
        return folder
    logger.info("%s waits for its first worker", run_dir)
    deadline = time.monotonic() + idle_timeout
    while not (run_dir / "run.json").exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"No worker came to {run_dir} within {idle_timeout:g} s.")
        time.sleep(0.05)
    return RunFolder(run_dir)


def start_server(
    run_dir: Path, log: Path, resume: Path | bool | None = None, options: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """Starts `python -m hf_lsam.server` for the run in `run_dir`.

    It does not use multiprocessing, whose spawn would import the user's script again.

    Args:
        run_dir: a folder made by `RunFolder.create`.
        log: file to which the server's log is appended.
        resume: a server state to begin with, True to continue from the folder's own snapshot, or None.
        options: further command-line options.

    Returns:
        the process; it ends on its own when the last worker has left.

    Raises:
        OSError: if its log cannot be written.
    """
    # -P: a script's own folder is on its path, the current folder is not.
    command = [sys.executable, "-P", "-m", "hf_lsam.server", "--run_dir", str(run_dir), "--parent", str(os.getpid())]
    if resume is not None:
        command += ["--resume"] if resume is True else ["--resume", str(resume)]
    command += options
    # The package may be in a place from which only the user's script can import it.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("a")
    except OSError as error:
        raise OSError(
            error.errno,
            f"The server was not started, because its log {log} cannot be written ({error.strerror}); without a "
            "server the workers cannot exchange anything. Set output_dir to a folder that can be written to.",
        ) from error
    with stream:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
