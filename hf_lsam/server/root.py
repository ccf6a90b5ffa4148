"""The root server of a run: moves the anchor. In addition to its own workers it serves other machines' relays (see
`relay`), if any.

A machine counts in n with its live workers. Its sums are numbered and counted once, like workers' pushes. When its link
is lost, its workers leave n at once; the end of the launch waits for the machine as long as its workers may continue
alone.
"""

from __future__ import annotations

import errno
import functools
import itertools
import json
import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from torch import Tensor

from ..algorithms import ServerSettings
from ..checkpoint import load_tensors
from ..compression import round_
from ..files import write_atomically
from ..transport.mailbox import RunFolder
from ..transport.messages import (
    ANY_NUMBER,
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
from ..transport.tls import Listener
from .core import ServerCore
from .machines import MOST_WORKERS, MachineSettings, address_file, machine_settings, settings_digest
from .role import Role, ServiceInterface

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Machine:
    """One connected machine; a member of the run once it has joined."""

    peer: Peer
    last_heard: float
    number: int = -1
    process: int = 0
    welcomed: bool = False
    finished: bool = False
    sent: int = -1  # the newest version that was sent to it
    held: Tensor | None = None  # the anchor as the machine has it, float32 [d]; None if 32 bits a value cross
    sent_final: bool = False
    leaves: bool = False  # once it has finished, without waiting for the final anchor


class Root(Role):
    """Moves the anchor by the pushes of its own workers and the sums of other machines.

    Args:
        folder: the run folder.
        listener: where relays connect, from `listen`; None on a single machine.
    """

    keeps_state = True
    core: ServerCore

    def __init__(self, folder: RunFolder, listener: Listener | None = None):
        self.core = ServerCore(folder.slot(folder.version).clone(), ServerSettings(**folder.run["settings"]))
        self._settings = MachineSettings() if listener is None else machine_settings(folder)
        self._listener = listener
        self._machines: dict[int, _Machine] = {}
        self._pending: set[_Machine] = set()  # connected, but not joined
        self._awaited: dict[int, float] = {}  # machine of the launch that is missing -> until when it is waited for
        self._stopping = False
        self._bytes_of_lost = 0  # bytes that crossed links that have been closed since
        self._copy: tuple[int, Tensor] | None = None  # the version being sent, while the core's own vector moves on

    # --- what the service calls ---

    def attach(self, service: ServiceInterface) -> None:
        self._service = service
        if self._listener is not None:
            service.watch(self._listener, self._accept)

    def take_up(self, resume: Path | bool) -> dict[str, Tensor] | None:
        folder, anchor = self._service.folder, self.core.anchor
        if not isinstance(resume, bool):
            self.core.load_state_tensors(load_tensors(resume))
            folder.set_steps_begun_elsewhere(self.core.steps_begun)
            folder.publish(anchor.vector, anchor.version)
            return None
        until = time.monotonic() + self._settings.server_timeout
        self._awaited = dict.fromkeys(range(1, self._settings.count), until)
        version, snapshot = folder.version, None
        if folder.snapshot_path.exists():
            try:
                snapshot = load_tensors(folder.snapshot_path)
            except ValueError as error:
                if version == 0:  # there is no published anchor to continue from either
                    raise
                logger.error("%s", error)
        if snapshot is not None:
            self.core.load_state_tensors(snapshot)
            if not folder.steps_begun:  # the folder was cleared when its last workers had left
                folder.set_steps_begun_elsewhere(self.core.steps_begun)
        anchor.version = folder.next_version(anchor.version)
        folder.publish(anchor.vector, anchor.version)
        logger.info("resumed the run at version %d; the last published was %d", anchor.version, version)
        return snapshot

    @property
    def ready(self) -> bool:
        return self._service.resumed or all(number in self._machines for number in range(1, self._settings.count))

    @property
    def is_needed(self) -> bool:
        if not self._service.started:
            return False
        if self._service.terminating or self._service.ended:
            waiting = any(not (each.sent_final and each.peer.can_post) for each in self._machines.values())
            return waiting or bool(self._awaited)
        return bool(self._machines or self._awaited)

    @property
    def others_finished(self) -> bool:
        return not self._awaited and all(machine.finished for machine in self._machines.values())

    @property
    def bytes_moved(self) -> int:
        return self._bytes_of_lost + sum(each.peer.bytes_moved for each in (*self._machines.values(), *self._pending))

    def tick(self, now: float) -> None:
        if self._listener is None:
            return
        self._accept()
        for machine in list(self._pending):
            if now - machine.last_heard > self._settings.silence:
                self._lose(machine, "it never joined")
        for number in [number for number, until in self._awaited.items() if now > until]:
            logger.warning("machine %d did not come back", number)
            del self._awaited[number]
            self._service.end_if_all_finished()

    def exchange(self) -> None:
        for machine in self._machines.values():
            self._send_newest(machine)

    def stop_all(self) -> None:
        if not self._stopping:
            self._stopping = True
            for machine in self._machines.values():
                if machine.welcomed:
                    machine.peer.post(StopMachine(save=False, failed=False))

    def terminate(self) -> None:
        self._awaited.clear()
        for machine in self._machines.values():
            machine.peer.post(StopMachine(save=True, failed=self._service.failed is not None))

    def conclude(self) -> bool:
        return True

    def close(self) -> None:
        for machine in (*self._machines.values(), *self._pending):
            self._service.unwatch(machine.peer)
            machine.peer.close()
        if self._listener is not None:
            self._service.unwatch(self._listener)
            self._listener.close()

    # --- who takes part ---

    def _accept(self) -> None:
        assert self._listener is not None
        for peer in self._listener.accept():
            machine = _Machine(peer, time.monotonic())
            self._pending.add(machine)
            self._service.watch(peer, functools.partial(self._hear, machine))

    def _hear(self, machine: _Machine) -> None:
        """Handles every message of one machine, and sends it what is due."""
        if machine.peer.fileno() < 0:  # lost while an earlier event was handled
            return
        try:
            while machine.peer.fileno() >= 0 and (message := machine.peer.poll()) is not None:
                if machine.number < 0:
                    self._join(machine, message[0])
                else:
                    self._handle(machine, *message)
            self._send_newest(machine)
        except (ConnectionError, ValueError) as reason:
            self._lose(machine, reason)

    def _join(self, machine: _Machine, message: Message) -> None:
        if not isinstance(message, JoinMachine):
            raise ValueError(f"the first message was {message}")
        number = message.machine
        if number == ANY_NUMBER:
            again = (each.number for each in self._machines.values() if each.process == message.process)
            free = (n for n in itertools.count(self._settings.count) if n not in self._machines)
            number = next(itertools.chain(again, free))
        before = self._machines.get(number)
        refusal = None
        if message.settings != settings_digest(self.core.settings):
            refusal = Refusal.SETTINGS
        elif not 0 < number < MOST_WORKERS or (before is not None and before.process != message.process):
            refusal = Refusal.TAKEN
        elif not 0 <= message.live < MOST_WORKERS or not message.live <= message.weight < 2**31:
            raise ValueError(f"unexpected {message}")
        if refusal is not None:
            machine.peer.post(Refused(refusal))
            logger.error("refused machine %d: %s", number, refusal.name)
            return  # the machine disconnects when it has read that
        if before is not None:
            self._lose(before, "it has connected again")  # whatever was not read on the old link is sent again
        machine.number, machine.process = number, message.process
        self._pending.discard(machine)
        self._machines[number] = machine
        self._awaited.pop(number, None)
        self.core.count(-number, message.live, message.weight)
        logger.info("machine %d joined from %s with %d workers", number, machine.peer.address[0], message.live)
        self._service.start_if_ready()
        self._send_newest(machine)

    def _welcome(self, machine: _Machine) -> None:
        machine.welcomed, machine.sent = True, self.core.anchor.version
        last = self._service.counted.last(machine.process)
        machine.peer.post(WelcomeMachine(machine.sent, last, self._service.folder.steps_begun), self._newest())
        if self.core.settings.exchange_bits < 32:
            machine.held = self._newest().clone()
        if self._stopping or self._service.terminating:
            machine.peer.post(StopMachine(self._service.terminating, self._service.failed is not None))

    def _lose(self, machine: _Machine, reason: object) -> None:
        """Ends the link of a machine; its workers leave n at once."""
        self._service.unwatch(machine.peer)
        machine.peer.close()
        self._bytes_of_lost += machine.peer.bytes_moved
        self._pending.discard(machine)
        if self._machines.get(machine.number) is not machine:
            logger.warning("a machine was turned away: %s", reason)
            return
        del self._machines[machine.number]
        owed = not (machine.finished and (machine.leaves or (machine.sent_final and machine.peer.all_arrived)))
        if 0 < machine.number < self._settings.count and owed and not self._service.terminating:
            self._awaited[machine.number] = time.monotonic() + self._settings.server_timeout
        if machine.finished:
            return
        self.core.leave(-machine.number)
        logger.warning("machine %d is gone (%s); %d workers go on", machine.number, reason, self.core.live_workers)
        self._service.publish_if_newer()
        self._service.end_if_all_finished()

    # --- what machines say ---

    def _handle(self, machine: _Machine, message: Message, vector: Tensor | None) -> None:
        if not machine.welcomed:
            raise ValueError(f"{message} before the start")
        match message:
            case Live(workers, weight) if not machine.finished and 0 <= workers < MOST_WORKERS and weight < 2**31:
                self.core.count(-machine.number, workers, weight)
                logger.info("machine %d has %d live workers", machine.number, workers)
                self._service.publish_if_newer()
            case Sum() if vector is not None and not machine.finished:
                self._take_sum(machine, message, vector)
            case StopAll():
                self._service.stop_all()
            case Failed() if machine.number < self._settings.count:
                self._service.fail(ELSEWHERE)
            case FinishMachine(nobody_waits, best_step) if not machine.finished:
                machine.finished, machine.sent_final, machine.leaves = True, nobody_waits, nobody_waits
                self._service.note_best_step(best_step)
                self.core.leave(-machine.number)
                self._service.publish_if_newer()
                logger.info("machine %d finished", machine.number)
                self._service.end_if_all_finished()
            case _:
                raise ValueError(f"unexpected {message}")

    def _take_sum(self, machine: _Machine, message: Sum, vector: Tensor) -> None:
        if not 0 <= message.begun < 2**31:
            raise ValueError(f"{message.begun} steps begun since the last sum")
        self._service.counted.note(machine.process, message.number, message.steps)
        accepted = not self._service.ended and self.core.push(vector, message.steps, -machine.number)
        # Before the answer: once a machine has read that its steps are counted, every total that it reads has them.
        folder = self._service.folder
        folder.set_steps_begun_elsewhere(folder.steps_begun_elsewhere + message.begun)
        # Before the anchor: the machine sends its next sum while the anchor arrives, so that an exchange over a slow
        # link takes as long as the slower of the two directions and not as long as both.
        machine.peer.post(SumAnswer(message.number, accepted))
        self._service.publish_if_newer()
        if not accepted:
            logger.warning("refused a sum of machine %d: NaN or infinity, or too late", machine.number)

    # --- what machines are sent ---

    def _send_newest(self, machine: _Machine) -> None:
        """Sends a machine what is due: first its welcome, then the newest anchor whenever its link can take one."""
        if machine.number < 0 or machine.peer.fileno() < 0 or not self._service.started:
            return
        if not machine.welcomed:
            self._welcome(machine)
        if not machine.peer.can_post:
            return
        version, begun = self.core.anchor.version, self._service.folder.steps_begun
        if self._service.ended and not machine.sent_final:
            machine.sent_final, machine.sent = True, version
            machine.peer.post(FinishedAnchor(version, self._service.best_step), self._newest())
        elif version > machine.sent:
            machine.sent = version
            if machine.held is None:
                machine.peer.post(NewAnchor(version, begun), self._newest())
                return
            # The rounding error is part of the next difference, because `held` is what the machine really has.
            bits = self.core.settings.exchange_bits
            difference = round_(self.core.anchor.vector - machine.held, bits)
            machine.held += difference
            machine.peer.post(AnchorChange(version, begun), difference, bits)

    def _newest(self) -> Tensor:
        """A copy of the anchor for sending, shared by all machines to which the same version is sent."""
        version = self.core.anchor.version
        if self._copy is None or self._copy[0] != version:
            self._copy = (version, self.core.anchor.vector.clone())
        return self._copy[1]


def listen(folder: RunFolder, address: tuple[str, int], secret: bytes, allow_remote: bool = False) -> Listener:
    """Opens the listener at which the relays of other machines connect to the root of the run in `folder`.

    Args:
        address: host and port; port 0 lets the system choose. The address in use is written to address.json in the run
            folder.
        secret: from `read_secret`.
        allow_remote: listen beyond this machine.

    Raises:
        RuntimeError: if it cannot listen there, or if the run's algorithm works on a single machine only.
    """
    settings = machine_settings(folder)
    fingerprint = bytes.fromhex(folder.run["fingerprint"])
    try:
        listener = Listener(
            *address, secret, settings.run_id, fingerprint, folder.numel, allow_remote, settings.silence
        )
    except (OSError, ValueError) as error:
        raise RuntimeError(_cannot_listen(address, error)) from error
    logger.info("listening to other machines at %s:%d", *listener.address)
    write_atomically(address_file(folder.path), json.dumps(listener.address))
    return listener


def refuse_taken_port(address: tuple[str, int]) -> None:
    """Fails early where `listen` would fail only once there is a run.

    Raises:
        RuntimeError: if nothing can listen at `address`; if the port is taken, names the process that has it, and its
            run.
    """
    try:
        family, *_, resolved = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        socket.create_server(resolved[:2], family=family).close()
    except OSError as error:
        raise RuntimeError(_cannot_listen(address, error)) from error


def _cannot_listen(address: tuple[str, int], error: Exception) -> str:
    text = f"Cannot listen to other machines at {address[0]}:{address[1]}: {error}."
    if not isinstance(error, OSError) or error.errno != errno.EADDRINUSE:
        return text
    for connection in psutil.net_connections("tcp"):  # those of other users show no pid
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == address[1] and connection.pid:
            words = [*psutil.Process(connection.pid).cmdline(), ""]
            record = Path(words[words.index("--run_dir") + 1] if "--run_dir" in words else "") / "server.json"
            run = f"run {json.loads(record.read_text())['run']}, " if record.exists() else ""
            text += f" The port belongs to {run}pid {connection.pid}."
    return text + " Give this run another one, or end that."
