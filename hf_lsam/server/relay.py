"""The server of every machine but the root's: sums its workers' pushes and forwards the sums.

To its workers it is a server like any other. Once (number of its live workers) * tau steps have been pushed, their sum
crosses the network as one push. The root server's newest anchor comes back and is published in this machine's run
folder, under the root's version. A sum that the link cannot take yet keeps growing: nobody waits.

A lost link is not an error. The workers continue around the last anchor while a thread reconnects. The sum that was
under way is sent again, as part of the next one, if and only if it was not counted. A relay that is killed loses what
it had summed, and nothing is counted twice: its successor treats everything that its workers have pushed as counted.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import threading
import time
from pathlib import Path

from torch import Tensor

from ..algorithms import ServerSettings
from ..transport.mailbox import RunFolder
from ..transport.messages import (
    ELSEWHERE,
    AnchorChange,
    Failed,
    FinishedAnchor,
    FinishMachine,
    JoinMachine,
    Live,
    Message,
    NewAnchor,
    Refusal,
    Refused,
    StopAll,
    StopMachine,
    Sum,
    SumAnswer,
    WelcomeMachine,
)
from ..transport.peer import Peer
from ..transport.tls import JoinRefused, connect
from .core import RelayCore
from .machines import machine_settings, settings_digest
from .role import Role, ServiceInterface

logger = logging.getLogger(__name__)

ATTEMPT_SECONDS = 5.0
RETRY_SECONDS = 0.5


class Relay(Role):
    """Forwards the sums of this machine's workers to the root, and pulls the anchor from it.

    Args:
        folder: the run folder.
        address: host and port of the root.
        secret: from `read_secret`.

    Raises:
        RuntimeError: if the run's algorithm works on a single machine only.
    """

    keeps_state = False  # the root does
    core: RelayCore

    def __init__(self, folder: RunFolder, address: tuple[str, int], secret: bytes):
        self.core = RelayCore(folder.slot(folder.version).clone(), ServerSettings(**folder.run["settings"]))
        self._settings = machine_settings(folder)
        self._fingerprint = bytes.fromhex(folder.run["fingerprint"])
        self._address = address
        self._secret = secret
        self._peer: Peer | None = None
        self._bytes_of_lost = 0  # bytes that crossed links that have been closed since
        self._connecting: threading.Thread | None = None
        self._connected: queue.SimpleQueue[Peer | Exception] = queue.SimpleQueue()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._process = secrets.randbits(63)
        self._try_at = self._met_at = 0.0
        self._asked = False  # JoinMachine has been sent over the present link
        self._linked = False  # and answered: the root counts this machine
        self._live_sent = Live(0)
        # Steps begun here: those that the root has counted, and those reported with the sum that is not answered yet.
        # The successor of another relay treats all of them as counted.
        self._steps_told = folder.steps_begun_here
        self._steps_under_way = 0
        self._stop_wanted = self._stop_sent = False
        self._finishing = self._finish_sent = False
        self._root_ends = False  # the root was told to end
        self._final = False  # the anchor is final

    # --- what the service calls ---

    def attach(self, service: ServiceInterface) -> None:
        self._service = service
        self._give_up_at = service.join_by
        service.watch(self._wakeup, self._meet)

    def take_up(self, resume: Path | bool) -> None:
        self.core.anchor.version = self._service.folder.version

    @property
    def ready(self) -> bool:
        return self._linked

    @property
    def is_needed(self) -> bool:
        return False

    @property
    def others_finished(self) -> bool:
        return True  # only the root can know

    @property
    def bytes_moved(self) -> int:
        return self._bytes_of_lost + (0 if self._peer is None else self._peer.bytes_moved)

    @property
    def exchange_steps(self) -> int:
        return self.core.exchange_steps

    def tick(self, now: float) -> None:
        if self._final:  # nothing is left to be sent, and the root may have ended
            return
        if self._peer is None and self._connecting is None and now >= self._try_at:
            self._try_at = now + RETRY_SECONDS
            self._connecting = threading.Thread(target=self._connect, name="hf_lsam-connecting", daemon=True)
            self._connecting.start()
        if self._peer is None and now > self._give_up_at:  # the welcome may be long under way, over a slow link
            self._service.give_up("the global server did not come back")
        self.exchange()

    def exchange(self) -> None:
        if self._peer is None:
            return
        live = Live(self.core.live_workers, self.core.live_weight)
        if not self._linked:
            if not self._asked and self._service.workers_are_here:
                self._asked = True
                self._live_sent = live
                digest = settings_digest(self.core.settings)
                self._peer.post(JoinMachine(self._settings.number, self._process, live.workers, digest, live.weight))
            return
        if live != self._live_sent:
            self._live_sent = live
            self._peer.post(live)
        if self._stop_wanted and not self._stop_sent:
            self._stop_sent = True
            self._peer.post(StopAll())
        if self._finish_sent or not self._peer.can_post:
            return
        if (claimed := self.core.claim(self._finishing)) is not None:
            vector, steps, number, bits = claimed
            self._steps_under_way = self._service.folder.steps_begun_here - self._steps_told
            self._peer.post(Sum(number, steps, self._steps_under_way), vector, bits)
            logger.info("forwarded sum %d of %d steps", number, steps)
        elif self._finishing and not self.core.steps_left:
            self._finish_sent = True
            self._peer.post(FinishMachine(not self._service.has_workers, self._service.best_step))

    def stop_all(self) -> None:
        self._stop_wanted = True
        self.exchange()

    def terminate(self) -> None:
        if self._service.failed not in (None, ELSEWHERE) and self._linked:
            assert self._peer is not None
            self._peer.post(Failed())

    def conclude(self) -> bool:
        if not self._final:
            self._finishing = True
            self.exchange()
        return self._final

    def close(self) -> None:
        """Forwards what is left, for as long as there is a link and at most `server_timeout` seconds, and leaves."""
        self._finishing = True
        deadline = time.monotonic() + self._settings.server_timeout
        while (
            self._peer is not None
            and self._linked
            and not (self._finish_sent and self._peer.can_post)
            and not self._service.waits_for_nobody
            and time.monotonic() < deadline
        ):
            self._hear()
            time.sleep(0.01)
        if self.core.steps_left:
            logger.warning("%d steps of this machine's workers were not counted", self.core.steps_left)
        if self._peer is not None:
            self._drop_link()
        if self._connecting is not None:
            self._connecting.join()
            while not self._connected.empty():
                outcome = self._connected.get()
                if isinstance(outcome, Peer):
                    outcome.close()
        self._service.unwatch(self._wakeup)
        os.close(self._wakeup)

    # --- the link ---

    def _connect(self) -> None:
        """Makes one attempt to connect; runs in a thread of its own."""
        run, silence = self._settings.run_id, self._settings.silence
        try:
            peer = connect(
                self._address,
                self._secret,
                run,
                self._fingerprint,
                self._service.folder.numel,
                ATTEMPT_SECONDS,
                silence,
            )
        except (OSError, ValueError) as error:
            self._connected.put(error)
        else:
            self._connected.put(peer)
        os.eventfd_write(self._wakeup, 1)

    def _meet(self) -> None:
        """Takes over the result of the connecting thread: a peer, or an error."""
        os.eventfd_read(self._wakeup)
        outcome = self._connected.get()
        assert self._connecting is not None
        self._connecting.join()
        self._connecting = None
        if isinstance(outcome, JoinRefused):
            self._service.give_up(outcome)
        elif isinstance(outcome, Exception):
            logger.info("%s", outcome)
        else:
            self._peer, self._asked, self._met_at = outcome, False, time.monotonic()
            self._service.watch(self._peer, self._hear)
            self.exchange()

    def _hear(self) -> None:
        """Handles the root's messages."""
        try:
            while self._peer is not None and (message := self._peer.poll()) is not None:
                self._handle(*message)
        except (ConnectionError, ValueError) as reason:
            self._lose_link(reason)
        self.exchange()

    def _lose_link(self, reason: object) -> None:
        was_linked = self._linked
        self._drop_link()
        if self._root_ends:  # the root will not come back, and nobody has to wait for it
            self._final = True
            self._service.end_if_all_finished()
        elif was_linked and not self._service.ended:
            seconds = self._settings.server_timeout
            self._give_up_at = time.monotonic() + seconds
            logger.warning("%s The workers go on around the last anchor, for up to %.0f s", reason, seconds)

    def _drop_link(self) -> None:
        assert self._peer is not None
        self._service.unwatch(self._peer)
        self._peer.close()
        self._bytes_of_lost += self._peer.bytes_moved
        self._peer, self._linked = None, False
        self._give_up_at += time.monotonic() - self._met_at  # only time without a link counts

    # --- messages from the root ---

    def _handle(self, message: Message, vector: Tensor | None) -> None:
        match message:
            case WelcomeMachine(version) if version < self.core.anchor.version:
                self._service.give_up(
                    f"The run at {self._address[0]}:{self._address[1]} is at anchor {version}, and this folder holds "
                    f"anchor {self.core.anchor.version} of another run. Start this server in a new folder"
                )
            case WelcomeMachine(version, last_counted, begun):
                self._adopt(vector, version)
                self.core.settle(last_counted)
                self._settle_steps(counted=last_counted >= self.core.forwarded)
                self._note_steps(begun)
                self._linked, self._stop_sent, self._finish_sent = True, False, False
                logger.info("takes part as a machine of the run, at version %d", version)
                self._service.start_if_ready()
            case NewAnchor(version, begun):
                self._adopt(vector, version)
                self._note_steps(begun)
            case AnchorChange(version, begun) if vector is not None:
                self._note_steps(begun)
                self.core.change(vector, version)
                self._service.publish_if_newer()
            case SumAnswer(number, accepted):
                self.core.answered(number)
                self._settle_steps(counted=True)
                if not accepted:
                    logger.warning("the global server refused sum %d", number)
            case StopMachine(save, failed):
                self._root_ends = self._root_ends or (save and self._settings.count > 1)  # by hand it may come back
                if failed:
                    self._service.pass_failure_on(ELSEWHERE)
                else:
                    self._service.stop_workers(save)
            case FinishedAnchor(version, best_step):
                self._adopt(vector, version)
                self._final = True
                self._service.note_best_step(best_step)
                if not self._finishing:  # the root has ended the run without waiting for this machine
                    self._service.stop_workers()
                self._service.end_if_all_finished()
            case Refused(Refusal.SETTINGS):
                self._service.give_up("The settings of this machine are not those of the run: start all with the same")
            case Refused():  # the root may not have noticed yet that the previous link is broken
                raise ConnectionError("The global server still has this machine's last link.")
            case _:
                raise ValueError(f"unexpected {message}")

    def _settle_steps(self, counted: bool) -> None:
        if counted:
            self._steps_told += self._steps_under_way
        self._steps_under_way = 0

    def _note_steps(self, begun: int) -> None:
        """Takes the root's count of the steps `begun` by all workers. It includes this machine's steps as far as they
        were reported: these are subtracted, because the folder counts its own."""
        self._service.folder.set_steps_begun_elsewhere(max(0, begun - self._steps_told))

    def _adopt(self, vector: Tensor | None, version: int) -> None:
        if vector is None:
            raise ValueError(f"anchor {version} came without a vector")
        folder = self._service.folder
        self.core.adopt(vector, version)
        # Two versions may be overwritten in place. Version 0, with which this folder began, is read by nobody before
        # the root's welcome. And where the exact form of the published, rounded version arrives, a worker that copies
        # it during the write gets the old or the new value of each element, and either will do.
        if folder.version in (0, version):
            folder.slot(folder.version).copy_(self.core.anchor.vector)
        self._service.publish_if_newer()
