"""Starts real processes through the real launcher, for tests."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

TESTS = Path(__file__).parent
ROOT = TESTS.parent
STARTUP = TESTS / "startup"  # for every process that tests start: sitecustomize, and what the fork server imports
# What a script needs on its PYTHONPATH to import what tests share.
PATHS = os.pathsep.join(map(str, (STARTUP, TESTS, ROOT)))
SHARED_MEMORY = Path("/dev/shm")
# What takes at most a second on an idle machine may take this long on a busy one.
TIMEOUT = 240.0
# Everything that tests start inherits this variable, even servers that outlive the process that started them, so that
# sessions on one machine can tell whose a process is.
SESSION = "HF_LSAM_TEST_SESSION"


def own_processes() -> list[tuple[int, str]]:
    """(pid, command line) of this process's descendants, and of processes that they have left behind."""
    descendants = psutil.Process().children(recursive=True)
    found = {process.pid: process for process in descendants}
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # gone, or another user's
            if process.pid != os.getpid() and process.environ().get(SESSION) == os.environ[SESSION]:
                found[process.pid] = process
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            # multiprocessing's own servers in this session do not count, but whatever they have forked does.
            if process.ppid() == os.getpid() and any(
                word.startswith("from multiprocessing.") for word in process.cmdline()
            ):
                found.pop(process.pid)
    return list(_running(found.values()))


def _running(processes) -> Iterator[tuple[int, str]]:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process.pid, " ".join(process.cmdline())


def own_shared_memory(known: Iterable[Path] = ()) -> set[Path]:
    """Folders of runs in /dev/shm, except those that a process of another test session, or of no test, has open.

    Args:
        known: folders to be left out; if there are no others, the search for their owners, of 50 ms, is skipped.
    """
    folders = set(SHARED_MEMORY.glob("hf_lsam-*")) - set(known)
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
        AssertionError: with what `explain` returns, if the condition still does not hold after `TIMEOUT` seconds.
    """
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.02)


def free_port() -> int:
    """A port of this machine on which nobody listens, and which the kernel gives to nobody who asks for any port."""
    first_given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    anew = random.SystemRandom()  # Trainer seeds the global one: two test processes would draw the same ports
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", anew.randrange(1024, first_given_away))) as probe:
            return probe.getsockname()[1]


# Importing what a worker needs takes 6 CPU seconds. So a launch may be forked from a server process that has imported
# it, which the first such launch starts; with torchrun's own options, its workers are forked from the launch in turn.
fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["preloaded"])
FORK_WORKERS = {"PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}


def accelerate_launch(
    script: str | Path,
    *arguments: str,
    num_processes: int = 2,
    multi_gpu: bool = True,
    check: bool = True,
    extra: tuple[str, ...] = (),
    fork: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Runs `accelerate launch` on CPU workers.

    Args:
        script: a path, or the source of a script.
        num_processes: workers.
        multi_gpu: without it, `accelerate launch` starts one process on a CPU machine.
        check: raise, with the output, if the run fails.
        extra: further options of `accelerate launch`.
        fork: save its processes their imports, if nothing depends on how they start or end: a forked worker inherits
            the launcher's signal handlers, and stays until its launcher has seen all of them end.
    """
    options = ["--multi_gpu"] if multi_gpu else []
    options += ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", "0", *extra, str(script), *arguments]
    # Warnings are errors in the tests' own process only; a test that is about workers' warnings reads their output.
    run = run_launcher(options, fork, **environment)
    if check and run.returncode != 0:
        raise AssertionError(f"exit code {run.returncode}\n{run.stdout[-4000:]}\n{run.stderr[-8000:]}")
    return run


def run_launcher(words: Sequence[str], fork: bool, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with these words; `fork` as for `accelerate_launch`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if fork:
        return _forked(_launch, words, {**environment, **FORK_WORKERS})
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_script(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script of the repository, and what it launches, in forked processes: none of them repeats the imports."""
    return _forked(_run_script, [str(script), *arguments], {**os.environ, "OMP_NUM_THREADS": "1", **FORK_WORKERS})


def _forked(target: Callable, words: Sequence[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        process = fork_server.Process(target=_in_fork, args=(target, words, os.getcwd(), environment, outputs))
        process.start()
        process.join()
        said = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def _in_fork(
    target: Callable, words: Sequence[str], folder: str, environment: dict[str, str], outputs: list[Path]
) -> None:
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    target(words)


def _launch(words: Sequence[str]) -> None:
    """What `python -m accelerate.commands.launch` does."""
    from accelerate.commands import launch

    script = next(word for word in words if word.endswith(".py"))
    sys.path.insert(0, str(Path(script).resolve().parent))  # with PET_RUN_PATH, torchrun does not add it
    sys.argv[1:] = words
    launch.main()


def _run_script(words: Sequence[str]) -> None:
    """What `python script` does."""
    from scripts.common import launches

    launches.launch = _launch_from_fork
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")


def _launch_from_fork(processes: int, script: str, arguments: Sequence[str]) -> None:
    """Replaces `scripts.common.launches.launch`."""
    from scripts.common import launches

    target, words = _run_script, [script, *arguments]
    if processes > 1:
        target, words = _launch, [*launches.launch_command(processes)[3:], *words]
    fork = multiprocessing.get_context("fork").Process(target=target, args=(words,))
    fork.start()
    fork.join()
    if fork.exitcode:
        raise subprocess.CalledProcessError(fork.exitcode, [script, *arguments])


def write_script(path: Path, source: str) -> Path:
    """Writes an indented source text as a script."""
    path.write_text(textwrap.dedent(source))
    return path
