"""A worker's end of the exchange with the server process of its machine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load_tensors, save_tensors
from ..parameters import ParameterLayout, first_difference
from .copier import Copier
from .mailbox import Channel, Kind, Message, Refusal, RunFolder

logger = logging.getLogger(__name__)


class ServerGone(RuntimeError):
    """The server process ended while a worker still needed it."""


class RefusedError(ValueError):
    """The server does not take this worker."""


class MailboxLink:
    """Pushes sums and pulls anchors through a run folder.

    A push goes through three hands: `push` starts the copy into the mailbox, the next `poll` after its end sends the
    frame, and the poll that reads the server's reply makes the mailbox the worker's again. A pull likewise: one poll
    starts the copy out of the shared slot, a later one checks that the server has not begun to write over it.

    Args:
        folder: the run folder.
        worker: this worker's number.
        layout: of this worker's trainable parameters; must be that of worker 0.
        device: where the worker's vectors live.
        server_alive: whether the server process runs, as far as this worker can know.
        timeout: seconds to wait for the server and for the other workers to join.

    Raises:
        RefusedError: if the server refuses this worker.
        ServerGone: if the server is not there.

    Process: a worker's training thread. Blocking: construction, `finish`, `snapshot` and `settle` only.
    """

    def __init__(
        self,
        folder: RunFolder,
        worker: int,
        layout: ParameterLayout,
        device: torch.device,
        server_alive: Callable[[], bool] = lambda: True,
        timeout: float = 600.0,
    ):
        self._folder = folder
        self._worker = worker
        self._layout = layout
        self._mailbox = folder.mailbox(worker)
        self._outgoing = Copier(device, [self._mailbox])
        self._incoming = Copier(device, [folder.slot(0), folder.slot(1)])
        self._push_frame: Message | None = None  # copied or being copied, not yet sent
        self._awaiting_reply = False
        self._pulling: int | None = None  # version whose copy is under way
        self._pushed_version = 0
        self._notices: dict[Kind, Message] = {}
        self.stop_requested = False
        self.staleness: list[int] = []  # of each accepted push since it was last taken
        self.accepted = 0
        self.refused = 0
        self.bytes_pushed = 0
        self.bytes_pulled = 0
        try:
            self._channel: Channel = folder.connect(server_alive, timeout)
        except OSError as error:
            raise ServerGone(
                f"Worker {worker} found no server: {error}. Look into server.log in output_dir."
            ) from error
        try:
            self._send(Message(Kind.JOIN, worker, a=layout.numel, digest=layout.fingerprint))
            self._wait_for(Kind.WELCOME, timeout)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """The newest anchor version the server has published."""
        return self._folder.version

    @property
    def can_push(self) -> bool:
        """Whether the mailbox is this worker's to write."""
        return self._push_frame is None and not self._awaiting_reply

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        """Starts to hand `total` [d], of `steps` steps of mean `loss` around anchor `version`, to the server.

        `total` must stay as it is until `can_push` again; on CPU it may be reused at once.
        """
        self._outgoing.start(self._mailbox, total)
        self._push_frame = Message(Kind.PUSH, self._worker, a=steps, b=version, loss=loss)
        self._pushed_version = version
        self.bytes_pushed += total.nbytes

    def poll(self, held: int, incoming: Tensor) -> int | None:
        """Does whatever can be done without waiting.

        Args:
            held: the anchor version the worker holds.
            incoming: float32 [d] on the worker's device: a newer anchor is copied into it. Half-written between two
                polls on an accelerator, never on CPU.

        Returns:
            the version now whole in `incoming`, or None if there is none yet.

        Raises:
            ServerGone: if the server ended.
        """
        if self._push_frame is not None and self._outgoing.finished():
            self._send(self._push_frame)
            self._push_frame, self._awaiting_reply = None, True
        while (message := self._receive(0.0)) is not None:
            self._handle(message)
        if self._pulling is None and self.version != held:
            self._start_pull(incoming)
        while self._pulling is not None and self._incoming.finished():
            if self._folder.is_whole(self._pulling):
                version, self._pulling = self._pulling, None
                return version
            self._start_pull(incoming)  # the server has begun to write over that slot; a newer version is there
        return None

    def settle(self) -> None:
        """Blocks until the push under way, if any, has been answered."""
        self._outgoing.wait()
        if self._push_frame is not None:
            self._send(self._push_frame)
            self._push_frame, self._awaiting_reply = None, True
        while self._awaiting_reply:
            self._handle(self._receive(None))

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> tuple[int, int]:
        """Reports that this worker has done its steps, and waits until all have.

        Args:
            stop_all: ask the other workers to stop as well (early stopping).
            best_step: the step of the best checkpoint, where this worker knows one, else -1.
            incoming: float32 [d]; receives the final anchor.

        Returns:
            (final anchor version, best step or -1).
        """
        self._send(Message(Kind.FINISH, self._worker, a=int(stop_all), b=best_step))
        final = self._wait_for(Kind.FINISHED, None)
        self._start_pull(incoming)  # nothing is published after the final anchor, so the copy is whole
        self._incoming.wait()
        version, self._pulling = self._pulling, None
        return version, final.b

    def snapshot(self, path: Path) -> None:
        """Has the server write its state and puts the file at `path`.

        Raises:
            OSError: if the server could not write it.
        """
        self._send(Message(Kind.SNAPSHOT, self._worker))
        if not self._wait_for(Kind.SNAPSHOT_DONE, None).a:
            raise OSError(
                f"The server could not write its snapshot into {self._folder.path} (no room?); see server.log. The "
                "training state is unharmed, this checkpoint lacks the server's part."
            )
        save_tensors(path, load_tensors(self._folder.path / "snapshot.safetensors"))

    def close(self) -> None:
        """Leaves; the server takes the closed connection for the worker's end."""
        self._outgoing.close()
        self._incoming.close()
        if hasattr(self, "_channel"):
            self._channel.close()

    def _start_pull(self, incoming: Tensor) -> None:
        self._pulling = self.version
        self._incoming.start(incoming, self._folder.slot(self._pulling))
        self.bytes_pulled += incoming.nbytes

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except ConnectionError as error:
            raise self._gone() from error

    def _receive(self, timeout: float | None) -> Message | None:
        try:
            return self._channel.wait(timeout)
        except ConnectionError as error:
            raise self._gone() from error

    def _wait_for(self, kind: Kind, timeout: float | None) -> Message:
        """Handles messages until one of `kind` is there."""
        waited = 0.0
        while kind not in self._notices:
            message = self._receive(30.0)
            if message is not None:
                self._handle(message)
                continue
            waited += 30.0
            logger.info("worker %d: waiting for the other workers (%s), %d s so far", self._worker, kind.name, waited)
            if timeout is not None and waited >= timeout:
                raise ServerGone(f"The server did not answer within {timeout:.0f} s ({kind.name}).")
        return self._notices.pop(kind)

    def _handle(self, message: Message) -> None:
        if message.kind is Kind.ACCEPTED:
            self._awaiting_reply = False
            self.accepted += 1
            self.staleness.append(message.a - self._pushed_version)
        elif message.kind is Kind.REJECTED:
            self._awaiting_reply = False
            self.refused += 1
        elif message.kind is Kind.STOP:
            self.stop_requested = True
        elif message.kind is Kind.REFUSED:
            raise RefusedError(self._refusal(Refusal(message.a)))
        else:
            self._notices[message.kind] = message

    def _refusal(self, reason: Refusal) -> str:
        if reason is Refusal.TAKEN:
            return f"Another process already takes part as worker {self._worker}. Give every worker a rank of its own."
        if reason is Refusal.TIMEOUT:
            return (
                f"Fewer than {self._folder.run['num_workers']} workers joined in time. Look for the error that ended "
                "the missing one; the run cannot start without it."
            )
        return (
            f"Worker {self._worker}'s trainable parameters are not worker 0's: "
            f"{first_difference(self._layout.manifest, self._folder.manifest)}. Their sums cannot share an anchor. "
            "Build the same model with the same frozen parameters in every process."
        )

    def _gone(self) -> ServerGone:
        return ServerGone(
            f"The server process ended while worker {self._worker} was training; the anchor can no longer move. Look "
            "into server.log in output_dir for the reason, and resume from the last checkpoint."
        )
