"""A worker's part in a run: it joins, with a server process or without, and leaves.

The same for `LSAMTrainer` and for any other training loop.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from .algorithms import ServerSettings, WorkerSettings
from .checkpoint import load_tensors
from .identity import Identity, LaunchStore
from .parameters import ParameterLayout
from .server.core import ServerCore
from .server.lifetime import SIGTERM_CODE, start_server
from .server.local import LocalLink
from .server.machines import MachineSettings, address_file
from .server.process import ServiceSettings
from .transport.link import MailboxLink, RefusedError, ServerGone
from .transport.mailbox import ANY_NUMBER, RunFolder, is_served, make_launch_folder
from .transport.secret import new_secret
from .worker import Worker

logger = logging.getLogger(__name__)

SERVER_RESTARTS = 3
SECRET = "secret"  # in the run folder; whose mode is 0700, and the file's 0600

# Workers of one launch join the same runs in the same order; a second trainer must not find the first one's folder.
_runs_joined = itertools.count()
_gathered = itertools.count()  # likewise: a key that is used again is another one
_agreed = itertools.count()


@dataclass(frozen=True)
class Patience:
    """What a run does about processes that fail.

    Args:
        service: of the server (see `ServiceSettings`).
        server_timeout: seconds that a worker goes on without a server, and a machine without the global one.
        machine_timeout: seconds without a sign of life after which a machine is lost.
    """

    service: ServiceSettings = field(default_factory=ServiceSettings)
    server_timeout: float = 120.0
    machine_timeout: float = 30.0


class EndSignals:
    """Turns the first SIGTERM or Ctrl-C into a request to end at the next step; a second one ends at once.

    Inside `at_once`, where there is no next step, the first one does.

    Process: the main thread; in any other it does nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def catch(self) -> None:
        """From here on signals are requests."""
        self.received = None
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the process as `obey` does."""
        self._at_once = True
        try:
            self.obey()
            yield
        finally:
            self._at_once = False

    def obey(self) -> None:
        """Ends the process, as the signal would have, if one was received."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _note(self, number: int, _) -> None:
        self.obey()
        self.received = number
        if self._at_once:
            self.obey()


class Run:
    """Joins and leaves; may be joined again after it was left.

    Args:
        identity: this process among the workers.
        shared_memory_dir: where vectors are exchanged.
        server_log: file that receives the log of the server process, if this worker starts it.
        server_address: folder of a running server to join as a guest, or None.
        patience: see `Patience`.

    Process: the training thread. Blocking: `join` until all workers are there, `leave` until the server has ended (10 s
    at most), `gather` at worker 0 until all have called it, `agree` elsewhere until worker 0 has.
    """

    def __init__(
        self,
        identity: Identity,
        shared_memory_dir: Path,
        server_log: Path,
        server_address: str | None = None,
        patience: Patience = Patience(),
    ):
        self._identity = identity
        self._shared_memory_dir = shared_memory_dir
        self._server_log = server_log
        self._server_address = server_address
        self._patience = patience
        self._restarts_left = SERVER_RESTARTS
        self._store: LaunchStore | None = None
        self._link: LocalLink | MailboxLink | None = None
        self._folder: RunFolder | None = None
        self._launch: tuple[Path, TextIO] | None = None  # the folder this worker has made, and its lock
        self._server: subprocess.Popen | None = None
        self._server_options: list[str] = []

    def join(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        worker_settings: WorkerSettings,
        server_settings: ServerSettings,
        server_state: Path | None = None,
    ) -> Worker:
        """Takes part with the given parameters. Alone: the server is an object. Else the first worker of each machine
        starts its server process, or the worker is a guest of the server at `server_address`.

        Args:
            named: (name, parameter) pairs; worker 0's values become the first anchor.
            server_state: a server's snapshot to continue from.

        Raises:
            OSError: if there is no room for the exchange.
            RefusedError: if the parameters are not those of worker 0, or a guest's settings those of the run.
            ServerGone: if there is no server.
        """
        layout = ParameterLayout(named)
        tensors = [parameter.detach() for _, parameter in named]
        device = tensors[0].device
        if self._server_address is not None:
            self._link = self._join_as_guest(layout, tensors, server_settings)
        elif self._identity.num_workers == 1:
            core = ServerCore(layout.read(tensors, _vector(layout.numel, device)), server_settings)
            if server_state is not None:
                core.load_state_tensors(load_tensors(server_state))
            self._link = LocalLink(core)
        else:
            number = next(_runs_joined)
            key = f"run_dir/{number}/{self._identity.machine}"
            if self._identity.local_rank == 0:
                contents = self._contents(layout, server_settings)
                self._open_folder(layout, tensors, contents, number, server_state)
                self._launch_store().set(key, str(self._folder.path))
            else:
                self._folder = RunFolder(Path(self._launch_store().get(key)))
            self._link = MailboxLink(
                self._folder,
                self._identity.local_rank,
                layout,
                device,
                self._server_may_come,
                server_timeout=self._patience.server_timeout,
                revive=self._revive_server,
            )
        return Worker(named, self._link, worker_settings)

    def _open_folder(
        self, layout: ParameterLayout, tensors: list[Tensor], contents: dict[str, Any], number: int, state: Path | None
    ) -> None:
        """Makes this machine's run folder and starts its server: the global one on machine 0, relays on the others."""
        path, _ = self._launch = make_launch_folder(self._shared_memory_dir)
        here, key = self._identity, f"machines/{number}"
        meeting = None
        if here.num_machines > 1:
            run_id = secrets.token_hex(8)
            if here.machine > 0:
                meeting = self._launch_store().get(key)
                run_id = meeting["run_id"]
            patience = self._patience
            across = MachineSettings(
                here.num_machines, here.machine, run_id, patience.machine_timeout, patience.server_timeout
            )
            contents = {**contents, "machines": across.as_dict()}
        workers = here.local_workers
        self._folder = RunFolder.create(path, _initial(layout, tensors), workers, layout.manifest, contents)
        self._restarts_left = SERVER_RESTARTS
        self._server_options = []
        if here.num_machines > 1:
            self._server_options = self._options_across(path, meeting)
        self._server = start_server(path, self._server_log, state if here.machine == 0 else None, self._server_options)
        if here.num_machines > 1 and here.machine == 0:
            host, port = self._await_address(path)
            self._server_options[1] = f"{host}:{port}"  # one that is started again listens where it is looked for
            secret = (path / SECRET).read_text()
            self._launch_store().set(key, {"address": [host, port], "run_id": run_id, "secret": secret})

    def _options_across(self, path: Path, meeting: dict[str, Any] | None) -> list[str]:
        """What tells the server of this machine its place among them. The secret goes into a file only."""
        if meeting is None:
            new_secret(path / SECRET)
            where = ["--listen", f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:0", "--allow_remote"]
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
                    f"The server of the launch ended at its start; see {self._server_log}. Does MASTER_ADDR "
                    "(--main_process_ip) name an address of machine 0?"
                )
            time.sleep(0.02)
        return tuple(json.loads(address_file(path).read_text()))

    def _join_as_guest(self, layout: ParameterLayout, tensors: list[Tensor], settings: ServerSettings) -> MailboxLink:
        path = Path(self._server_address)
        contents = self._contents(layout, settings)
        give_up = time.monotonic() + self._patience.server_timeout
        if not is_served(path):
            logger.info("waiting for a server in server_address=%s", path)
        while not is_served(path) and not (path / "run.json").exists():  # it may be about to start
            if time.monotonic() > give_up:
                raise ServerGone(
                    f"No server runs in server_address={path}, and none was started there within "
                    f"{self._patience.server_timeout:g} s. Start one: python -m hf_lsam.server --run_dir {path}"
                )
            time.sleep(0.05)
        while True:  # its server may have died a moment ago, and be started again
            try:
                folder = RunFolder.found_or_open(path, _initial(layout, tensors), layout.manifest, contents)
                break
            except FileNotFoundError as error:
                if time.monotonic() > give_up:
                    raise ServerGone(f"The server of {path} has ended. Start it again with --resume.") from error
                time.sleep(0.05)
        for name, here in contents["settings"].items():
            there = folder.run["settings"][name]
            if here != there:
                raise RefusedError(
                    f"{name} is {here!r} here and {there!r} in the run in {path}: one server cannot follow both. Give "
                    "every worker of a run the same settings."
                )
        seconds = self._patience.server_timeout
        return MailboxLink(folder, ANY_NUMBER, layout, tensors[0].device, timeout=seconds, server_timeout=seconds)

    def _contents(self, layout: ParameterLayout, settings: ServerSettings) -> dict[str, Any]:
        return {
            "fingerprint": layout.fingerprint.hex(),
            "settings": settings.as_dict(),
            "service": self._patience.service.as_dict(),
        }

    def leave(self, failed: bool = False) -> None:
        """Closes this worker's end; worker 0 sees the server off.

        Args:
            failed: with an error. The other workers of the launch end with one as well.
        """
        # The server goes on until the final anchor has reached the other machines.
        others_wait = self._identity.num_machines > 1 and isinstance(self._link, MailboxLink) and self._link.finished
        if self._link is not None:
            self._link.close(failed)
            self._link = None
        if self._server is not None:
            try:
                self._server.wait(timeout=self._patience.server_timeout if others_wait else 10)
            except subprocess.TimeoutExpired:  # it has not heard of the error that this worker ends with
                self._server.terminate()
                self._server.wait()
            self._server = None
        if self._launch is not None:
            path, lock = self._launch
            shutil.rmtree(path, ignore_errors=True)
            lock.close()
            self._launch = None
        self._folder = None

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Collects a JSON value of each worker at worker 0, in the order of ranks; None at the others.

        All workers must call it as often, and in the same order.
        """
        if self._identity.num_workers == 1:
            return [value]
        return self._launch_store().gather(f"user/{next(_gathered)}/{key}", value)

    def agree(self, key: str, value: Any) -> Any:
        """Worker 0's JSON value, for every worker.

        All workers must call it as often, and in the same order; the others wait for worker 0.
        """
        if self._identity.num_workers == 1:
            return value
        key = f"agreed/{next(_agreed)}/{key}"
        if self._identity.rank == 0:
            self._launch_store().set(key, value)
        return self._launch_store().get(key)

    def _launch_store(self) -> LaunchStore:
        if self._store is None:
            self._store = LaunchStore(self._identity)
        return self._store

    def _server_may_come(self) -> bool:
        return self._server is None or self._server.poll() is None

    def _revive_server(self) -> None:
        """Worker 0 starts the server anew if it has died; one that was told to end stays away."""
        if self._server is None or self._server.poll() in (None, 0, SIGTERM_CODE) or not self._restarts_left:
            return
        self._restarts_left -= 1
        logger.warning("the server process ended with code %d: it is started again", self._server.returncode)
        self._server = start_server(self._folder.path, self._server_log, True, self._server_options)


def _initial(layout: ParameterLayout, tensors: list[Tensor]) -> Tensor:
    return layout.read([tensor.cpu() for tensor in tensors], _vector(layout.numel, torch.device("cpu")))


def _vector(numel: int, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=device)
