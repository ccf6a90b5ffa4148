"""Hosts of the servers: a relay on each node that has workers, and the root server on one of these nodes.

A run folder is where its node exchanges vectors. What the root server saves there is copied to the folder of the run,
which all nodes share, so that another node can continue from it.
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

MOST_ERRORS = 3  # the run is given up when a server has ended with as many errors
DESCRIPTION = ("parameters.json", "run.json")  # of a run in its folder; the second is written last
SNAPSHOT = "snapshot.safetensors"


class ServerHost(Host):
    """Manages a server process: starts it again, with --resume, whenever it has ended.

    Args:
        shared_memory_dir: where the node exchanges vectors.
        name: of the run folder there; the folder of an earlier host is taken over.
        secret: file with the secret of the run.
        log: see `Host`.

    Raises:
        OSError: if the run folder cannot be made.
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
        """Whether no process has been started, or the last one has ended.

        Raises:
            RuntimeError: if too many processes have ended with an error of their own.
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
        """Tells the server to end, and removes its folder. Blocking: until it has forwarded, or saved, what it has."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            self._process.wait()
        self._keep()
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _keep(self) -> None:
        """Saves what must outlive the folder; for a relay, nothing."""


class RelayHost(ServerHost):
    """Manages the relay of its node."""

    _root = ""  # the root that the relay was started to connect to

    def tend(self, root: str) -> tuple[bool, int]:
        """Keeps the relay running. Must be called again and again.

        Args:
            root: host and port of the root server. If they change, another relay is started in the same folder: what
                the old one has summed is lost, and the workers find the new one by themselves.

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
        """Tells a worker of this node whose host has died to save and leave, because another one takes its number."""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.environ().get("HF_LSAM_SERVER_ADDRESS") == str(self.folder):  # the pid may have a new owner
                process.send_signal(signal.SIGTERM)


class RootHost(ServerHost):
    """Manages the root server.

    Args:
        kept: folder that all nodes share, for the description of the run and its newest snapshot.
        port: at which to listen; None chooses one.
    """

    def __init__(
        self, shared_memory_dir: Path, name: str, secret: Path, log: Path, kept: Path, port: int | None = None
    ):
        super().__init__(shared_memory_dir, name, secret, log)
        self._kept = kept
        self._copied: dict[str, int] = {}  # file -> modification time of what was copied, ns
        self._port = port or _free_port()
        kept.mkdir(parents=True, exist_ok=True)

    def tend(self, relay: Path | None, version: int) -> tuple[str, int]:
        """Keeps the root server running, and copies what it saves. Must be called again and again. Blocking: while a
        snapshot is copied.

        Args:
            relay: run folder of a relay on this node that has a run; None if there is none. A run that has no snapshot
                yet begins with the relay's anchor.
            version: the newest that any relay has seen. A run that continues in another place continues above it.

        Returns:
            host and port at which the server listens, or will listen.
        """
        if self._ended():
            if not self._holds_run:
                self._take_up(relay, version)
            if self._process is not None and self._process.returncode > 0:
                self._port = _free_port()  # another process may have taken the old one
            if self._holds_run:
                self._serve("--listen", f"{self.where()[1]}:{self._port}", "--allow_remote")
        self._keep()
        return self.where()[1], self._port

    def _take_up(self, relay: Path | None, version: int) -> None:
        """Takes up the run that was kept, or else a relay's."""
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
        """Copies what is newer here than there, completely or not at all."""
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
