"""The server of all machines: serves the workers of its own, and the relays of the others (see `relay`).

What crosses the network, over `transport.gloo`, is one push a machine and period, and the newest anchor back.

A machine counts in n with its live workers. Its sums are numbered and counted once, as pushes of workers are. When its
link is lost, its workers leave n at once; the end of the launch waits for it as long as its workers go on alone.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

import psutil
from torch import Tensor

from ..algorithms import ServerSettings
from ..transport.gloo import Listener
from ..transport.mailbox import ELSEWHERE, RunFolder
from ..transport.peer import Header, Peer
from .process import Server

logger = logging.getLogger(__name__)

ANY_MACHINE = -1  # what a machine calls itself that is not of a launch; it is given a number
MOST_WORKERS = 2**16


class Say(IntEnum):
    """What a message between machines says. Machines send the first group, the global server the second."""

    JOIN = 1  # a: machine; b: random number of the relay process; c: see `join_word`
    LIVE = 2  # a: live workers
    PUSH = 3  # vector: sum of differences; a: steps in it; b: which push of this process it is, from 1
    STOP_ALL = 4  # a worker asks that all stop
    FINISH = 5  # all workers here have finished; a: 1 if none of them waits for the end; b: best step, or -1
    FAILED = 6  # a worker of the launch ended with an error

    WELCOME = 11  # vector: the anchor; a: its version; b: the last push of this process that was counted
    REFUSED = 12  # a: Refused
    ANCHOR = 13  # vector: the newest; a: its version
    ACCEPTED = 14  # b: which push
    REJECTED = 15  # b: which push, of NaN or infinity
    STOP = 16  # a: 1 if a checkpoint is to be saved; b: 1 if a worker of the launch ended with an error
    FINISHED = 17  # vector: the final anchor; a: its version; b: best step, or -1


class Refused(IntEnum):
    """Why a machine may not take part."""

    TAKEN = 1
    SETTINGS = 2


@dataclass(frozen=True)
class MachineSettings:
    """What the servers of a launch on several machines know of it.

    Args:
        count: how many machines begin together, 1 if others come and go.
        number: which of them this is; 0 is the one with the global server.
        run_id: the same on all.
        silence: seconds without a sign of life after which a machine is lost.
        server_timeout: seconds that a machine whose link is lost is waited for, and goes on alone.
    """

    count: int = 1
    number: int = ANY_MACHINE
    run_id: str = "by hand"
    silence: float = 30.0
    server_timeout: float = 120.0

    as_dict = asdict


def machine_settings(folder: RunFolder) -> MachineSettings:
    """What run.json says of them.

    Raises:
        RuntimeError: if the algorithm of the run needs more than sums of differences from other machines.
    """
    algorithm = folder.run["settings"]["algorithm"]
    if algorithm != "lsam":
        raise RuntimeError(
            f"algorithm={algorithm!r} works on one machine only: relays add differences up, and that is no exchange of "
            "this algorithm. Use algorithm='lsam', or start all workers on one machine."
        )
    return MachineSettings(**folder.run.get("machines", {}))


def join_word(settings: ServerSettings, live: int) -> int:
    """40 bits that differ if the settings do, and 16 that count the live workers."""
    digest = hashlib.sha256(json.dumps(settings.as_dict()).encode()).digest()
    return int.from_bytes(digest[:5]) * MOST_WORKERS + live


@dataclass(eq=False)
class _Machine:
    """One connected machine; a member of the run once it has joined."""

    peer: Peer
    heard: float
    number: int = -1
    process: int = 0
    welcomed: bool = False
    finished: bool = False
    told: int = -1  # newest version that was sent
    told_final: bool = False


class GlobalServer(Server):
    """Serves the workers of this machine, and the relays of others.

    Args:
        folder, rest: as `Server`'s.
        address: host and port to listen on; port 0 lets the system choose. Where it listens is written to address.json
            in the run folder.
        secret: from `read_secret`.
        allow_remote: listen beyond this machine.

    Raises:
        RuntimeError: if it cannot listen there, or if the algorithm of the run is one of a single machine.
    """

    def __init__(self, folder: RunFolder, *rest, address: tuple[str, int], secret: bytes, allow_remote: bool = False):
        self._across = machine_settings(folder)
        self._machines: dict[int, _Machine] = {}
        self._arrivals: set[_Machine] = set()  # connected, but not joined
        self._awaited: dict[int, float] = {}  # machines of the launch that are not here -> until when
        self._stopping = False
        self._copy: tuple[int, Tensor] | None = None  # the version that is being sent; the core's own vector moves on
        super().__init__(folder, *rest)
        if self._resumed:
            until = time.monotonic() + self._across.server_timeout
            self._awaited = dict.fromkeys(range(1, self._across.count), until)
        run, silence = self._across.run_id, self._across.silence
        try:
            self._gate = Listener(*address, secret, run, self._fingerprint, folder.numel, allow_remote, silence)
        except (OSError, ValueError) as error:
            raise RuntimeError(_cannot_listen(address, error)) from error
        self._selector.register(self._gate, selectors.EVENT_READ, self._let_in)
        logger.info("listening to other machines at %s:%d", *self._gate.address)
        (folder.path / "address.json.new").write_text(json.dumps(self._gate.address))
        os.rename(folder.path / "address.json.new", address_file(folder.path))

    @contextmanager
    def listening(self) -> Iterator[None]:
        with super().listening():
            try:
                yield
            finally:
                for machine in (*self._machines.values(), *self._arrivals):
                    self._selector.unregister(machine.peer)
                    machine.peer.close()
                self._selector.unregister(self._gate)
                self._gate.close()

    def _look_after(self, now: float) -> bool:
        self._let_in()
        for machine in list(self._arrivals):
            if now - machine.heard > self._across.silence:
                self._lose(machine, "it never joined")
        for number in [number for number, until in self._awaited.items() if now > until]:
            logger.warning("machine %d did not come back", number)
            del self._awaited[number]
            self._end_if_all_finished()
        if self.terminating and self._leave_by == float("inf"):
            self._awaited.clear()
            for machine in self._machines.values():
                machine.peer.post(Header(Say.STOP, 1, int(self._failed is not None)))
        if self._machines:
            self._idle_since = now
        return super()._look_after(now)

    def _is_over(self, now: float) -> bool:
        waiting = any(not (each.told_final and each.peer.can_post) for each in self._machines.values())
        if self.terminating and now <= self._leave_by:
            return super()._is_over(now) and not waiting
        if self.terminating or not self._started or not self._expected:
            return super()._is_over(now)
        if not self._ended:  # also when the workers of this machine have died
            return not self._machines and not self._awaited and super()._is_over(now)
        return not self._workers and not waiting and not self._awaited

    def _may_start(self) -> bool:
        here = self._resumed or all(number in self._machines for number in range(1, self._across.count))
        return here and super()._may_start()

    def _start_if_ready(self) -> None:
        super()._start_if_ready()
        if self._started:
            for machine in self._machines.values():
                self._welcome_machine(machine)

    # --- who takes part ---

    def _let_in(self) -> None:
        for peer in self._gate.accept():
            machine = _Machine(peer, time.monotonic())
            self._arrivals.add(machine)
            self._selector.register(peer, selectors.EVENT_READ, lambda machine=machine: self._hear(machine))

    def _hear(self, machine: _Machine) -> None:
        """Handles every message of one machine, and sends it what is due."""
        if machine.peer.fileno() < 0:  # lost a moment ago
            return
        try:
            while machine.peer.fileno() >= 0 and (message := machine.peer.poll()) is not None:
                header, vector = message
                if machine.number < 0:
                    self._join_machine(machine, header)
                else:
                    self._handle_machine(machine, header, vector)
            self._send_newest(machine)
        except (ConnectionError, ValueError) as reason:
            self._lose(machine, reason)

    def _join_machine(self, machine: _Machine, header: Header) -> None:
        number, live = header.a, header.c % MOST_WORKERS
        if header.kind != Say.JOIN:
            raise ValueError("the first message was no JOIN")
        if number == ANY_MACHINE:
            again = (each.number for each in self._machines.values() if each.process == header.b)
            free = (n for n in itertools.count(self._across.count) if n not in self._machines)
            number = next(itertools.chain(again, free))
        before = self._machines.get(number)
        refusal = None
        if header.c != join_word(self._settings, live):
            refusal = Refused.SETTINGS
        elif not 0 < number < MOST_WORKERS or (before is not None and before.process != header.b):
            refusal = Refused.TAKEN
        if refusal is not None:
            machine.peer.post(Header(Say.REFUSED, refusal))
            logger.error("refused machine %d: %s", number, refusal.name)
            return  # it leaves when it has read that
        if before is not None:
            self._lose(before, "it has connected again")  # what it said before that was not read is said again
        machine.number, machine.process = number, header.b
        self._arrivals.discard(machine)
        self._machines[number] = machine
        self._awaited.pop(number, None)
        self._core.count(-number, live)
        logger.info("machine %d joined from %s with %d workers", number, machine.peer.address[0], live)
        if self._started:
            self._welcome_machine(machine)
        else:
            self._start_if_ready()

    def _welcome_machine(self, machine: _Machine) -> None:
        machine.welcomed, machine.told = True, self._core.anchor.version
        last = self._counted.get(machine.process, self._counted_unless_known)
        machine.peer.post(Header(Say.WELCOME, machine.told, last), self._newest())
        if self._stopping or self.terminating:
            machine.peer.post(Header(Say.STOP, int(self.terminating), int(self._failed is not None)))

    def _lose(self, machine: _Machine, reason: object) -> None:
        """Ends the link of a machine; its workers leave n at once."""
        self._selector.unregister(machine.peer)
        machine.peer.close()
        self._arrivals.discard(machine)
        if self._machines.get(machine.number) is not machine:
            logger.warning("a machine was turned away: %s", reason)
            return
        del self._machines[machine.number]
        owed = not (machine.finished and machine.told_final)
        if 0 < machine.number < self._across.count and owed and not self.terminating:
            self._awaited[machine.number] = time.monotonic() + self._across.server_timeout
        if machine.finished:
            return
        self._core.leave(-machine.number)
        logger.warning("machine %d is gone (%s); %d workers go on", machine.number, reason, self._core.live_workers)
        self._publish_if_newer()
        self._end_if_all_finished()

    # --- what machines say ---

    def _handle_machine(self, machine: _Machine, header: Header, vector: Tensor | None) -> None:
        if not machine.welcomed:
            raise ValueError(f"unexpected message {header.kind} before the start")
        if header.kind == Say.LIVE and not machine.finished and 0 <= header.a < MOST_WORKERS:
            self._core.count(-machine.number, header.a)
            logger.info("machine %d has %d live workers", machine.number, header.a)
            self._publish_if_newer()
        elif header.kind == Say.PUSH and vector is not None and not machine.finished:
            self._push_of_machine(machine, header, vector)
        elif header.kind == Say.STOP_ALL:
            self._stop_run()
        elif header.kind == Say.FAILED and machine.number < self._across.count:
            self._fail(ELSEWHERE)
        elif header.kind == Say.FINISH and not machine.finished:
            machine.finished, machine.told_final = True, bool(header.a)
            self._best_step = max(self._best_step, header.b)
            self._core.leave(-machine.number)
            self._publish_if_newer()
            logger.info("machine %d finished", machine.number)
            self._end_if_all_finished()
        else:
            raise ValueError(f"unexpected message {header}")

    def _push_of_machine(self, machine: _Machine, header: Header, vector: Tensor) -> None:
        last = self._counted.get(machine.process, 0)
        if not 0 < header.a < 2**31 or header.b <= last:
            raise ValueError(f"push {header.b} of {header.a} steps after push {last}")
        accepted = not self._ended and self._core.push(vector, header.a, -machine.number)
        self._note_counted(machine.process, header.b)
        self._publish_if_newer()
        machine.peer.post(Header(Say.ACCEPTED if accepted else Say.REJECTED, b=header.b))
        if not accepted:
            logger.warning("refused a push of machine %d: NaN or infinity, or too late", machine.number)

    # --- what machines are told ---

    def _publish_if_newer(self) -> None:
        super()._publish_if_newer()
        for machine in self._machines.values():
            self._send_newest(machine)

    def _send_newest(self, machine: _Machine) -> None:
        """What is due to a machine that can take a vector; one that cannot yet gets the newest when it can."""
        if not machine.welcomed or machine.peer.fileno() < 0 or not machine.peer.can_post:
            return
        version = self._core.anchor.version
        if self._ended and not machine.told_final:
            machine.told_final, machine.told = True, version
            machine.peer.post(Header(Say.FINISHED, version, self._best_step), self._newest())
        elif version > machine.told:
            machine.told = version
            machine.peer.post(Header(Say.ANCHOR, version), self._newest())

    def _newest(self) -> Tensor:
        """A copy of the anchor for sending, shared by the machines that are sent the same version."""
        version = self._core.anchor.version
        if self._copy is None or self._copy[0] != version:
            self._copy = (version, self._core.anchor.vector.clone())
        return self._copy[1]

    # --- the end ---

    def _stop_run(self) -> None:
        super()._stop_run()
        if not self._stopping:
            self._stopping = True
            for machine in self._machines.values():
                if machine.welcomed:
                    machine.peer.post(Header(Say.STOP))

    def _end_if_all_finished(self) -> None:
        if not self._awaited and all(machine.finished for machine in self._machines.values()):
            super()._end_if_all_finished()

    def _end(self) -> None:
        super()._end()
        for machine in self._machines.values():
            self._send_newest(machine)


def address_file(run_dir: Path) -> Path:
    """Where a server writes the host and port at which it listens to other machines."""
    return run_dir / "address.json"


def refuse_taken_port(address: tuple[str, int]) -> None:
    """Tells early what `GlobalServer` could only tell once there is a run.

    Raises:
        RuntimeError: if it could not listen at `address`; names the process that does, and its run.
    """
    try:
        socket.create_server(address).close()
    except OSError as error:
        raise RuntimeError(_cannot_listen(address, error)) from error


def _cannot_listen(address: tuple[str, int], error: Exception) -> str:
    text = f"Cannot listen to other machines at {address[0]}:{address[1]}: {error}."
    if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
        return text
    for connection in psutil.net_connections("tcp"):  # other users' have no pid here
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == address[1] and connection.pid:
            words = [*psutil.Process(connection.pid).cmdline(), ""]
            record = Path(words[words.index("--run_dir") + 1] if "--run_dir" in words else "") / "server.json"
            run = f"run {json.loads(record.read_text())['run']}, " if record.exists() else ""
            text += f" The port belongs to {run}pid {connection.pid}."
    return text + " Give this run another one, or end that."
