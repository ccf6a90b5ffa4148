"""What the server does: one thread, one selector, one `ServerCore`. `lifetime` makes a process of it.

Workers of one launch join, and once all that the run was started with are there, they are welcomed together; from then
on nobody waits for anybody until the end. Guests, who join by the folder's address, are welcomed as they come and leave
when they like. A closed connection is a dead worker: it is dropped at once and n shrinks. One whose process is not
heard of for `worker_timeout` is evicted, and may join again; the end waits for it as long again. When every worker of
the launch has finished, the anchor is final and all are told.

The server saves its state every `snapshot_seconds`, and with it, of each process, the last push it has counted. One
that is started with --resume takes up the newest snapshot; its versions go on above all that were ever published.
"""

from __future__ import annotations

import itertools
import logging
import os
import selectors
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..algorithms import ServerSettings
from ..checkpoint import load_tensors, save_tensors
from ..transport.mailbox import Channel, Kind, Message, Refusal, RunFolder
from .core import ServerCore

logger = logging.getLogger(__name__)

STRANGERS = 64  # connections at a time that have not joined yet
STRANGER_SECONDS = 10.0  # how long they may take
REMEMBERED = 4096  # processes whose last counted push is kept
GRACE_SECONDS = 5.0  # for workers to save and leave, once the server has been told to end
UNKNOWN_PUSHES = 2**63 - 1  # "consider all counted": without a snapshot none can be told from one that was


@dataclass(frozen=True)
class ServiceSettings:
    """How patient the server is, and how often it saves.

    Args:
        worker_timeout: seconds without a word after which a worker is evicted: its process is frozen.
        snapshot_seconds: seconds between two saves of the server's state into the run folder; 0 saves none.
    """

    worker_timeout: float = 600.0
    snapshot_seconds: float = 30.0

    as_dict = asdict


@dataclass(eq=False)
class _Connection:
    """One connected process; a worker once it has joined."""

    channel: Channel
    heard: float
    worker: int = -1
    process: int = 0
    ticket: int = 0
    mailbox: Tensor | None = None
    finished: bool = False


class Server:
    """Serves one run.

    Args:
        folder: the run folder, already created; run.json holds settings and fingerprint.
        resume: a server state from another run's checkpoint to begin with, True to go on from the folder's own newest
            snapshot, or None.
        join_timeout: seconds until the workers that have joined are told that others never came.
        idle_timeout: seconds without a worker after which a server without a launch of its own ends.
        parent: the process that started this one and will be its first worker; None by hand.

    State: the core's, the last counted push of each process, and who took part.
    Process: its own, see `lifetime`.
    """

    def __init__(
        self,
        folder: RunFolder,
        resume: Path | bool | None = None,
        join_timeout: float = 600.0,
        idle_timeout: float = 600.0,
        parent: int | None = None,
    ):
        self._folder = folder
        self._expected = int(folder.run["num_workers"])
        self._fingerprint = bytes.fromhex(folder.run["fingerprint"])
        self._service = ServiceSettings(**folder.run.get("service", {}))
        self._settings = ServerSettings(**folder.run["settings"])
        self._core = self._make_core()
        self._counted: dict[int, int] = {}  # process -> its last counted push
        self._counted_unless_known = 0
        self._absent: set[int] = (
            set()
        )  # workers of the launch that were evicted, or there before a restart: may be back
        if resume is True:
            self._take_up()
        elif resume is not None:
            self._core.load_state_tensors(load_tensors(resume))
            folder.publish(self._core.anchor.vector, self._core.anchor.version)
        self._resumed = resume is True
        now = time.monotonic()
        self._join_by = now + join_timeout
        self._absent_until = now + self._service.worker_timeout
        self._idle_timeout = idle_timeout
        self._idle_since = now
        self._snapshot_at = now if self._service.snapshot_seconds else float("inf")
        self._sweep_at = now
        self._leave_by = float("inf")
        self._parent = parent
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Connection] = {}
        self._tickets = itertools.count()
        self._joined = False  # whether any worker has; when the last one leaves, the server ends
        self._started = False
        self._ended = False
        self._anyone_finished = False
        self._best_step = -1
        self._failed: int | None = None  # the worker of the launch that ended with an error
        patience = [1.0, self._service.worker_timeout / 4, self._service.snapshot_seconds or 1.0]
        self._patience = max(0.01, min(patience))
        self.terminating = False
        self._start_if_ready()

    def _make_core(self) -> ServerCore:
        return ServerCore(self._folder.slot(self._folder.version).clone(), self._settings)

    def _take_up(self) -> None:
        """Goes on from the newest snapshot; without one, from the newest whole anchor."""
        version = self._folder.version
        state = None
        if self._folder.snapshot_path.exists():
            try:
                state = load_tensors(self._folder.snapshot_path)
            except ValueError as error:
                if version == 0:  # there is no anchor to go on from either
                    raise
                logger.error("%s", error)
        if state is not None:
            self._core.load_state_tensors(state)
            self._core.accepted_pushes, self._core.refused_pushes = state["pushes"].tolist()
            self._counted = dict(state["counted"].tolist())
            self._absent = set(state["workers"].tolist())
        else:
            self._counted_unless_known = UNKNOWN_PUSHES
            self._absent = set(range(self._expected))
        anchor = self._core.anchor
        anchor.version = self._folder.next_version(anchor.version)
        self._folder.publish(anchor.vector, anchor.version)
        logger.info("took the run up at version %d; the last published was %d", anchor.version, version)

    # --- the loop ---

    def serve(self) -> None:
        """Runs until the last worker has left."""
        with self.listening():
            while self.turn():
                pass

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, workers can connect."""
        self._listener = self._folder.listen()
        self._listener.settimeout(0.0)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        try:
            yield
        finally:
            for connection in self._connections():
                connection.channel.close()
            self._listener.close()
            self._selector.close()

    def turn(self, patience: float | None = None) -> bool:
        """Handles what has come, or waits for it a moment; False once the server has nothing left to do."""
        for key, _ in self._selector.select(self._patience if patience is None else patience):
            if not isinstance(key.data, _Connection):
                key.data()
            elif key.fileobj.fileno() >= 0:  # not hung up on a moment ago
                self._read(key.data)
        return self._look_after(time.monotonic())

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # gone again, or no descriptor left
            logger.error("a connection was not accepted: %s", error)
            return
        strangers = sum(other.worker < 0 for other in self._connections())
        if strangers >= STRANGERS:
            logger.error("%d connections have not joined yet: one more is refused", strangers)
            connection.close()
            return
        channel = Channel(connection)
        self._selector.register(channel, selectors.EVENT_READ, _Connection(channel, time.monotonic()))

    def _read(self, connection: _Connection) -> None:
        """Handles every whole frame of one connection."""
        try:
            while (message := connection.channel.receive()) is not None:
                connection.heard = time.monotonic()
                if connection.worker < 0:
                    self._join(message, connection)
                else:
                    self._handle(connection, message)
        except (OSError, ValueError) as reason:
            self._hang_up(connection, reason)

    def _look_after(self, now: float) -> bool:
        """What is due without a message: evictions, snapshots, the end."""
        for connection in self._connections() if now >= self._sweep_at else ():
            self._sweep_at = now + self._patience
            silent = now - connection.heard
            if connection.worker < 0 and silent > STRANGER_SECONDS:
                self._hang_up(connection, "it never joined")
            elif self._started and silent > self._service.worker_timeout and not connection.finished:
                if 0 <= connection.worker < self._expected:  # the end waits as long again for it to wake
                    self._absent.add(connection.worker)
                    self._absent_until = now + self._service.worker_timeout
                self._tell(connection, Message(Kind.EVICTED, max(connection.worker, 0)))
                self._hang_up(connection, f"silent for {silent:.1f} s, evicted")
        if self._started and now >= self._snapshot_at:
            self._snapshot_at = now + self._service.snapshot_seconds
            self.save()
        if self._absent and now > self._absent_until:
            logger.warning("workers %s did not come back", sorted(self._absent))
            for worker in self._absent:
                self._core.leave(worker)
            self._absent.clear()
            self._end_if_all_finished()
        if self.terminating and self._leave_by == float("inf"):
            self._leave_by = now + GRACE_SECONDS
            for connection in self._workers.values():
                self._tell_to_leave(connection)
        if self._workers:
            self._idle_since = now
        return not self._is_over(now)

    def _is_over(self, now: float) -> bool:
        if self.terminating:
            return not self._workers or now > self._leave_by
        if not self._started and now > self._join_by:
            logger.error("only %d of %d workers joined in time", len(self._workers), self._expected)
            for connection in self._workers.values():
                self._tell(connection, Message(Kind.REFUSED, connection.worker, a=Refusal.TIMEOUT))
            return True
        if self._workers:
            return False
        if not self._expected:
            return now - self._idle_since > self._idle_timeout
        if not self._joined:  # whoever started this server may have died before it could join
            return self._parent not in (None, os.getppid()) or now > self._join_by
        return not self._absent

    def _connections(self) -> list[_Connection]:
        return [key.data for key in self._selector.get_map().values() if isinstance(key.data, _Connection)]

    # --- who takes part ---

    def _join(self, message: Message, connection: _Connection) -> None:
        if message.kind is not Kind.JOIN:
            raise ValueError("the first message was no JOIN")
        number, refusal = message.worker, None
        if number >= self._expected and (number in self._workers or number >= self._expected + REMEMBERED):
            number = next(n for n in itertools.count(self._expected) if n not in self._workers)
        if message.digest != self._fingerprint or message.a != self._folder.numel:
            refusal = Refusal.FINGERPRINT
        elif number in self._workers:
            refusal = Refusal.TAKEN
        elif self._ended:
            refusal = Refusal.ENDED
        else:
            connection.ticket = next(self._tickets)
            try:
                connection.mailbox = self._folder.make_mailbox(connection.ticket)
            except OSError as error:
                logger.error("no room for the mailbox of worker %d: %s", number, error)
                refusal = Refusal.NO_ROOM
        if refusal is not None:
            logger.error("refused worker %d: %s", number, refusal.name)
            connection.channel.send(Message(Kind.REFUSED, message.worker, a=refusal))
            raise ValueError("refused")
        connection.worker, connection.process = number, message.b
        self._joined = True
        self._absent.discard(number)
        self._workers[number] = connection
        self._core.join(number)
        logger.info("worker %d joined with ticket %d; %d take part", number, connection.ticket, len(self._workers))
        if self._started:
            self._welcome(connection)
        else:
            self._start_if_ready()

    def _workers_are_here(self) -> bool:
        """Whether the workers that begin together have joined."""
        return self._resumed or all(worker in self._workers for worker in range(self._expected))

    def _may_start(self) -> bool:
        return self._workers_are_here()

    def _start_if_ready(self) -> None:
        if self._started or not self._may_start():
            return
        self._started = True
        for joined in self._workers.values():
            joined.heard = time.monotonic()  # they were waiting, not silent
            self._welcome(joined)

    def _welcome(self, connection: _Connection) -> None:
        last = self._counted.get(connection.process, self._counted_unless_known)
        self._tell(connection, Message(Kind.WELCOME, connection.worker, a=last, b=connection.ticket))
        if self.terminating:
            self._tell_to_leave(connection)

    def _hang_up(self, connection: _Connection, reason: object) -> None:
        """Ends a connection, whoever was at its other end; a worker's mailbox goes with it."""
        self._selector.unregister(connection.channel)
        connection.channel.close()
        worker = connection.worker
        if worker < 0:
            logger.warning("a stranger was turned away: %s", reason)
            return
        del self._workers[worker]
        connection.mailbox = None
        self._folder.drop_mailbox(connection.ticket)
        if connection.finished:
            return
        logger.warning("worker %d is gone (%s); %d workers go on", worker, reason, len(self._workers))
        self._core.leave(worker)
        self._publish_if_newer()
        self._end_if_all_finished()

    # --- what workers say ---

    def _handle(self, connection: _Connection, message: Message) -> None:
        handler: Callable | None = {
            Kind.PUSH: self._push,
            Kind.FINISH: self._finish,
            Kind.SNAPSHOT: self._snapshot,
            Kind.PING: lambda connection, message: None,
            Kind.FAILED: lambda connection, message: self._fail(connection.worker),
        }.get(message.kind)
        if handler is None or not self._started:
            raise ValueError(f"unexpected {message.kind.name}")
        handler(connection, message)

    def _push(self, connection: _Connection, message: Message) -> None:
        worker = connection.worker
        last = self._counted.get(connection.process, 0)
        if connection.finished or not 0 < message.a < 2**31 or message.b <= last:
            raise ValueError(f"push {message.b} of {message.a} steps after push {last}")
        version = self._core.anchor.version
        accepted = self._core.push(connection.mailbox, message.a, worker, message.loss)
        self._note_counted(connection.process, message.b)
        self._publish_if_newer()
        # The reply comes last: a worker that has read it finds the anchor its push completed.
        self._tell(connection, Message(Kind.ACCEPTED if accepted else Kind.REJECTED, worker, a=version))
        if not accepted:
            logger.warning("refused a push of worker %d: NaN or infinity", worker)

    def _note_counted(self, process: int, push: int) -> None:
        self._counted.pop(process, None)  # the newest last: the oldest is forgotten first
        self._counted[process] = push
        if len(self._counted) > REMEMBERED:
            del self._counted[next(iter(self._counted))]

    def _finish(self, connection: _Connection, message: Message) -> None:
        if connection.finished:
            raise ValueError("FINISH twice")
        worker = connection.worker
        connection.finished = self._anyone_finished = True
        self._best_step = max(self._best_step, message.b)
        if message.a and worker < self._expected:
            self._stop_run()
        self._core.leave(worker)
        self._publish_if_newer()
        logger.info("worker %d finished", worker)
        if worker >= self._expected:  # a guest waits for nobody
            self._tell_final(connection)
        self._end_if_all_finished()

    def _snapshot(self, connection: _Connection, message: Message) -> None:
        self._tell(connection, Message(Kind.SNAPSHOT_DONE, connection.worker, a=int(self.save())))

    def save(self) -> bool:
        """Writes the server's state into the run folder; False, and training goes on, if there is no room."""
        state = {
            **self._core.state_tensors(),
            "pushes": torch.tensor([self._core.accepted_pushes, self._core.refused_pushes]),
            "counted": torch.tensor([*self._counted.items()], dtype=torch.int64).reshape(-1, 2),
            "workers": torch.tensor([n for n in self._workers if n < self._expected], dtype=torch.int64),
        }
        try:
            save_tensors(self._folder.snapshot_path, state)
        except OSError as error:
            logger.error("snapshot not written: %s", error)
            return False
        return True

    # --- the end ---

    def _fail(self, worker: int) -> None:
        """A worker ends with an error. If it is one of the launch, so do the others; a guest's is nobody else's."""
        if worker < self._expected and self._failed is None and not self._ended:
            logger.error("worker %d ended with an error: the launch ends", worker)
            self._failed = worker
            self.terminating = True

    def _tell_to_leave(self, connection: _Connection) -> None:
        """A worker is to save and leave: one of the launch with an error, if another had one."""
        if self._failed is not None and connection.worker < self._expected:
            self._tell(connection, Message(Kind.GONE, connection.worker, a=1, b=self._failed))
        else:
            self._tell(connection, Message(Kind.STOP, connection.worker, a=1))

    def _stop_all(self) -> None:
        for connection in self._workers.values():
            if not connection.finished:
                self._tell(connection, Message(Kind.STOP, connection.worker))

    def _stop_run(self) -> None:
        """A worker has asked that all stop."""
        self._stop_all()

    def _end_if_all_finished(self) -> None:
        """The launch is over when all its workers have finished or died; guests are asked to stop, and waited for."""
        if self._ended or not self._expected or not self._started or self._absent or self._failed is not None:
            return
        training = [c for c in self._workers.values() if not c.finished]
        if any(connection.worker < self._expected for connection in training):
            return
        if training:
            self._stop_all()
        else:
            self._end()

    def _end(self) -> None:
        """All that train here have finished."""
        self._ended = True
        self._core.flush()
        self._publish_if_newer()
        if self._anyone_finished:  # else all hang, and what there is of an anchor is not the run's result
            self._folder.end(self._best_step)
        for connection in self._workers.values():
            if connection.worker < self._expected:
                self._tell_final(connection)

    def _tell_final(self, connection: _Connection) -> None:
        message = Message(Kind.FINISHED, connection.worker, a=self._core.anchor.version, b=self._best_step)
        self._tell(connection, message)

    def _tell(self, connection: _Connection, message: Message) -> None:
        """Sends to a worker; one that has died, or reads nothing, is dropped when its connection is next read."""
        try:
            connection.channel.send(message)
        except OSError:
            logger.debug("worker %d did not take %s", connection.worker, message.kind.name)
            connection.channel.shut()

    def _publish_if_newer(self) -> None:
        if self._core.anchor.version > self._folder.version:
            self._folder.publish(self._core.anchor.vector, self._core.anchor.version)
