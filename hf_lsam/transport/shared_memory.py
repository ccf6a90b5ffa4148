"""A worker's link to its machine's server process: vectors through shared memory, control messages through a socket."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import load_tensors, save_tensors
from ..parameters import ParameterLayout, first_difference
from .base import NOTHING_UNCOUNTED, FinalAnchor, Link, LinkStatus, RefusedError, ServerGone
from .channel import Channel
from .copier import Copier
from .mailbox import RunFolder
from .messages import (
    ANY_NUMBER,
    ELSEWHERE,
    Answer,
    Evicted,
    Failed,
    Finish,
    Finished,
    Heartbeat,
    Join,
    Message,
    Push,
    Refusal,
    Refused,
    RootLost,
    Snapshot,
    SnapshotDone,
    Stop,
    Welcome,
    WorkerFailed,
)

logger = logging.getLogger(__name__)

RETRY_SECONDS = 0.2  # between two attempts to find the server again
HEARTBEAT_SECONDS = 1.0  # or less, where the server's timeout is short


class SharedMemoryLink(Link):
    """Pushes vectors and pulls anchors through a run folder.

    A push takes three steps: `push` starts the copy into the mailbox, the first `poll` after the copy has ended sends
    the frame, and the poll that reads the server's answer makes the mailbox the worker's again. A pull is similar: one
    poll starts the copy out of the shared slot, a later one checks that the server has not begun to overwrite the slot.

    A closed connection is not an error. The worker continues, coupled to the anchor it has; its next push grows, and
    each poll checks, without waiting, whether a server listens again. That server says which push of this process it
    counted last, so a push that was under way is repeated if and only if it was not counted.

    A thread sends heartbeats to the server, whatever the training thread does: evaluate, save, compile. A process that
    was stopped for so long that the run has ended without it finds the final anchor still in its memory.

    Attributes:
        mailbox: shared memory from which the server reads a push, float32 [d]. Pushing this tensor itself makes no copy
            and no check: its values must be finite, and must not change until `can_push` again.
        outgoing, incoming: the copies into the mailbox, and out of the shared slots.
        process: a random number by which a server recognises whose pushes it has counted.

    Args:
        folder: the run folder.
        worker: this worker's number, or `ANY_NUMBER` to be given one.
        layout: of this worker's trainable parameters; must be the same as worker 0's.
        device: where the worker's vectors live.
        server_alive: whether the server process runs, as far as this worker can know.
        timeout: seconds to wait for the server and for the other workers to join.
        server_timeout: seconds for which the worker continues without a server.
        revive: called before each attempt to find the server again, and with each heartbeat; the worker that owns the
            server restarts it there. Called by both threads.
        weight: see `WorkerSettings`.

    Raises:
        RefusedError: if the server refuses this worker.
        ServerGone: if the server is not there.

    Process: a worker's training thread, and the heartbeat thread. Blocking: construction, `finish`, `snapshot` and
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
        weight: int = 1,
    ):
        self._folder = folder
        self._worker = worker
        self._weight = weight
        self._status = LinkStatus(connected=False)
        self._layout = layout
        self._device = device
        self._server_timeout = server_timeout
        self._revive = revive
        self._left = threading.Event()
        self._heartbeat: threading.Thread | None = None
        self.process = secrets.randbits(63)
        self._pushes = 0
        self._push_frame: Push | None = None  # of the push that has no answer yet
        self._push_sent = False
        self._pushed_version = 0
        self.mailbox: Tensor | None = None
        self.outgoing = Copier(device, [])
        self.incoming = Copier(device, [folder.slot(0), folder.slot(1)])
        self._pulling: int | None = None  # version whose copy is under way
        self._channel: Channel | None = None
        self._away_since = time.monotonic()
        self._next_attempt = 0.0
        self._evicted_at: int | None = None  # the newest anchor version at the eviction, until it has been pulled
        self._gone: ServerGone | None = None  # why the server ended, until a call that may raise it
        self._final: Finished | None = None
        self._snapshot_done: SnapshotDone | None = None
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
        self._heartbeat = threading.Thread(target=self._send_heartbeats, name="hf_lsam-heartbeat", daemon=True)
        self._heartbeat.start()

    @property
    def bytes_between_machines(self) -> int:
        return self._folder.bytes_between_machines

    @property
    def exchange_steps(self) -> int:
        return self._folder.exchange_steps

    @property
    def can_push(self) -> bool:
        return self._push_frame is None and self._status.connected and self._evicted_at is None

    @property
    def steps_begun(self) -> int:
        return self._folder.steps_begun

    def begin_step(self) -> None:
        self._folder.begin_step(self._worker)

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        assert self.mailbox is not None, "a push before the server has welcomed this worker"
        if total is not self.mailbox:
            self.outgoing.start(self.mailbox, total, check=True)
        self._pushes += 1
        self._push_frame = Push(self._pushes, steps, loss, True)
        self._push_sent = False
        self._pushed_version = version
        self._status = self._status.after_push(total.nbytes)

    def poll(self, held: int, incoming: Tensor) -> int | None:
        self._progress(0.0)
        self._raise_if_gone()
        # The answer to a push says which anchors count it. Until it is here, a new one might.
        unanswered = self._push_sent and self._push_frame is not None and self._status.connected
        if self._pulling is None and self._folder.version != held and not unanswered:
            self._start_pull(incoming)
        version = None
        while self._pulling is not None and self.incoming.finished():
            if self._folder.is_whole(self._pulling):
                version = self._pulling
            self._pulling = None
            if version is None and not unanswered:  # the server has begun to overwrite that slot: a newer is complete
                self._start_pull(incoming)
        if self._evicted_at is not None and (held if version is None else version) >= self._evicted_at:
            self._evicted_at = None
            self._status = replace(self._status, evictions=self._status.evictions + 1)
        return version

    def settle(self) -> None:
        self.outgoing.wait()
        while self._final is None and (self._push_frame is not None or not self._status.connected):
            self._progress(1.0)
            self._raise_if_gone()

    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> FinalAnchor:
        frame = Finish(stop_all, best_step)
        asked, waited_from = None, time.monotonic()
        while self._final is None:
            if self._status.connected and asked is not self._channel and self._send(frame):
                asked = self._channel  # a server that takes its place is asked again
            self._progress(1.0)
            self._raise_if_gone()
            if time.monotonic() - waited_from > 30:
                waited_from += 30
                logger.info("worker %d: waiting for the other workers to finish", self._worker)
        version = self._start_pull(incoming)
        self.incoming.wait()
        while not self._folder.is_whole(version):
            version = self._start_pull(incoming)
            self.incoming.wait()
        self._pulling = None
        self._status = replace(self._status, finished=True)
        return FinalAnchor(version, self._final.best_step)

    def snapshot(self, path: Path, manifest: Sequence[Any] | None = None) -> bool:
        if self._push_frame is not None and not self._push_sent:  # its copy into the mailbox has yet to end
            self.outgoing.wait()
            self._progress(0.0)
        self._snapshot_done = None
        channel = self._channel
        if not self._status.connected or not self._send(Snapshot()):
            return False
        while self._snapshot_done is None:
            if self._channel is not channel:
                return False
            self._progress(1.0)
        if not self._snapshot_done.written:
            raise OSError(
                f"The server could not write its snapshot into {self._folder.path} (no room?); see server.log. The "
                "training state is unharmed, this checkpoint lacks the server's part."
            )
        save_tensors(path, load_tensors(self._folder.snapshot_path), manifest)
        return True

    def close(self, failed: bool = False) -> None:
        if failed and self._status.connected and not self._status.finished:
            self._send(Failed())
        self._left.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        self.outgoing.close()
        self.incoming.close()
        self._hang_up()

    # --- what each poll does ---

    def _progress(self, timeout: float) -> None:
        """Looks for a server if there is none, sends what is due, handles what has arrived; waits up to `timeout` s."""
        if not self._status.connected:
            self._try_to_return()
        elif self._push_frame is not None and not self._push_sent and self.outgoing.finished():
            self._push_frame = replace(self._push_frame, finite=self.outgoing.is_finite)
            self._push_sent = self._send(self._push_frame)
        if self._channel is None:
            if timeout:
                time.sleep(0.02)
            return
        message = self._receive(timeout if self._status.connected else min(timeout, RETRY_SECONDS))
        while message is not None:
            self._handle(message)
            message = self._receive(0.0)

    def _start_pull(self, incoming: Tensor) -> int:
        self._pulling = version = self._folder.version
        self.incoming.start(incoming, self._folder.slot(version))
        self._status = self._status.after_pull(incoming.nbytes)
        return version

    def _send(self, message: Message) -> bool:
        """Whether the server's socket took the frame. If not, the server is dead, as reading will show, or stopped."""
        assert self._channel is not None
        try:
            self._channel.send(message)
        except OSError:
            return False
        return True

    def _send_heartbeats(self) -> None:
        """Runs in a thread of its own. Sends nothing before the welcome, when the server expects only a `Join`."""
        timeout = self._folder.run.get("service", {}).get("worker_timeout", HEARTBEAT_SECONDS * 4)
        while not self._left.wait(min(HEARTBEAT_SECONDS, timeout / 4)):
            channel = self._channel  # read first: the welcome seen next then came over this channel, or an older one
            if self._status.connected and channel is not None:
                with suppress(OSError):
                    channel.send(Heartbeat())
            self._revive()  # the training thread, which would, may evaluate or save for minutes

    def _receive(self, timeout: float) -> Message | None:
        if self._channel is None:
            return None
        try:
            return self._channel.receive(timeout)
        except (ConnectionError, ValueError):
            self._lose_server()
            return None

    def _raise_if_gone(self) -> None:
        if self._gone is not None:
            raise self._gone

    # --- without a server ---

    def _lose_server(self) -> None:
        if self._status.connected:
            self._away_since = time.monotonic()
            logger.warning(
                "worker %d has lost the server; it goes on alone, around the last anchor, for up to %.0f s",
                self._worker,
                self._server_timeout,
            )
        self._hang_up()

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
        self._channel, self._status = None, replace(self._status, connected=False)

    def _try_to_return(self) -> None:
        if (best_step := self._folder.best_step) is not None:
            if not self._status.stop_requested:
                logger.warning("the run has ended without worker %d: it takes the final anchor, and ends", self._worker)
            self._final, self._push_frame = Finished(best_step), None
            self._status = replace(self._status, stop_requested=True)
            return
        now = time.monotonic()
        if now - self._away_since > self._server_timeout:
            raise ServerGone(
                f"The server process ended while worker {self._worker} was training, and none took its place for "
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

    def _join_frame(self) -> Join:
        return Join(self._worker, self._layout.numel, self.process, self._layout.fingerprint, self._weight)

    def _join_first(self, server_alive: Callable[[], bool], timeout: float) -> None:
        """Connects and waits for the welcome. An external worker's server may be killed meanwhile and started again."""
        give_up = time.monotonic() + self._server_timeout
        while True:
            self._channel = self._folder.connect(server_alive, timeout)
            try:
                self._channel.send(self._join_frame())
                self._await_welcome(timeout)
                return
            except ConnectionError:
                if self._worker != ANY_NUMBER or time.monotonic() > give_up:
                    raise
                self._hang_up()

    def _await_welcome(self, timeout: float) -> None:
        """Waits for the welcome of the first join, when a server that ends, or that nobody else joins, is an error."""
        begin = time.monotonic()
        while not self._status.connected:
            assert self._channel is not None
            message = self._channel.receive(30.0)
            if message is None:
                waited = time.monotonic() - begin
                logger.info("worker %d: waiting for the other workers, %.0f s so far", self._worker, waited)
                if waited >= timeout:
                    raise ServerGone(f"The server did not welcome worker {self._worker} within {timeout:.0f} s.")
            elif isinstance(message, Refused):
                raise RefusedError(self._refusal(message.reason))
            else:
                self._handle(message)
                self._raise_if_gone()

    # --- what the server says ---

    def _handle(self, message: Message) -> None:
        match message:
            case Answer(accepted, version):
                self._push_frame = None
                self._status = self._status.after_answer(accepted, version, version - self._pushed_version)
            case Stop(save):
                save = save or self._status.save_requested
                self._status = replace(self._status, stop_requested=True, save_requested=save)
            case Welcome():
                self._welcome(message)
            case Evicted():
                logger.warning(
                    "worker %d was taken for dead by the server: it begins again at the newest anchor", self._worker
                )
                self._evicted_at = self._folder.version
                self._next_attempt = 0.0
                self._drop_push()
            case Refused(reason):
                self._refused_return(reason)
            case WorkerFailed(worker):
                who = "A worker on another machine" if worker == ELSEWHERE else f"Worker {worker} on this machine"
                self._note_gone(
                    f"{who} ended with an error, and the launch ends with it. Look for that error in its output, and "
                    "resume from the last checkpoint."
                )
            case RootLost():
                self._note_gone(
                    f"The server of this machine has lost the one of all machines, or was refused by it, while worker "
                    f"{self._worker} needed it; the anchor can no longer move. Look into server.log in output_dir for "
                    "the reason, and resume from the last checkpoint."
                )
            case Finished():
                self._final = message
            case SnapshotDone():
                self._snapshot_done = message
            case _:
                raise ValueError(f"a server does not say {message}")

    def _note_gone(self, why: str) -> None:
        """Keeps the first reason, which is the cause of the others."""
        self._gone = self._gone or ServerGone(why)

    def _welcome(self, message: Welcome) -> None:
        """Maps the mailbox of this join, and copies a push that was under way and not counted into it."""
        if self.mailbox is not None:
            logger.warning("worker %d has found a server again", message.worker)
        try:
            if self._folder.was_made_anew:
                self.incoming.close()
                self._folder, self._pulling = RunFolder(self._folder.path), None
                self.incoming = Copier(self._device, [self._folder.slot(0), self._folder.slot(1)])
            mailbox = self._folder.mailbox(message.mailbox)
        except FileNotFoundError:  # this process has slept so long that it was evicted again
            self._hang_up()
            return
        self._worker = message.worker
        self.outgoing.close()  # waits for a copy into the old mailbox, if there is one
        before, self.mailbox = self.mailbox, mailbox
        self.outgoing = Copier(self._device, [mailbox], self.outgoing.is_finite)
        self._status = replace(self._status, connected=True)
        if self._push_frame is None:
            return
        if self._push_sent and self._push_frame.number <= message.last_counted:
            self._push_frame = None
            self._status = self._status.after_answer(True, NOTHING_UNCOUNTED)
        else:
            assert before is not None, "a push without a mailbox"
            mailbox.copy_(before)
            self._push_sent = False

    def _drop_push(self) -> None:
        """Drops the push that was under way when the worker was taken for dead: it is long out of date, and it was not
        counted, because the server answers a push before it evicts. What the worker has done since is dropped when it
        starts again."""
        if self._push_frame is not None:
            self._push_frame = None
            self._pushes -= 1
            self._status = replace(self._status, counted_at=NOTHING_UNCOUNTED)

    def _refused_return(self, reason: Refusal) -> None:
        """Tries again later: a number that is still taken, for example by this process's own lost connection, may be
        free in a moment."""
        self._hang_up()
        if reason is Refusal.FINGERPRINT:
            raise RefusedError(self._refusal(reason))
        logger.warning("worker %d may not join again yet: %s", self._worker, reason.name)

    def _refusal(self, reason: Refusal) -> str:
        if reason is Refusal.TAKEN:
            return f"Another process already takes part as worker {self._worker}. Give every worker a rank of its own."
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
        who = "This worker" if self._worker == ANY_NUMBER else f"Worker {self._worker}"
        return (
            f"{who}'s trainable parameters are not worker 0's: "
            f"{first_difference(self._layout.manifest, self._folder.manifest)}. Their sums cannot share an anchor. "
            "Build the same model with the same frozen parameters in every process."
        )
