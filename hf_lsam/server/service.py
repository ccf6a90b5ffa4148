"""What every server does for the workers of its machine, in one thread with one selector. `lifetime` runs it as a
process.

What distinguishes a server from the others of a run is its `Role`: `root.Root` moves the anchor, `relay.Relay` forwards
its workers' pushes to the root. The service calls the role at the points that `Role` names.

The workers of a launch join, and once all those that the run was started with have joined, they are welcomed together;
from then on nobody waits for anybody until the end. External workers, which join by the folder's address, are welcomed
as they come and leave when they like. A closed connection means a dead worker: it is dropped at once and n shrinks. A
worker whose process has not been heard from for `worker_timeout` is evicted and may join again; the end of the run
waits another `worker_timeout` for it. When every worker of the launch has finished, the anchor is final and all are
told.

The server saves its state every `snapshot_seconds`, including the last counted push of each process. A server that is
started with --resume loads the newest snapshot; its versions continue above all that were ever published.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..checkpoint import save_tensors
from ..transport.mailbox import MAX_WORKERS, RunFolder
from ..transport.messages import (
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
from .connections import Connection, Connections, HasFileno
from .core import UNKNOWN_PUSHES, CountedPushes
from .role import Role, ServiceInterface

logger = logging.getLogger(__name__)

JOIN_SECONDS = 10.0  # that a connection may be pending
GRACE_SECONDS = 5.0  # for external workers to leave a launch whose server has been told to end; others may save longer
SNAPSHOT_SHARE = 0.1  # of the server's time, at most


@dataclass(frozen=True)
class ServiceSettings:
    """The server's timeouts, and how often it saves.

    Args:
        worker_timeout: seconds without a message after which a worker is evicted, because its process must be frozen.
        snapshot_seconds: seconds between two saves of the server's state into the run folder; 0 turns them off.
    """

    worker_timeout: float = 600.0
    snapshot_seconds: float = 30.0

    as_dict = asdict


class Service(ServiceInterface):
    """Serves the workers of one machine.

    Args:
        folder: the run folder, already created; run.json holds settings and fingerprint.
        role: this server's role in the run.
        resume: a server state from another run's checkpoint to begin with, True to continue from the folder's own
            newest snapshot, or None.
        join_timeout: seconds after which the workers that have joined are told that others never came.
        idle_timeout: seconds without a worker after which a server that serves no launch ends.
        parent: pid of the process that started this one and will be its first worker; None if started by hand.

    State: the core's, the last counted push of each process, and which workers took part.
    Process: its own, see `lifetime`.
    """

    def __init__(
        self,
        folder: RunFolder,
        role: Role,
        resume: Path | bool | None = None,
        join_timeout: float = 600.0,
        idle_timeout: float = 600.0,
        parent: int | None = None,
    ):
        self.folder = folder
        self._bytes_before = folder.bytes_between_machines
        self.expected = int(folder.run["num_workers"])
        self._role = role
        self._core = role.core
        self._fingerprint = bytes.fromhex(folder.run["fingerprint"])
        self._settings = ServiceSettings(**folder.run.get("service", {}))
        self.counted = CountedPushes()
        self._absent: set[int] = set()  # workers of the launch that may return: evicted, or here before a restart
        now = time.monotonic()
        self.join_by = now + join_timeout
        self._absent_until = now + self._settings.worker_timeout
        self._idle_timeout = idle_timeout
        self._idle_since = now
        self._snapshot_at = now if self._settings.snapshot_seconds and role.keeps_state else float("inf")
        self._sweep_at = now
        self._leave_by = float("inf")
        self._parent = parent
        self._connections = Connections(self._heard, self._hang_up)
        self._workers: dict[int, Connection] = {}
        self._mailbox_numbers = itertools.count()
        self._joined = False  # whether any worker has joined; the server ends when the last one leaves
        self.resumed = resume is True
        self.started = False
        self.ended = False
        self._anyone_finished = False
        self._given_up = False
        self.best_step = -1
        self.failed = None
        seconds = [1.0, self._settings.worker_timeout / 4, self._settings.snapshot_seconds or 1.0]
        self._longest_wait = max(0.01, min(seconds))
        self.terminating = False
        self.waits_for_nobody = False
        role.attach(self)
        if resume is not None:
            self._take_up(resume)
        self.start_if_ready()

    def _take_up(self, resume: Path | bool) -> None:
        snapshot = self._role.take_up(resume)
        if snapshot is not None:
            self._core.accepted_pushes, self._core.refused_pushes = snapshot["pushes"].tolist()
            self.counted.load_state_tensor(snapshot["counted"])
            self._absent = set(snapshot["workers"].tolist())
        elif resume is True:
            self.counted.unless_known = UNKNOWN_PUSHES
            self._absent = set(range(self.expected))

    # --- the loop ---

    def serve(self) -> None:
        """Runs until the last worker has left."""
        with self.listening():
            while self.turn():
                pass

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Lets workers connect inside the `with` block."""
        self._connections.listen(self.folder)
        try:
            yield
        finally:
            self._role.close()
            self._connections.close()

    def turn(self, timeout: float | None = None) -> bool:
        """Handles what has arrived, or waits for it a moment; returns False once the server has nothing left to do."""
        self._connections.hear(self._longest_wait if timeout is None else timeout)
        return self._look_after(time.monotonic())

    def _look_after(self, now: float) -> bool:
        """Does what is due without a message: evictions, snapshots, the end."""
        self._role.tick(now)
        self.folder.set_between_machines(self._bytes_before + self._role.bytes_moved, self._role.exchange_steps)
        for connection in self._connections if now >= self._sweep_at else ():
            self._sweep_at = now + self._longest_wait
            silent = now - connection.last_heard
            if connection.worker < 0 and silent > JOIN_SECONDS:
                self._hang_up(connection, "it never joined")
            elif self.started and silent > self._settings.worker_timeout and not connection.finished:
                if 0 <= connection.worker < self.expected:  # the end waits another `worker_timeout` for it to wake
                    self._absent.add(connection.worker)
                    self._absent_until = now + self._settings.worker_timeout
                connection.tell(Evicted())
                self._hang_up(connection, f"silent for {silent:.1f} s, evicted")
        if self.started and now >= self._snapshot_at:
            self.save()
            took = time.monotonic() - now
            self._snapshot_at = now + max(self._settings.snapshot_seconds, took / SNAPSHOT_SHARE)
        if self._absent and now > self._absent_until:
            logger.warning("workers %s did not come back", sorted(self._absent))
            for worker in self._absent:
                self._core.leave(worker)
            self._absent.clear()
            self.end_if_all_finished()
        if self.terminating and self._leave_by == float("inf"):
            self._leave_by = now + GRACE_SECONDS
            self._role.terminate()
            for connection in self._workers.values():
                self._tell_to_leave(connection)
        if self._workers or self._role.is_needed:
            self._idle_since = now
        return not self._is_over(now)

    def _is_over(self, now: float) -> bool:
        if self._given_up:
            return True
        if self.terminating:
            if self.waits_for_nobody or not (self._workers or self._role.is_needed):
                return True
            owed = [each for each in self._workers.values() if each.worker < self.expected or not self.expected]
            silent = (now - each.last_heard for each in owed)
            return now > self._leave_by and all(seconds > GRACE_SECONDS for seconds in silent)
        if not self.started and now > self.join_by:
            logger.error("only %d of %d workers joined in time", len(self._workers), self.expected)
            for connection in self._workers.values():
                connection.tell(Refused(Refusal.TIMEOUT))
            return True
        if self._workers or self._role.is_needed:
            return False
        if not self.expected:
            return now - self._idle_since > self._idle_timeout
        if not self._joined and not self.ended:  # whoever started this server may have died before it could join
            return self._parent not in (None, os.getppid()) or now > self.join_by
        return not self._absent

    # --- who takes part ---

    def _join(self, message: Message, connection: Connection) -> None:
        if not isinstance(message, Join):
            raise ValueError(f"the first message was {message}")
        if not 0 < message.weight < 2**31:
            raise ValueError(f"unexpected {message}")
        number, refusal = message.worker, None
        beyond = number < 0 or number >= self.expected + MAX_WORKERS
        if beyond or (number >= self.expected and number in self._workers):
            number = next(n for n in itertools.count(self.expected) if n not in self._workers)
        if message.fingerprint != self._fingerprint or message.numel != self.folder.numel:
            refusal = Refusal.FINGERPRINT
        elif number in self._workers:
            refusal = Refusal.TAKEN
        elif self.ended:
            refusal = Refusal.ENDED
        else:
            connection.mailbox_number = next(self._mailbox_numbers)
            try:
                connection.mailbox = self.folder.make_mailbox(connection.mailbox_number)
            except OSError as error:
                logger.error("no room for the mailbox of worker %d: %s", number, error)
                refusal = Refusal.NO_ROOM
        if refusal is not None:
            logger.error("refused worker %d: %s", number, refusal.name)
            connection.channel.send(Refused(refusal))
            raise ValueError("refused")
        connection.worker, connection.process = number, message.process
        self._joined = True
        self._absent.discard(number)
        self._workers[number] = connection
        self._core.join(number, message.weight)
        logger.info(
            "worker %d joined with mailbox %d; %d take part", number, connection.mailbox_number, len(self._workers)
        )
        if self.started:
            self._welcome(connection)
        else:
            self.start_if_ready()

    @property
    def workers_are_here(self) -> bool:
        return self.resumed or all(worker in self._workers for worker in range(self.expected))

    def start_if_ready(self) -> None:
        """Begins the run, once, as soon as the role is ready and the workers that begin together have joined."""
        if self.started or not (self._role.ready and self.workers_are_here):
            return
        self.started = True
        for joined in self._workers.values():
            joined.last_heard = time.monotonic()  # they were waiting, not silent
            self._welcome(joined)
        self._role.exchange()

    def _welcome(self, connection: Connection) -> None:
        last = self.counted.last(connection.process)
        connection.tell(Welcome(connection.worker, last, connection.mailbox_number))
        if self.terminating:
            self._tell_to_leave(connection)

    def _hang_up(self, connection: Connection, reason: object) -> None:
        """Closes a connection, whether or not it has joined; a worker's mailbox is removed with it."""
        self._connections.drop(connection)
        worker = connection.worker
        if worker < 0:
            logger.warning("a connection that had not joined was closed: %s", reason)
            return
        del self._workers[worker]
        connection.mailbox = None
        self.folder.drop_mailbox(connection.mailbox_number)
        if connection.finished:
            return
        logger.warning("worker %d is gone (%s); %d workers go on", worker, reason, len(self._workers))
        self._core.leave(worker)
        self.publish_if_newer()
        self.end_if_all_finished()

    # --- messages from workers ---

    def _heard(self, connection: Connection, message: Message) -> None:
        if connection.worker < 0:
            self._join(message, connection)
        else:
            self._handle(connection, message)

    def _handle(self, connection: Connection, message: Message) -> None:
        if not self.started:
            raise ValueError(f"{message} before the start")
        match message:
            case Push():
                self._push(connection, message)
            case Finish():
                self._finish(connection, message)
            case Snapshot():
                connection.tell(SnapshotDone(self.save()))
            case Heartbeat():
                pass
            case Failed():
                self.fail(connection.worker)
            case _:
                raise ValueError(f"unexpected {message}")

    def _push(self, connection: Connection, message: Push) -> None:
        if connection.finished:
            raise ValueError("a push after the last")
        worker = connection.worker
        self.counted.note(connection.process, message.number, message.steps)
        version = self._core.anchor.version
        assert connection.mailbox is not None
        accepted = self._core.push(connection.mailbox, message.steps, worker, message.loss, message.finite)
        self.publish_if_newer()
        # The answer comes last: a worker that has read it finds the anchor that its push has completed.
        connection.tell(Answer(accepted, version))
        if not accepted:
            logger.warning("refused a push of worker %d: NaN or infinity", worker)

    def _finish(self, connection: Connection, message: Finish) -> None:
        if connection.finished:
            raise ValueError("finished twice")
        worker = connection.worker
        connection.finished = self._anyone_finished = True
        self.note_best_step(message.best_step)
        if message.stop_all and worker < self.expected:
            self.stop_all()
        self._core.leave(worker)
        self.publish_if_newer()
        logger.info("worker %d finished", worker)
        if worker >= self.expected:  # an external worker waits for nobody
            self._tell_final(connection)
        self.end_if_all_finished()

    def save(self) -> bool:
        """Saves the server's state into the run folder. Returns False if it cannot be written; training continues."""
        self._core.steps_begun = self.folder.steps_begun
        state = {
            **self._core.state_tensors(),
            "pushes": torch.tensor([self._core.accepted_pushes, self._core.refused_pushes]),
            "counted": self.counted.state_tensor(),
            "workers": torch.tensor([n for n in self._workers if n < self.expected], dtype=torch.int64),
        }
        try:
            save_tensors(self.folder.snapshot_path, state)
        except OSError as error:
            logger.error("snapshot not written: %s", error)
            return False
        return True

    def _tell_to_leave(self, connection: Connection) -> None:
        """Tells a worker to save and leave; a worker of the launch leaves with an error, if another one had one."""
        if self.failed is not None and connection.worker < self.expected:
            connection.tell(WorkerFailed(self.failed))
        else:
            connection.tell(Stop(save=True))

    def _end(self) -> None:
        """Ends the run: all workers here have finished, and the anchor is final once it has been flushed."""
        self.ended = True
        self._core.flush()
        self.publish_if_newer()
        if self._anyone_finished:  # else all have died or hang, and the anchor is not the run's result
            self.folder.end(self.best_step)
        for connection in self._workers.values():
            if connection.worker < self.expected:
                self._tell_final(connection)

    def _tell_final(self, connection: Connection) -> None:
        connection.tell(Finished(self.best_step))

    # --- what else a role may ask for ---

    @property
    def has_workers(self) -> bool:
        return bool(self._workers)

    def watch(self, source: int | HasFileno, heard: Callable[[], None]) -> None:
        self._connections.watch(source, heard)

    def unwatch(self, source: int | HasFileno) -> None:
        """Stops watching `source`.

        Raises:
            KeyError: if `source` is not watched.
        """
        self._connections.unwatch(source)

    def publish_if_newer(self) -> None:
        if self._core.anchor.version > self.folder.version:
            self.folder.publish(self._core.anchor.vector, self._core.anchor.version)
        self._role.exchange()

    def note_best_step(self, step: int) -> None:
        self.best_step = max(self.best_step, step)

    def stop_workers(self, save: bool = False) -> None:
        for connection in self._workers.values():
            if not connection.finished:
                connection.tell(Stop(save))

    def stop_all(self) -> None:
        self.stop_workers()
        self._role.stop_all()

    def fail(self, worker: int) -> None:
        if worker < self.expected and self.failed is None and not self.ended:
            logger.error("worker %d ended with an error, which ends the launch", worker)
            self.failed = worker
            self.terminating = True

    def pass_failure_on(self, worker: int) -> None:
        self.failed = worker
        for connection in self._workers.values():
            self._tell_to_leave(connection)

    def give_up(self, reason: object) -> None:
        logger.error("%s: this machine ends", reason)
        self._given_up = True
        for connection in self._connections:
            connection.tell(RootLost())

    def end_if_all_finished(self) -> None:
        if self.ended or not self.expected or not self.started or self._absent or self.failed is not None:
            return
        training = [c for c in self._workers.values() if not c.finished]
        if any(connection.worker < self.expected for connection in training) or not self._role.others_finished:
            return
        if training:
            self.stop_workers()
        elif self._role.conclude():
            self._end()
