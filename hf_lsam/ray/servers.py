"""Hosts of the servers: a relay on each node that has workers, and the global server on one of them.

A run folder lies where its node exchanges vectors; what the global server has saved there is copied to the run's own
folder, which all nodes share, so that another node can go on from it.
"""

from __future__ import annotations

import shutil
import signal
import socket
from contextlib import suppress
from pathlib import Path

import psutil

from ..checkpoint import load_tensors
from ..files import replacing
from ..transport.mailbox import RunFolder
from ..transport.ownership import make_launch_folder
from .hosts import Host

MOST_ERRORS = 3  # with which a server may end before the run is given up
DESCRIPTION = ("parameters.json", "run.json")  # of a run in its folder; the second is written last
SNAPSHOT = "snapshot.safetensors"


class ServerHost(Host):
    """Keeps a server process: starts it again, with --resume, whenever it has ended.

    Args:
        shared_memory_dir: where the node exchanges vectors.
        name: of the run folder there; that of a host before this one is taken over.
        secret: file with the secret of the run.
        log: see `Host`.

    Raises:
        OSError: if there can be no run folder.
    """

    def __init__(self, shared_memory_dir: Path, name: str, secret: Path, log: Path):
        super().__init__(log)
        self._secret = secret
        self.folder, self._lock = make_launch_folder(shared_memory_dir, name)
        self._errors = 0

    @property
    def _holds_run(self) -> bool:
        return (self.folder / "run.json").exists()

    def _ended(self) -> bool:
        """Whether there is no process, or none any more.

        Raises:
            RuntimeError: if too many have ended with an error of their own.
        """
        if self._process is None or self._running is not None:
            return self._process is None
        self._errors += self._process.returncode > 0
        if self._errors == MOST_ERRORS:
            raise RuntimeError(f"The server on node {self.where()[1]} ends with an error:\n{self.last_lines()}")
        return True

    def _serve(self, *role: str) -> None:
        resume = ["--resume"] if self._holds_run else []
        # It ends with its host, however long it has no worker.
        words = ["-P", "-m", "hf_lsam.server", "--run_dir", str(self.folder), *resume, "--idle_timeout", "inf"]
        self._start([*words, *role, "--secret_file", str(self._secret)], dies_with_host=True)

    def end(self) -> None:
        """Tells the server to end, and removes its folder. Blocking: until it has handed in, or saved, what it has."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            self._process.wait()
        self._keep()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _keep(self) -> None:
        """What outlives the folder; nothing of a relay's."""


class RelayHost(ServerHost):
    """Keeps the relay of its node."""

    _root = ""  # which the relay was started to connect to

    def tend(self, root: str) -> tuple[bool, int]:
        """To be called again and again.

        Args:
            root: host and port of the global server. One that has moved needs another relay in the same folder: it
                loses what this one has summed, and the workers find it by themselves.

        Returns:
            whether there is a run in the folder, which its first worker creates, and the newest version there.
        """
        if root != self._root and (process := self._running) is not None:
            process.kill()
            process.wait()
        if self._ended():
            self._serve("--connect", root)
            self._root = root
        with suppress(FileNotFoundError):  # the relay is about to end or to begin
            return True, RunFolder(self.folder).version
        return False, 0

    def end_orphan(self, pid: int) -> None:
        """Tells a worker of this node whose host has died to save and to leave: another one takes its number."""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.environ().get("HF_LSAM_SERVER_ADDRESS") == str(self.folder):  # the pid may have a new owner
                process.send_signal(signal.SIGTERM)


class RootHost(ServerHost):
    """Keeps the global server.

    Args:
        kept: folder that all nodes share, for the description of the run and its newest snapshot.
        port: where to listen; None chooses one.
    """

    def __init__(
        self, shared_memory_dir: Path, name: str, secret: Path, log: Path, kept: Path, port: int | None = None
    ):
        super().__init__(shared_memory_dir, name, secret, log)
        self._kept = kept
        self._copied: dict[str, int] = {}  # file -> when what was copied had been written, ns
        self._port = port or _free_port()
        kept.mkdir(parents=True, exist_ok=True)

    def tend(self, relay: Path | None, version: int) -> tuple[str, int]:
        """To be called again and again. Blocking: while a snapshot is copied.

        Args:
            relay: folder of a relay on this node, which has a run; None if there is none. A run that has no snapshot
                yet begins with the relay's anchor.
            version: the newest that any relay has seen. A run that goes on elsewhere than it was goes on above it.

        Returns:
            host and port where the server listens, or will.
        """
        if self._ended():
            if not self._holds_run:
                self._take_up(relay, version)
            if self._process is not None and self._process.returncode > 0:
                self._port = _free_port()  # the one that it had may be another's by now
            if self._holds_run:
                self._serve("--listen", f"{self.where()[1]}:{self._port}", "--allow_remote")
        self._keep()
        return self.where()[1], self._port

    def _take_up(self, relay: Path | None, version: int) -> None:
        """The run that was kept, or a relay's."""
        if (self._kept / SNAPSHOT).exists():
            for name in (SNAPSHOT, *DESCRIPTION):
                shutil.copyfile(self._kept / name, self.folder / name)
            folder = RunFolder.reopen(self.folder)
            anchor = load_tensors(folder.snapshot_path)["anchor"]
        elif relay is not None:
            there = RunFolder(relay)
            anchor = there.slot(there.version)
            folder = RunFolder.create(self.folder, anchor, 0, there.manifest, there.run)
        else:
            return
        if version > folder.version:
            folder.publish(anchor, version)

    def _keep(self) -> None:
        """Copies what is newer here than there: whole, or not at all."""
        for name in (*DESCRIPTION, SNAPSHOT):
            here = self.folder / name
            with suppress(FileNotFoundError):
                written = here.stat().st_mtime_ns
                if written != self._copied.get(name):
                    with replacing(self._kept / name) as beside:
                        shutil.copyfile(here, beside)
                    self._copied[name] = written


def _free_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return probe.getsockname()[1]
