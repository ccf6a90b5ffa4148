"""The server process: one thread, one selector, one `ServerCore`.

Workers join, and once all that the run was started with are there, they are welcomed together; from then on nobody
waits for anybody until the end. A closed connection is a dead worker: it is dropped at once and n shrinks. When every
worker has finished, the anchor is final and all are told. The process ends, and removes the run folder, when the last
connection closes.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from ..checkpoint import load_tensors, save_tensors
from ..transport.mailbox import Channel, Kind, Message, Refusal, RunFolder
from .core import ServerCore, ServerSettings

logger = logging.getLogger(__name__)


class Server:
    """Serves one run.

    Args:
        folder: the run folder, already created; run.json holds settings and fingerprint.
        resume: a server snapshot to continue from, or None.
        join_timeout: seconds until the workers that have joined are told that others never came.

    Process: its own, started by `start_server` or `python -m hf_lsam.server`.
    """

    def __init__(self, folder: RunFolder, resume: Path | None = None, join_timeout: float = 600.0):
        self._folder = folder
        self._expected = int(folder.run["num_workers"])
        self._fingerprint = bytes.fromhex(folder.run["fingerprint"])
        self._core = ServerCore(folder.slot(0).clone(), ServerSettings(**folder.run["settings"]))
        if resume is not None:
            self._core.load_state_tensors(load_tensors(resume))
            folder.publish(self._core.anchor.vector, self._core.anchor.version)
        self._deadline = time.monotonic() + join_timeout
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, Channel] = {}
        self._mailboxes: dict[int, torch.Tensor] = {}
        self._finished: set[int] = set()
        self._joined = False  # whether any worker has; when the last one leaves, the server ends
        self._started = False
        self._ended = False
        self._best_step = -1

    def serve(self) -> None:
        """Runs until the last worker has left."""
        listener = self._folder.listen()
        self._selector.register(listener, selectors.EVENT_READ)
        try:
            while self._workers or not self._joined:
                events = self._selector.select(timeout=None if self._started else 1.0)
                for key, _ in events:
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        self._selector.register(connection, selectors.EVENT_READ, Channel(connection))
                    else:
                        self._read(key.fileobj, key.data)
                if not self._started and time.monotonic() > self._deadline:
                    logger.error("only %d of %d workers joined in time", len(self._workers), self._expected)
                    for worker in self._workers:
                        self._tell(worker, Message(Kind.REFUSED, worker, a=Refusal.TIMEOUT))
                    return
        finally:
            listener.close()
            for channel in self._workers.values():
                channel.close()
            self._selector.close()

    def _read(self, connection, channel: Channel) -> None:
        """Handles every whole frame of one connection."""
        worker = next((number for number, other in self._workers.items() if other is channel), None)
        try:
            while (message := channel.receive()) is not None:
                if worker is None:
                    worker = self._join(message, channel)
                else:
                    self._handle(worker, message)
        except (ConnectionError, ValueError) as reason:
            self._selector.unregister(connection)
            channel.close()
            if worker is not None:
                self._drop(worker, reason)

    def _join(self, message: Message, channel: Channel) -> int:
        if message.kind is not Kind.JOIN:
            raise ValueError("the first message was no JOIN")
        refusal = None
        if message.digest != self._fingerprint or message.a != self._folder.numel:
            refusal = Refusal.FINGERPRINT
        elif message.worker in self._workers or message.worker >= self._expected:
            refusal = Refusal.TAKEN
        if refusal is not None:
            logger.error("refused worker %d: %s", message.worker, refusal.name)
            channel.send(Message(Kind.REFUSED, message.worker, a=refusal))
            raise ValueError("refused")
        self._joined = True
        self._workers[message.worker] = channel
        self._mailboxes[message.worker] = self._folder.mailbox(message.worker)
        self._core.join(message.worker)
        logger.info("worker %d joined (%d of %d)", message.worker, len(self._workers), self._expected)
        if not self._started and len(self._workers) == self._expected:
            self._started = True
            for worker in self._workers:
                self._tell(worker, Message(Kind.WELCOME, worker, a=self._core.anchor.version))
        return message.worker

    def _handle(self, worker: int, message: Message) -> None:
        if message.kind is Kind.PUSH and worker not in self._finished and message.a > 0:
            version = self._core.anchor.version
            accepted = self._core.push(self._mailboxes[worker], message.a, worker, message.loss)
            self._publish_if_newer()
            # The reply comes last: a worker that has read it finds the anchor its push completed.
            self._tell(worker, Message(Kind.ACCEPTED if accepted else Kind.REJECTED, worker, a=version))
            if not accepted:
                logger.warning("refused a push of worker %d: NaN or infinity", worker)
        elif message.kind is Kind.FINISH and worker not in self._finished:
            self._finished.add(worker)
            self._best_step = max(self._best_step, message.b)
            if message.a:
                for other in self._workers.keys() - self._finished:
                    self._tell(other, Message(Kind.STOP, other))
            self._core.leave(worker)
            self._publish_if_newer()
            logger.info("worker %d finished", worker)
            self._end_if_all_finished()
        elif message.kind is Kind.SNAPSHOT:
            try:
                save_tensors(self._folder.path / "snapshot.safetensors", self._core.state_tensors())
                written = True
            except OSError as error:
                logger.error("snapshot not written: %s", error)
                written = False
            self._tell(worker, Message(Kind.SNAPSHOT_DONE, worker, a=int(written)))
        else:
            raise ValueError(f"unexpected {message.kind.name}")

    def _drop(self, worker: int, reason: Exception) -> None:
        del self._workers[worker]
        if worker in self._finished:
            return
        logger.warning("worker %d is gone (%s); %d workers go on", worker, reason, len(self._workers))
        self._core.leave(worker)
        self._publish_if_newer()
        self._end_if_all_finished()

    def _end_if_all_finished(self) -> None:
        if self._ended or self._workers.keys() - self._finished:
            return
        self._ended = True
        self._core.flush()
        self._publish_if_newer()
        for worker in self._workers:
            self._tell(worker, Message(Kind.FINISHED, worker, a=self._core.anchor.version, b=self._best_step))

    def _tell(self, worker: int, message: Message) -> None:
        """Sends to a worker; one that has just died is dropped when its own closed connection is read."""
        try:
            self._workers[worker].send(message)
        except ConnectionError:
            logger.debug("worker %d did not take %s", worker, message.kind.name)

    def _publish_if_newer(self) -> None:
        if self._core.anchor.version > self._folder.version:
            self._folder.publish(self._core.anchor.vector, self._core.anchor.version)


def run_server(run_dir: Path, resume: Path | None = None, join_timeout: float = 600.0) -> None:
    """Serves the run in `run_dir` in this process and removes the folder at the end.

    Workers get Ctrl-C too and close their connections; SIGTERM ends the server as an error would.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    folder = RunFolder(run_dir)
    try:
        Server(folder, resume, join_timeout).serve()
    finally:
        folder.remove()


def start_server(run_dir: Path, log: Path, resume: Path | None = None) -> subprocess.Popen:
    """Starts `python -m hf_lsam.server` for the run in `run_dir`.

    Not multiprocessing: its spawn would import the user's script again.

    Args:
        run_dir: a folder made by `RunFolder.create`.
        log: file that receives the server's log, appended to.
        resume: a server snapshot to continue from, or None.

    Returns:
        the process; it ends by itself when the last worker has left.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hf_lsam.server", "--run_dir", str(run_dir)]
    if resume is not None:
        command += ["--resume", str(resume)]
    # The package may lie where only the user's script finds it.
    paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("a") as stream:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
