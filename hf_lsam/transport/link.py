"""A worker's end of the exchange with the server process of its machine."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load_tensors, save_tensors
from ..parameters import ParameterLayout, first_difference
from .copier import Copier
from .mailbox import ANY_NUMBER, ELSEWHERE, Channel, Kind, Message, Refusal, RunFolder

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2  # between two attempts to find the server again
PING_SECONDS = 1.0  # or less, where the server is less patient


class ServerGone(RuntimeError):
    """The server process ended while a worker still needed it: none took its place, or the whole launch ends."""


class RefusedError(ValueError):
    """The server does not take this worker."""


class MailboxLink:
    """Pushes sums and pulls anchors through a run folder.

    A push goes through three hands: `push` starts the copy into the mailbox, the next `poll` after its end sends the
    frame, and the poll that reads the server's reply makes the mailbox the worker's again. A pull likewise: one poll
    starts the copy out of the shared slot, a later one checks that the server has not begun to write over it.

    A closed connection is no error. The worker goes on, coupled to the anchor it has; its sum grows, and each poll
    looks, without waiting, whether a server listens again. The one that does says which push of this process it
    counted last, so a push that was under way is handed in again if it was not counted, and only then.

    A thread tells the server that the process lives, whatever the training thread does: evaluates, saves, compiles. One
    that was stopped for so long that the run has ended without it finds the final anchor still in its memory.

    Args:
        folder: the run folder.
        worker: this worker's number, or `ANY_NUMBER` to be given one.
        layout: of this worker's trainable parameters; must be that of worker 0.
        device: where the worker's vectors live.
        server_alive: whether the server process runs, as far as this worker can know.
        timeout: seconds to wait for the server and for the other workers to join.
        server_timeout: seconds that the worker goes on without a server.
        revive: called before each attempt to find the server again; its owner starts it anew.

    Raises:
        RefusedError: if the server refuses this worker.
        ServerGone: if the server is not there.

    Process: a worker's training thread, and the one that pings. Blocking: construction, `finish`, `snapshot` and
    `settle` only.
    """

    def __init__(
        self,
        folder: RunFolder,
        worker: int,
        layout: ParameterLayout,
        device: torch.device,
        server_alive: Callable[[], bool] = lambda: True,
        timeout: float = 600.0,
        server_timeout: float = 120.0,
        revive: Callable[[], None] = lambda: None,
    ):
        self._folder = folder
        self.worker = worker
        self._layout = layout
        self._device = device
        self._server_timeout = server_timeout
        self._revive = revive
        self._left = threading.Event()
        self._pings: threading.Thread | None = None
        self._process = secrets.randbits(63)  # by which a server knows again whose pushes it has counted
        self._pushes = 0
        self._push_frame: Message | None = None  # of the push that has no answer yet
        self._push_sent = False
        self._pushed_version = 0
        self._mailbox: Tensor | None = None
        self._outgoing = Copier(device, [])
        self._incoming = Copier(device, [folder.slot(0), folder.slot(1)])
        self._pulling: int | None = None  # version whose copy is under way
        self._channel: Channel | None = None
        self._welcomed = False
        self._away_since = time.monotonic()
        self._next_attempt = 0.0
        self._evicted_at: int | None = None  # the newest anchor version then
        self._notices: dict[Kind, Message] = {}
        self._gone: ServerGone | None = None  # what the server has ended with, until a call that may raise it
        self.evicted = False
        self.stop_requested = False
        self.save_requested = False
        self.finished = False
        self.counted_at: int | None = -1  # nothing was handed in that an anchor might not count
        self.staleness: list[int] = []  # of each accepted push since it was last taken
        self.accepted = 0
        self.refused = 0
        self.refused_in_a_row = 0
        self.bytes_pushed = 0
        self.bytes_pulled = 0
        try:
            self._join_first(server_alive, timeout)
        except OSError as error:
            self.close()
            raise ServerGone(
                f"Worker {worker} found no server: {error}. Look into server.log in output_dir."
            ) from error
        except BaseException:
            self.close()
            raise
        self._pings = threading.Thread(target=self._ping, name="hf_lsam-ping", daemon=True)
        self._pings.start()

    @property
    def version(self) -> int:
        """The newest anchor version the server has published."""
        return self._folder.version

    @property
    def away(self) -> bool:
        """Whether the worker is alone at the moment, without a server."""
        return not self._welcomed

    @property
    def can_push(self) -> bool:
        """Whether there is a server, and the mailbox is this worker's to write."""
        return self._push_frame is None and self._welcomed and self._evicted_at is None

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        """Starts to hand `total` [d], of `steps` steps of mean `loss` around anchor `version`, to the server.

        `total` must stay as it is until `can_push` again; on CPU it may be reused at once.
        """
        self._outgoing.start(self._mailbox, total)
        self._announce(steps, version, loss)
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
            ServerGone: if there has been no server for `server_timeout`.
        """
        self._progress(0.0)
        self._raise_if_gone()
        if self._pulling is None and self.version != held:
            self._start_pull(incoming)
        version = None
        while self._pulling is not None and self._incoming.finished():
            if self._folder.is_whole(self._pulling):
                version, self._pulling = self._pulling, None
                break
            self._start_pull(incoming)  # the server has begun to write over that slot; a newer version is there
        if self._evicted_at is not None and (held if version is None else version) >= self._evicted_at:
            self._evicted_at, self.evicted = None, True
        return version

    def settle(self) -> None:
        """Blocks until there is a server and the push under way, if any, has been answered; or the run has ended."""
        self._outgoing.wait()
        while Kind.FINISHED not in self._notices and (self._push_frame is not None or not self._welcomed):
            self._progress(1.0)
            self._raise_if_gone()

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> tuple[int, int]:
        """Reports that this worker has done its steps, and waits until all have (a guest for nobody).

        Args:
            stop_all: ask the other workers to stop as well (early stopping).
            best_step: the step of the best checkpoint, where this worker knows one, else -1.
            incoming: float32 [d]; receives the final anchor.

        Returns:
            (final anchor version, best step or -1).

        Raises:
            ServerGone: if there has been no server for `server_timeout`.
        """
        frame = Message(Kind.FINISH, self.worker, a=int(stop_all), b=best_step)
        asked, waited_from = None, time.monotonic()
        while Kind.FINISHED not in self._notices:
            if self._welcomed and asked is not self._channel and self._send(frame):
                asked = self._channel  # a server that comes in its place is asked again
            self._progress(1.0)
            self._raise_if_gone()
            if time.monotonic() - waited_from > 30:
                waited_from += 30
                logger.info("worker %d: waiting for the other workers to finish", self.worker)
        final = self._notices.pop(Kind.FINISHED)
        self._start_pull(incoming)
        self._incoming.wait()
        while not self._folder.is_whole(self._pulling):
            self._start_pull(incoming)
            self._incoming.wait()
        version, self._pulling = self._pulling, None
        self.finished = True
        return version, final.b

    def snapshot(self, path: Path) -> bool:
        """Has the server write its state and puts the file at `path`; False if there is no server to do it.

        A server that says meanwhile that it ends still answers: the checkpoint is saved, and the next `poll` raises.

        Raises:
            OSError: if the server could not write it.
        """
        self._notices.pop(Kind.SNAPSHOT_DONE, None)
        channel = self._channel
        if not self._welcomed or not self._send(Message(Kind.SNAPSHOT, self.worker)):
            return False
        while Kind.SNAPSHOT_DONE not in self._notices:
            if self._channel is not channel:
                return False
            self._progress(1.0)
        if not self._notices.pop(Kind.SNAPSHOT_DONE).a:
            raise OSError(
                f"The server could not write its snapshot into {self._folder.path} (no room?); see server.log. The "
                "training state is unharmed, this checkpoint lacks the server's part."
            )
        save_tensors(path, load_tensors(self._folder.snapshot_path))
        return True

    def close(self, failed: bool = False) -> None:
        """Leaves; the server takes the closed connection for the worker's end.

        Args:
            failed: with an error: a launch ends, the others with an error as well.
        """
        if failed and self._welcomed and not self.finished:
            self._send(Message(Kind.FAILED, self.worker))
        self._left.set()
        if self._pings is not None:
            self._pings.join()
        self._outgoing.close()
        self._incoming.close()
        self._hang_up()

    # --- what each poll does ---

    def _progress(self, patience: float) -> None:
        """Looks for the server if there is none, sends what waits, handles what came; waits `patience` at most."""
        if not self._welcomed:
            self._try_to_return()
        elif self._push_frame is not None and not self._push_sent and self._outgoing.finished():
            self._push_sent = self._send(self._push_frame)
        if self._channel is None:
            if patience:
                time.sleep(0.02)
            return
        message = self._receive(patience if self._welcomed else min(patience, RETRY_SECONDS))
        while message is not None:
            self._handle(message)
            message = self._receive(0.0)

    def _announce(self, steps: int, version: int, loss: float = 0.0) -> None:
        """The mailbox holds, or will, a push that the next polls hand in."""
        self._pushes += 1
        self._push_frame = Message(Kind.PUSH, self.worker, a=steps, b=self._pushes, loss=loss)
        self._push_sent = False
        self._pushed_version = version
        self.counted_at = None

    def _start_pull(self, incoming: Tensor) -> None:
        self._pulling = self.version
        self._incoming.start(incoming, self._folder.slot(self._pulling))
        self.bytes_pulled += incoming.nbytes

    def _send(self, message: Message) -> bool:
        """Whether the server's socket took the frame. One that did not is dead, which is read, or has stopped."""
        try:
            self._channel.send(message)
        except OSError:
            return False
        return True

    def _ping(self) -> None:
        """Its own thread. Before the welcome the server expects nothing but a JOIN."""
        patience = self._folder.run.get("service", {}).get("worker_timeout", PING_SECONDS * 4)
        while not self._left.wait(min(PING_SECONDS, patience / 4)):
            channel = self._channel  # first: the welcome that is seen next was this channel's, or an older one's
            if self._welcomed and channel is not None:
                with suppress(OSError):
                    channel.send(Message(Kind.PING, self.worker))

    def _receive(self, timeout: float) -> Message | None:
        if self._channel is None:
            return None
        try:
            return self._channel.wait(timeout)
        except (ConnectionError, ValueError):
            self._lose_server()
            return None

    def _raise_if_gone(self) -> None:
        if self._gone is not None:
            raise self._gone

    # --- without a server ---

    def _lose_server(self) -> None:
        if self._welcomed:
            self._away_since = time.monotonic()
            logger.warning(
                "worker %d has lost the server; it goes on alone, around the last anchor, for up to %.0f s",
                self.worker,
                self._server_timeout,
            )
        self._hang_up()

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel, self._welcomed = None, False

    def _try_to_return(self) -> None:
        if (best_step := self._folder.best_step) is not None:
            if not self.stop_requested:
                logger.warning("the run has ended without worker %d: it takes the final anchor, and ends", self.worker)
            self._notices[Kind.FINISHED] = Message(Kind.FINISHED, self.worker, b=best_step)
            self._push_frame, self.stop_requested = None, True
            return
        now = time.monotonic()
        if now - self._away_since > self._server_timeout:
            raise ServerGone(
                f"The server process ended while worker {self.worker} was training, and none took its place for "
                f"{self._server_timeout:g} s; the anchor can no longer move. Look into server.log in output_dir for "
                "the reason, and resume from the last checkpoint."
            )
        if now < self._next_attempt or self._channel is not None:
            return
        self._next_attempt = now + RETRY_SECONDS
        self._revive()
        try:
            self._channel = self._folder.try_connect()
            self._channel.send(self._join_frame())
        except OSError:
            self._hang_up()

    def _join_frame(self) -> Message:
        return Message(Kind.JOIN, self.worker, self._layout.numel, self._process, digest=self._layout.fingerprint)

    def _join_first(self, server_alive: Callable[[], bool], timeout: float) -> None:
        """Connects and waits for the welcome. A guest's server may be killed meanwhile and started again."""
        give_up = time.monotonic() + self._server_timeout
        while True:
            self._channel = self._folder.connect(server_alive, timeout)
            try:
                self._channel.send(self._join_frame())
                self._await_welcome(timeout)
                return
            except ConnectionError:
                if self.worker != ANY_NUMBER or time.monotonic() > give_up:
                    raise
                self._hang_up()

    def _await_welcome(self, timeout: float) -> None:
        """The first join: here a server that ends, or that nobody else joins, is an error."""
        begin = time.monotonic()
        while not self._welcomed:
            message = self._channel.wait(30.0)
            if message is None:
                waited = time.monotonic() - begin
                logger.info("worker %d: waiting for the other workers, %.0f s so far", self.worker, waited)
                if waited >= timeout:
                    raise ServerGone(f"The server did not welcome worker {self.worker} within {timeout:.0f} s.")
            elif message.kind is Kind.REFUSED:
                raise RefusedError(self._refusal(Refusal(message.a)))
            else:
                self._handle(message)
                self._raise_if_gone()

    # --- what the server says ---

    def _handle(self, message: Message) -> None:
        if message.kind in (Kind.ACCEPTED, Kind.REJECTED):
            self._push_frame = None
            self.counted_at = message.a  # a refused one is as if counted: it will not come again
            if message.kind is Kind.ACCEPTED:
                self.accepted += 1
                self.refused_in_a_row = 0
                self.staleness.append(message.a - self._pushed_version)
            else:
                self.refused += 1
                self.refused_in_a_row += 1
        elif message.kind is Kind.STOP:
            self.stop_requested = True
            self.save_requested = self.save_requested or bool(message.a)
        elif message.kind is Kind.WELCOME:
            self._welcome(message)
        elif message.kind is Kind.EVICTED:
            logger.warning(
                "worker %d was taken for dead by the server: it begins again at the newest anchor", self.worker
            )
            self._evicted_at = self.version
            self._next_attempt = 0.0
        elif message.kind is Kind.REFUSED:
            self._refused_return(Refusal(message.a))
        elif message.kind is Kind.GONE:
            self._gone = self._gone or ServerGone(self._why_gone(message))  # the first reason is the cause
        else:
            self._notices[message.kind] = message

    def _why_gone(self, message: Message) -> str:
        if message.a:
            who = "A worker on another machine" if message.b == ELSEWHERE else f"Worker {message.b} on this machine"
            return (
                f"{who} ended with an error, and the launch ends with it. Look for that error in its output, and "
                "resume from the last checkpoint."
            )
        return (
            f"The server of this machine has lost the one of all machines, or was refused by it, while worker "
            f"{self.worker} needed it; the anchor can no longer move. Look into server.log in output_dir for the "
            "reason, and resume from the last checkpoint."
        )

    def _welcome(self, message: Message) -> None:
        """Takes the mailbox of this join, and moves a push into it that was handed in and not counted."""
        if self._mailbox is not None:
            logger.warning("worker %d has found a server again", message.worker)
        try:
            mailbox = self._folder.mailbox(message.b)
        except FileNotFoundError:  # this process has slept so long that it was evicted again
            self._hang_up()
            return
        self.worker = message.worker
        self._outgoing.close()  # waits for a copy into the old mailbox, if there is one
        before, self._mailbox = self._mailbox, mailbox
        self._outgoing = Copier(self._device, [self._mailbox])
        self._welcomed = True
        if self._push_frame is None:
            return
        if self._push_sent and self._push_frame.b <= message.a:
            self.accepted += 1
            self._push_frame = None
            self.counted_at = -1
        elif self._evicted_at is not None or self.evicted:
            self._push_frame = None  # of differences from long ago; what came after them is dropped as well
            self._pushes -= 1
        else:
            self._mailbox.copy_(before)
            self._push_frame = replace(self._push_frame, worker=self.worker)
            self._push_sent = False

    def _refused_return(self, reason: Refusal) -> None:
        """A number that is still taken, by this process's own lost connection for one, may be free in a moment."""
        self._hang_up()
        if reason is Refusal.FINGERPRINT:
            raise RefusedError(self._refusal(reason))
        logger.warning("worker %d may not join again yet: %s", self.worker, reason.name)

    def _refusal(self, reason: Refusal) -> str:
        if reason is Refusal.TAKEN:
            return f"Another process already takes part as worker {self.worker}. Give every worker a rank of its own."
        if reason is Refusal.TIMEOUT:
            return (
                f"Fewer than {self._folder.run['num_workers']} workers joined in time. Look for the error that ended "
                "the missing one; the run cannot start without it."
            )
        if reason is Refusal.ENDED:
            return f"The run in {self._folder.path} has ended; start another."
        if reason is Refusal.NO_ROOM:
            return (
                f"{self._folder.path.parent} has no room for one more mailbox of "
                f"{self._folder.numel * 4 / 2**20:.1f} MiB. Enlarge it, or let fewer workers take part."
            )
        who = "This worker" if self.worker == ANY_NUMBER else f"Worker {self.worker}"
        return (
            f"{who}'s trainable parameters are not worker 0's: "
            f"{first_difference(self._layout.manifest, self._folder.manifest)}. Their sums cannot share an anchor. "
            "Build the same model with the same frozen parameters in every process."
        )
