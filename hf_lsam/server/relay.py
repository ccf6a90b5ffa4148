"""The server of a machine that does not have the global one: adds its workers' sums up and hands them on.

Towards its workers it is a server like any other. Once (its live workers) * tau steps are in, their sum crosses the
network as one push; the global server's newest anchor comes back and is published in this machine's run folder, under
the global version. A sum that the link cannot take yet goes on growing: nobody waits.

A lost link is no error. The workers go on, around the last anchor, while a thread connects again; the sum that was
under way is handed in again with the next, if it was not counted, and only then. A relay that is killed loses what it
had summed, and nothing is counted twice: the one that takes its place considers all that its workers have handed in
counted.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import selectors
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..algorithms import ServerSettings
from ..anchor import Anchor
from ..transport import gloo
from ..transport.gloo import JoinRefused
from ..transport.mailbox import ELSEWHERE, Kind, Message, RunFolder
from ..transport.peer import Header, Peer
from .machines import Refused, Say, join_word, machine_settings
from .process import UNKNOWN_PUSHES, Server

logger = logging.getLogger(__name__)

ATTEMPT_SECONDS = 5.0
DEPART_SECONDS = 3.0
RETRY_SECONDS = 0.5


class RelayCore:
    """What `ServerCore` is to the global server: sums go in, and come out again once a period is complete.

    Args:
        vector: the anchor to begin with, float32 [d]; owned from here on.
        settings: of the run.

    State: the sum of the period under way, the sum that was handed on and has no answer yet, the last anchor.
    Process: one; not thread-safe.
    """

    def __init__(self, vector: Tensor, settings: ServerSettings):
        self.settings = settings
        self.anchor = Anchor(vector)  # moved by `adopt` only
        self.live: set[int] = set()
        self.accepted_pushes = 0
        self.refused_pushes = 0
        self.handed_on = 0
        self._sum = torch.zeros_like(vector)
        self._steps = 0
        self._under_way = torch.zeros_like(vector)
        self._steps_under_way = 0

    def join(self, worker: int) -> None:
        """Counts `worker` as live."""
        self.live.add(worker)

    def leave(self, worker: int) -> None:
        """Counts `worker` as gone; what it pushed stays."""
        self.live.discard(worker)

    @torch.no_grad()
    def push(self, vector: Tensor, steps: int, worker: int = 0, loss: float = 0.0) -> bool:
        """Adds the sum of x - y over `steps` local steps of one worker, float32 [d]; read, not kept.

        Returns:
            False if it is not finite, as `ServerCore.push`.
        """
        if not torch.isfinite(torch.dot(vector, vector)):
            self.refused_pushes += 1
            return False
        self.accepted_pushes += 1
        self._add(vector, steps)
        return True

    def take(self, all_of_it: bool = False) -> tuple[Tensor, int, int] | None:
        """The sum to hand on, if a period is complete and the last one has been answered.

        Args:
            all_of_it: whatever there is; at the end.

        Returns:
            (sum float32 [d], to be left as it is until answered; steps in it; its number, from 1), or None.
        """
        complete = self._steps >= max(1, len(self.live)) * self.settings.sync_steps
        if self._steps_under_way or not self._steps or not (complete or all_of_it):
            return None
        self._sum, self._under_way = self._under_way, self._sum
        self._steps, self._steps_under_way = 0, self._steps
        self.handed_on += 1
        return self._under_way, self._steps_under_way, self.handed_on

    def answered(self, number: int) -> None:
        """The global server has counted, or refused, the sum that was handed on as `number`."""
        if number == self.handed_on:
            self._steps_under_way = 0

    @torch.no_grad()
    def settle(self, last_counted: int) -> None:
        """After a lost link: what was under way, if it was not counted, goes back into the sum."""
        if self._steps_under_way and last_counted < self.handed_on:
            self._add(self._under_way, self._steps_under_way)
        self._steps_under_way = 0

    @property
    def is_empty(self) -> bool:
        """Whether all that came in has been handed on, and answered."""
        return not self._steps and not self._steps_under_way

    @torch.no_grad()
    def adopt(self, vector: Tensor, version: int) -> None:
        """Takes the global anchor [d]; an older one than it has is left alone."""
        if version >= self.anchor.version:
            self.anchor.vector.copy_(vector)
            self.anchor.version = version

    def flush(self) -> None:
        """The end: nothing to do here, the global server flushes."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The last anchor; sums are not taken up again."""
        return self.anchor.state_tensors()

    def _add(self, vector: Tensor, steps: int) -> None:
        if self._steps:
            self._sum.add_(vector)
        else:
            self._sum.copy_(vector)
        self._steps += steps


class RelayServer(Server):
    """Serves the workers of this machine, and hands their sums on to the global server.

    Args:
        folder, rest: as `Server`'s.
        address: host and port of the global server.
        secret: from `read_secret`.

    Raises:
        RuntimeError: if the algorithm of the run is one of a single machine.
    """

    def __init__(self, folder: RunFolder, *rest, address: tuple[str, int], secret: bytes):
        self._across = machine_settings(folder)
        self._address = address
        self._secret = secret
        self._peer: Peer | None = None
        self._connecting: threading.Thread | None = None
        self._connected: queue.SimpleQueue[Peer | Exception] = queue.SimpleQueue()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._process_id = secrets.randbits(63)
        self._try_at = 0.0
        self._asked = False  # JOIN is on its way, or has been answered
        self._linked = False  # and this machine is counted
        self._told_live = 0
        self._stop_wanted = self._stop_told = False
        self._finishing = self._finish_told = False
        self._told_to_end = False  # as the global server was
        self._final = False  # the anchor is
        self._gone = False
        super().__init__(folder, *rest)
        self._snapshot_at = float("inf")  # the state of the run is the global server's
        self._give_up_at = self._join_by
        self._selector.register(self._bell, selectors.EVENT_READ, self._meet)

    def _make_core(self) -> RelayCore:
        return RelayCore(self._folder.slot(self._folder.version).clone(), self._settings)

    def _take_up(self) -> None:
        self._counted_unless_known = UNKNOWN_PUSHES
        self._absent = set(range(self._expected))
        self._core.anchor.version = self._folder.version

    # --- the loop ---

    def _look_after(self, now: float) -> bool:
        if self._peer is None and self._connecting is None and now >= self._try_at:
            self._try_at = now + RETRY_SECONDS
            self._connecting = threading.Thread(target=self._connect, name="hf_lsam-connecting", daemon=True)
            self._connecting.start()
        if not self._linked and now > self._give_up_at:
            self._give_up("the global server did not come back")
        self._hand_on()
        return super()._look_after(now)

    def _is_over(self, now: float) -> bool:
        return self._gone or super()._is_over(now)

    def _may_start(self) -> bool:
        return self._linked and super()._may_start()

    @contextmanager
    def listening(self) -> Iterator[None]:
        with super().listening():
            try:
                yield
            finally:
                self._depart()

    def _depart(self) -> None:
        """Hands in what is left, as far as the link takes it in a moment, and leaves."""
        self._finishing = True
        deadline = time.monotonic() + DEPART_SECONDS
        while self._linked and not (self._finish_told and self._peer.can_post) and time.monotonic() < deadline:
            self._hear()
            time.sleep(0.01)
        if self._peer is not None:
            self._drop_link()
        if self._connecting is not None:
            self._connecting.join()
            while not self._connected.empty():
                outcome = self._connected.get()
                if isinstance(outcome, Peer):
                    outcome.close()
        os.close(self._bell)

    # --- the link ---

    def _connect(self) -> None:
        """In a thread of its own: one attempt."""
        run, silence = self._across.run_id, self._across.silence
        try:
            outcome = gloo.connect(
                self._address, self._secret, run, self._fingerprint, self._folder.numel, ATTEMPT_SECONDS, silence
            )
        except (OSError, ValueError) as error:
            outcome = error
        self._connected.put(outcome)
        os.eventfd_write(self._bell, 1)

    def _meet(self) -> None:
        """Takes over what the thread has brought about."""
        os.eventfd_read(self._bell)
        outcome = self._connected.get()
        self._connecting.join()
        self._connecting = None
        if isinstance(outcome, JoinRefused):
            self._give_up(outcome)
        elif isinstance(outcome, Exception):
            logger.info("%s", outcome)
        else:
            self._peer, self._asked = outcome, False
            self._selector.register(self._peer, selectors.EVENT_READ, self._hear)
            self._hand_on()

    def _hear(self) -> None:
        """Handles what the global server says."""
        try:
            while self._peer is not None and (message := self._peer.poll()) is not None:
                self._handle_global(*message)
        except (ConnectionError, ValueError) as reason:
            self._lose_link(reason)
        self._hand_on()

    def _lose_link(self, reason: object) -> None:
        if self._told_to_end:  # it will not come back, and nobody is to wait for it
            self._final = True
            self._end_if_all_finished()
        elif self._linked and not self._ended:
            seconds = self._across.server_timeout
            self._give_up_at = time.monotonic() + seconds
            logger.warning("%s The workers go on around the last anchor, for up to %.0f s", reason, seconds)
        self._drop_link()

    def _drop_link(self) -> None:
        self._selector.unregister(self._peer)
        self._peer.close()
        self._peer, self._linked = None, False

    def _give_up(self, reason: object) -> None:
        logger.error("%s: this machine ends", reason)
        self._gone = True
        for connection in self._connections():
            self._tell(connection, Message(Kind.GONE, max(connection.worker, 0)))

    # --- what the global server says ---

    def _handle_global(self, header: Header, vector: Tensor | None) -> None:
        if header.kind in (Say.WELCOME, Say.ANCHOR, Say.FINISHED) and vector is not None:
            self._core.adopt(vector, header.a)
            if not self._folder.version:  # nobody has read the version that this folder began with
                self._folder.slot(self._folder.version).copy_(self._core.anchor.vector)
            self._publish_if_newer()
        if header.kind == Say.WELCOME:
            self._core.settle(header.b)
            self._linked, self._stop_told, self._finish_told = True, False, False
            logger.info("takes part as a machine of the run, at version %d", header.a)
            self._start_if_ready()
        elif header.kind in (Say.ACCEPTED, Say.REJECTED):
            self._core.answered(header.b)
            if header.kind == Say.REJECTED:
                logger.warning("the global server refused sum %d", header.b)
        elif header.kind == Say.STOP:
            self._told_to_end = self._told_to_end or bool(header.a)
            if header.b:
                self._failed = ELSEWHERE
            for connection in self._workers.values():
                if header.b:
                    self._tell_to_leave(connection)
                elif not connection.finished:
                    self._tell(connection, Message(Kind.STOP, connection.worker, a=header.a))
        elif header.kind == Say.FINISHED:
            self._final, self._best_step = True, max(self._best_step, header.b)
            if not self._finishing:  # this machine was given up
                self._stop_all()
            self._end_if_all_finished()
        elif header.kind == Say.REFUSED and header.a == Refused.SETTINGS:
            self._give_up("The settings of this machine are not those of the run: start all with the same")
        elif header.kind == Say.REFUSED:  # the link before this one may not have been found broken yet
            raise ConnectionError("The global server still has this machine's last link.")

    # --- what it is told ---

    def _publish_if_newer(self) -> None:
        super()._publish_if_newer()
        self._hand_on()

    def _hand_on(self) -> None:
        """Whatever can be said without waiting."""
        if self._peer is None:
            return
        if not self._linked:
            if not self._asked and self._workers_are_here():
                self._asked = True
                self._told_live = len(self._core.live)
                word = join_word(self._settings, self._told_live)
                self._peer.post(Header(Say.JOIN, self._across.number, self._process_id, word))
            return
        if len(self._core.live) != self._told_live:
            self._told_live = len(self._core.live)
            self._peer.post(Header(Say.LIVE, self._told_live))
        if self._stop_wanted and not self._stop_told:
            self._stop_told = True
            self._peer.post(Header(Say.STOP_ALL))
        if self._finish_told or not self._peer.can_post:
            return
        if (handed := self._core.take(self._finishing)) is not None:
            vector, steps, number = handed
            self._peer.post(Header(Say.PUSH, steps, number), vector)
            logger.info("handed on sum %d of %d steps", number, steps)
        elif self._finishing and self._core.is_empty:
            self._finish_told = True
            self._peer.post(Header(Say.FINISH, int(not self._workers), self._best_step))

    # --- the end ---

    def _fail(self, worker: int) -> None:
        super()._fail(worker)
        if self._failed is not None and self._linked:
            self._peer.post(Header(Say.FAILED))

    def _stop_run(self) -> None:
        super()._stop_run()
        self._stop_wanted = True
        self._hand_on()

    def _end(self) -> None:
        if self._final:
            super()._end()
        else:
            self._finishing = True
            self._hand_on()
