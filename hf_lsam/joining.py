"""The ways to join a run: alone, as part of a launch, or by the address of a server that others have started.

Each is a `Transport` (see `transport.base`). A new kind of address takes one line in `TRANSPORTS`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from .checkpoint import load_tensors
from .identity import Identity, LaunchStore
from .server.core import ServerCore
from .server.lifetime import SIGTERM_CODE, start_server
from .server.machines import MachineSettings, address_file
from .server.service import ServiceSettings
from .transport.base import JoinRequest, RefusedError, ServerGone, Transport
from .transport.in_process import InProcessLink
from .transport.mailbox import RunFolder
from .transport.messages import ANY_NUMBER
from .transport.ownership import is_served, make_launch_folder
from .transport.secret import new_secret
from .transport.shared_memory import SharedMemoryLink

logger = logging.getLogger(__name__)

SERVER_RESTARTS = 3
UNDER_WAY = 1 << 20  # bytes within `server_timeout` that are more than heartbeats: a vector crosses
CPU = torch.device("cpu")
SECRET = "secret"  # file in the run folder; the folder's mode is 0700, the file's 0600

# Workers of one launch join the same runs in the same order. A second trainer must not find the first one's folder.
_runs_joined = itertools.count()


@dataclass(frozen=True)
class Timeouts:
    """How long a run waits for processes that do not answer.

    Args:
        service: the server's own timeouts (see `ServiceSettings`).
        server_timeout: seconds for which a worker continues without a server, and a machine without the root server.
        machine_timeout: seconds without a heartbeat after which a machine is considered lost.
    """

    service: ServiceSettings = field(default_factory=ServiceSettings)
    server_timeout: float = 120.0
    machine_timeout: float = 30.0


class Alone(Transport):
    """One worker without a server process: nothing to start, nothing to wait for."""

    def join(self, request: JoinRequest) -> InProcessLink:
        core = ServerCore(request.first_anchor(request.device), request.settings)
        if request.server_state is not None:
            core.load_state_tensors(load_tensors(request.server_state))
        return InProcessLink(core, alone=True)

    def leave(self, finished: bool) -> None:
        pass


class Launch(Transport):
    """The workers that one launcher has started: the first on each machine starts its server, and waits for its end.

    Args:
        identity: this process among the workers.
        store: the store of the launch.
        shared_memory_dir: the folder in which vectors are exchanged.
        server_log: file that receives the log of the server process, if this worker starts it.
        timeouts: see `Timeouts`.
        server_port: port on which the first machine's server listens for those of the others; 0 lets the system choose.

    Blocking: `join` until all workers of the launch have joined; `leave` until the server has ended: at most 10 s, or,
    with other machines, until the final anchor has reached them, or nothing has crossed for `server_timeout`.
    """

    def __init__(
        self,
        identity: Identity,
        store: LaunchStore,
        shared_memory_dir: Path,
        server_log: Path,
        timeouts: Timeouts,
        server_port: int = 0,
    ):
        self._identity = identity
        self._store = store
        self._shared_memory_dir = shared_memory_dir
        self._server_log = server_log
        self._timeouts = timeouts
        self._server_port = server_port
        self._restarts_left = SERVER_RESTARTS
        self._reviving = threading.Lock()
        self.folder: RunFolder | None = None
        self._made: tuple[Path, TextIO] | None = None  # the folder, if this worker has made it, and its lock
        self._server: subprocess.Popen[bytes] | None = None
        self._server_options: list[str] = []

    def join(self, request: JoinRequest) -> SharedMemoryLink:
        number = next(_runs_joined)
        key = f"run_dir/{number}/{self._identity.machine}"
        if self._identity.local_rank == 0:
            folder = self._open_folder(request, number)
            if self._identity.local_workers > 1:
                self._store.set(key, str(folder.path))
        else:
            folder = RunFolder(Path(self._store.get(key)))
        self.folder = folder
        return SharedMemoryLink(
            folder,
            self._identity.local_rank,
            request.layout,
            request.device,
            self._server_may_come,
            server_timeout=self._timeouts.server_timeout,
            revive=self._revive_server,
            weight=request.weight,
        )

    def leave(self, finished: bool) -> None:
        if self._server is not None:
            # The server keeps running until the final anchor has reached the other machines.
            others_wait = self._identity.num_machines > 1 and finished
            assert self.folder is not None
            moved = self.folder.bytes_between_machines
            while not self._server_ends_within(self._timeouts.server_timeout if others_wait else 10):
                before, moved = moved, self.folder.bytes_between_machines
                if not others_wait or moved - before < UNDER_WAY:  # nothing crosses, or it knows of no error and waits
                    self._server.terminate()
                    self._server.wait()
            self._server = None
        if self._made is not None:
            path, lock = self._made
            shutil.rmtree(path, ignore_errors=True)
            lock.close()
            self._made = None
        self.folder = None

    def _server_ends_within(self, seconds: float) -> bool:
        assert self._server is not None
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(seconds)
        return self._server.returncode is not None

    def _open_folder(self, request: JoinRequest, number: int) -> RunFolder:
        """Makes this machine's run folder and starts its server: the root server on machine 0, else a relay."""
        here, key = self._identity, f"machines/{number}"
        contents = _contents(request, self._timeouts)
        meeting = None
        if here.num_machines > 1:
            run_id = secrets.token_hex(8)
            if here.machine > 0:
                meeting = self._store.get(key)
                run_id = meeting["run_id"]
            timeouts = self._timeouts
            across = MachineSettings(
                here.num_machines, here.machine, run_id, timeouts.machine_timeout, timeouts.server_timeout
            )
            contents = {**contents, "machines": across.as_dict()}
        path, _ = self._made = make_launch_folder(self._shared_memory_dir)
        first = request.first_anchor(CPU)
        folder = RunFolder.create(path, first, here.local_workers, request.layout.manifest, contents)
        self._restarts_left = SERVER_RESTARTS
        self._server_options = []
        if here.num_machines > 1:
            self._server_options = self._options_across(path, meeting)
        state = request.server_state if here.machine == 0 else None
        self._server = start_server(path, self._server_log, state, self._server_options)
        if here.num_machines > 1 and here.machine == 0:
            host, port = self._await_address(path)
            self._server_options[1] = f"{host}:{port}"  # a restarted server must listen where the relays look for it
            secret = (path / SECRET).read_text()
            self._store.set(key, {"address": [host, port], "run_id": run_id, "secret": secret})
        return folder

    def _options_across(self, path: Path, meeting: dict[str, Any] | None) -> list[str]:
        """Options that tell this machine's server its place among them. The secret is only written to a file."""
        if meeting is None:
            new_secret(path / SECRET)
            host = os.environ.get("MASTER_ADDR", "127.0.0.1")
            where = ["--listen", f"{host}:{self._server_port}", "--allow_remote"]
        else:
            (path / SECRET).touch(0o600, exist_ok=False)
            (path / SECRET).write_text(meeting["secret"])
            host, port = meeting["address"]
            where = ["--connect", f"{host}:{port}"]
        return [*where, "--secret_file", str(path / SECRET)]

    def _await_address(self, path: Path) -> tuple[str, int]:
        while not address_file(path).exists():
            if not self._server_may_come():
                raise ServerGone(
                    f"The server ended right after its start; see {self._server_log}. Does MASTER_ADDR "
                    "(--main_process_ip) name an address of machine 0, and is server_port free there?"
                )
            time.sleep(0.02)
        return tuple(json.loads(address_file(path).read_text()))

    def _server_may_come(self) -> bool:
        return self._server is None or self._server.poll() is None

    def _revive_server(self) -> None:
        """The worker that started the server restarts it if it has died, but not if it was told to end."""
        with self._reviving:
            if self._made is None or self._server is None or not self._restarts_left:
                return
            if self._server.poll() in (None, 0, SIGTERM_CODE):
                return
            self._restarts_left -= 1
            logger.warning("the server process ended with code %d and is started again", self._server.returncode)
            self._server = start_server(self._made[0], self._server_log, True, self._server_options)


class ServedFolder(Transport):
    """A run that workers join and leave as they like; its address is the run folder of a server on this machine.

    Args:
        address: the folder.
        timeouts: see `Timeouts`.

    Blocking: `join` until there is a server, at most `server_timeout`.
    """

    def __init__(self, address: str, timeouts: Timeouts):
        self._path = Path(address)
        self._timeouts = timeouts

    def join(self, request: JoinRequest) -> SharedMemoryLink:
        path, seconds = self._path, self._timeouts.server_timeout
        contents = _contents(request, self._timeouts)
        give_up = time.monotonic() + seconds
        if not is_served(path):
            logger.info("waiting for a server in server_address=%s", path)
        while not is_served(path) and not (path / "run.json").exists():  # it may be about to start
            if time.monotonic() > give_up:
                raise ServerGone(
                    f"No server runs in server_address={path}, and none was started there within {seconds:g} s. "
                    f"Start one: python -m hf_lsam.server --run_dir {path}"
                )
            time.sleep(0.05)
        while True:  # its server may have died just now, and be started again
            try:
                first = request.first_anchor(CPU)
                folder = RunFolder.create_or_open(path, first, request.layout.manifest, contents)
                break
            except FileNotFoundError as error:
                if time.monotonic() > give_up:
                    raise ServerGone(f"The server of {path} has ended. Start it again with --resume.") from error
                time.sleep(0.05)
        for name, here in contents["settings"].items():
            there = folder.run["settings"].get(name)  # None if an older hf-lsam has made the folder
            if here != there:
                raise RefusedError(
                    f"{name} is {here!r} here and {there!r} in the run in {path}. Give every worker of a run the "
                    "same settings."
                )
        return SharedMemoryLink(
            folder,
            ANY_NUMBER,
            request.layout,
            request.device,
            timeout=seconds,
            server_timeout=seconds,
            weight=request.weight,
        )

    def leave(self, finished: bool) -> None:
        pass


# The transports that join by `server_address="scheme://rest"`; called with "rest" and the timeouts. An address without
# a scheme is a "file".
TRANSPORTS: dict[str, Callable[[str, Timeouts], Transport]] = {
    "file": ServedFolder,
}


def transport_of(address: str, timeouts: Timeouts) -> Transport:
    """The transport that joins a run by its address.

    Raises:
        ValueError: if no transport has this scheme.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        scheme, rest = "file", address
    if scheme not in TRANSPORTS:
        raise ValueError(
            f"`server_address` is {address!r}, and there is no transport for {scheme}://. Use the folder of a "
            f"running server, or one of {', '.join(f'{known}://' for known in TRANSPORTS)}."
        )
    return TRANSPORTS[scheme](rest, timeouts)


def _contents(request: JoinRequest, timeouts: Timeouts) -> dict[str, Any]:
    """The contents of run.json for a run that this worker creates."""
    machines = MachineSettings(silence=timeouts.machine_timeout, server_timeout=timeouts.server_timeout)
    return {
        "fingerprint": request.layout.fingerprint.hex(),
        "settings": request.settings.as_dict(),
        "service": timeouts.service.as_dict(),
        "machines": machines.as_dict(),
    }
