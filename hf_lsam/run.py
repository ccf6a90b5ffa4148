"""A worker's part in a run: it joins, with a server process or without, and leaves.

The same for `LSAMTrainer` and for any other training loop.
"""

from __future__ import annotations

import itertools
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_tensors
from .identity import Identity, LaunchStore
from .parameters import ParameterLayout
from .server.core import ServerCore, ServerSettings
from .server.local import LocalLink
from .server.process import start_server
from .transport.link import MailboxLink
from .transport.mailbox import RunFolder
from .worker import Worker, WorkerSettings

# Workers of one launch join the same runs in the same order; a second trainer must not find the first one's folder.
_runs_joined = itertools.count()
_gathered = itertools.count()  # likewise: a key that is used again is another one


class Run:
    """Joins and leaves; may be joined again after it was left.

    Args:
        identity: this process among the workers.
        shared_memory_dir: where vectors are exchanged.
        server_log: file that receives the log of the server process, if this worker starts it.

    Process: the training thread. Blocking: `join` until all workers are there, `leave` until the server has ended (10 s
    at most), `gather` at worker 0 until all have called it.
    """

    def __init__(self, identity: Identity, shared_memory_dir: Path, server_log: Path):
        self._identity = identity
        self._shared_memory_dir = shared_memory_dir
        self._server_log = server_log
        self._store: LaunchStore | None = None
        self._link: LocalLink | MailboxLink | None = None
        self._folder: RunFolder | None = None
        self._server: subprocess.Popen | None = None

    def join(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        worker_settings: WorkerSettings,
        server_settings: ServerSettings,
        server_state: Path | None = None,
    ) -> Worker:
        """Takes part with the given parameters. Alone: the server is an object. Else worker 0 starts the process.

        Args:
            named: (name, parameter) pairs; worker 0's values become the first anchor.
            server_state: a server's snapshot to continue from.

        Raises:
            OSError: if there is no room for the exchange.
            RefusedError: if the parameters are not those of worker 0.
            ServerGone: if there is no server.
        """
        layout = ParameterLayout(named)
        tensors = [parameter.detach() for _, parameter in named]
        if self._identity.num_workers == 1:
            core = ServerCore(layout.read(tensors, _vector(layout.numel, tensors[0].device)), server_settings)
            if server_state is not None:
                core.load_state_tensors(load_tensors(server_state))
            self._link = LocalLink(core)
        else:
            key = f"run_dir/{next(_runs_joined)}"
            if self._identity.rank == 0:
                path = Path(tempfile.mkdtemp(prefix="hf_lsam-", dir=self._shared_memory_dir))
                initial = layout.read([tensor.cpu() for tensor in tensors], _vector(layout.numel, torch.device("cpu")))
                contents = {"fingerprint": layout.fingerprint.hex(), "settings": server_settings.as_dict()}
                self._folder = RunFolder.create(path, initial, self._identity.num_workers, layout.manifest, contents)
                self._server = start_server(path, self._server_log, server_state)
                self._launch_store().set(key, str(path))
            else:
                self._folder = RunFolder(Path(self._launch_store().get(key)))
            device = tensors[0].device
            self._link = MailboxLink(self._folder, self._identity.rank, layout, device, self._server_may_come)
        return Worker(named, self._link, worker_settings)

    def leave(self) -> None:
        """Closes this worker's end, also after an error; worker 0 sees the server off."""
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._server is not None:
            try:
                self._server.wait(timeout=10)
            except subprocess.TimeoutExpired:  # others still train, while this one ends with an error
                self._server.terminate()
                self._server.wait()
            self._server = None
            self._folder.remove()
        self._folder = None

    def gather(self, key: str, value: Any) -> list[Any] | None:
        """Collects a JSON value of each worker at worker 0, in the order of ranks; None at the others.

        All workers must call it as often, and in the same order.
        """
        if self._identity.num_workers == 1:
            return [value]
        return self._launch_store().gather(f"user/{next(_gathered)}/{key}", value)

    def _launch_store(self) -> LaunchStore:
        if self._store is None:
            self._store = LaunchStore(self._identity)
        return self._store

    def _server_may_come(self) -> bool:
        return self._server is None or self._server.poll() is None


def _vector(numel: int, device: torch.device) -> Tensor:
    return torch.empty(numel, dtype=torch.float32, device=device)
