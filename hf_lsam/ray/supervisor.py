"""The supervisor: keeps as many workers as the cluster has room for, a relay on each of their nodes, and one root.

It is the driver. It attends to every host once a second and waits for none: at each turn it takes the answer that has
arrived, if any, and asks the next question. About servers it remembers only which of them it wants: a server that has
died is started again by its host, and a host that has died is replaced, on the same node or on another one.

    a worker ends with 0       it has finished; from then on none is added
    a worker ends otherwise    another one takes its number, at most `max_restarts` times
    its host dies              likewise; if its node is alive, the process is told to save and leave first
    a node dies                its workers wait for room elsewhere, which does not count as a restart
    a node comes               Ray places what waits
    the root's node dies       another root continues from what was kept, on a node with a relay; all relays are told
    SIGTERM or Ctrl-C          all workers save and leave, then the relays forward what they have, then the root saves

When the head of the cluster dies, Ray ends this process and all hosts, and with them the servers; the workers continue
alone for `server_timeout`, save, and end with an error.
"""

from __future__ import annotations

import enum
import logging
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from ..record import RecordReader
from ..signals import EndSignals
from ..transport.ownership import LAUNCH_PREFIX
from ..transport.secret import new_secret
from .cluster import Needs, connect, nodes
from .hosts import WorkerHost
from .plan import FOLDER, Plan
from .remote import HostDied, Remote
from .servers import MOST_ERRORS, RelayHost, RootHost

logger = logging.getLogger(__name__)

TURN_SECONDS = 1.0


def launch(
    words: Sequence[str],
    num_workers: int,
    run_dir: str | Path,
    *,
    address: str = "auto",
    min_workers: int = 1,
    gpus_per_worker: float = 1.0,
    cpus_per_worker: float = 1.0,
    max_restarts: int = 3,
    resume: bool = False,
    shared_memory_dir: str | Path = "/dev/shm",
    report_seconds: float = 30.0,
) -> None:
    """Trains on a Ray cluster: runs `python WORDS` as `num_workers` workers, and returns when all have finished.

    Worker 0 of the script saves the anchor; what the root saved last is in `run_dir`/ray/root.

    Args:
        address: see `cluster.connect`; ignored in a process that is a driver already.
        words, num_workers, run_dir, min_workers, max_restarts, resume, shared_memory_dir, report_seconds: see `Plan`.
        gpus_per_worker, cpus_per_worker: see `Needs`.

    Raises:
        ValueError: if the arguments are invalid.
        RuntimeError: if another driver has `run_dir`, if there is no cluster, if fewer than `min_workers` workers are
            left that may be started again, or if a server ends with an error again and again.
        KeyboardInterrupt, SystemExit: on a signal, once all have saved.

    Blocking: until the end. Process: a driver's, in its main thread if it is to receive signals.
    """
    plan = Plan(
        list(words),
        num_workers,
        Path(run_dir).absolute(),
        min_workers,
        Needs(cpus_per_worker, gpus_per_worker),
        max_restarts,
        resume,
        Path(shared_memory_dir),
        report_seconds,
    )
    plan.check()
    with plan.held():
        joined = connect(address)
        try:
            Supervisor(plan).run()
        finally:
            if joined:
                ray.shutdown()


class Phase(enum.Enum):
    """How far the worker of a number is."""

    WAITING = enum.auto()  # for room, or for its host to begin
    PLACED = enum.auto()
    TRAINING = enum.auto()
    FINISHED = enum.auto()
    LEFT = enum.auto()  # without finishing, and nobody takes its place


@dataclass
class Worker:
    """A worker's number, and the host and process that have it."""

    number: int
    phase: Phase = Phase.WAITING
    host: Remote | None = None
    pid: int = 0
    restarts: int = 0


@dataclass
class Relay:
    """The relay of a node."""

    host: Remote
    folder: Path
    is_there: bool = False  # workers may start: it serves its folder, or will in a moment
    holds_run: bool = False
    version: int = 0
    hosts_lost: int = 0


class Supervisor:
    """Carries out a plan, in a cluster that this process has joined.

    Args:
        plan: checked.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._folder = plan.run_dir / FOLDER
        self._secret = self._folder / "secret"
        self._name = f"ray-{secrets.token_hex(4)}"
        # Files that a job has sent along are wherever each node has unpacked them.
        sent = ray.get_runtime_context().runtime_env.get("working_dir")
        self._script_folder = None if sent else Path.cwd()
        self._workers = [Worker(number) for number in range(plan.num_workers)]
        self._relays: dict[str, Relay] = {}  # by Ray's id of the node
        self._root: Remote | None = None
        self._root_node, self._root_port, self._root_at = "", None, ""
        self._roots_lost = 0
        self._signals = EndSignals()
        self._started = False  # as many workers as must begin together have had room
        self._leaving = False  # a worker has finished, or all are told to leave
        self._record = RecordReader(plan.run_dir)
        self._misses_record = False
        self._report_at = 0.0

    def run(self) -> None:
        """See `launch`."""
        if not self._secret.exists():
            new_secret(self._secret)
        self._signals.catch()
        try:
            try:
                while self._signals.received is None and not self._is_over:
                    self._turn()
                    time.sleep(TURN_SECONDS)
            finally:
                self._leave()
        finally:
            for host in self._hosts():
                host.kill()
            self._signals.restore()
        self._signals.obey()
        logger.info("%s", self._outcome())

    @property
    def _is_over(self) -> bool:
        phases = {worker.phase for worker in self._workers}
        return phases <= {Phase.FINISHED, Phase.LEFT} or (self._leaving and not phases & {Phase.TRAINING, Phase.PLACED})

    def _outcome(self) -> str:
        finished = sum(worker.phase is Phase.FINISHED for worker in self._workers)
        return f"{finished} of {len(self._workers)} workers have finished; the anchor lies in {self._folder / 'root'}"

    def _hosts(self) -> list[Remote]:
        hosts = [worker.host for worker in self._workers] + [relay.host for relay in self._relays.values()]
        return [host for host in (*hosts, self._root) if host is not None]

    def _turn(self) -> None:
        for worker in self._workers:
            self._tend_worker(worker)
        for node, relay in list(self._relays.items()):
            self._tend_relay(node, relay)
        self._tend_root()
        if time.monotonic() >= self._report_at:
            self._report_at = time.monotonic() + self._plan.report_seconds
            self._report()

    # --- workers ---

    def _tend_worker(self, worker: Worker) -> None:
        plan, host = self._plan, worker.host
        if worker.phase in (Phase.FINISHED, Phase.LEFT):
            return
        if host is None:
            if not self._leaving:
                log = self._folder / f"worker-{worker.number}.log"
                worker.host = Remote(WorkerHost, [log], needs=plan.needs)
            return
        try:
            answer = host.answer()
        except HostDied as error:
            self._lose(worker, str(error))
            return
        match worker.phase:
            case Phase.WAITING if host.node:
                worker.phase = Phase.PLACED
                if host.node not in self._relays:
                    self._relays[host.node] = self._new_relay(host.node, host.address)
            case Phase.PLACED if answer is not None:
                worker.phase, worker.pid = Phase.TRAINING, answer
                logger.info("worker %d begins on %s, pid %d", worker.number, host.address, answer)
            case Phase.TRAINING if answer is not None:
                self._end(worker, answer)
                return
        if host.is_asked:
            return
        if worker.phase is Phase.TRAINING:
            host.ask("code")
        elif self._leaving:
            self._let_go(worker, Phase.LEFT)
        elif worker.phase is Phase.PLACED and self._may_start(host.node):
            relay = self._relays[host.node].folder
            host.ask("start", plan.words, self._script_folder, relay, worker.number, plan.num_workers)

    def _may_start(self, node: str) -> bool:
        if not self._started:
            self._started = sum(w.phase is Phase.PLACED for w in self._workers) >= self._plan.min_workers
        return self._started and node in self._relays and self._relays[node].is_there

    def _let_go(self, worker: Worker, phase: Phase) -> None:
        assert worker.host is not None
        worker.host.kill()
        worker.host, worker.phase = None, phase

    def _end(self, worker: Worker, code: int) -> None:
        """The worker's process has ended, with `code`."""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._let_go(worker, Phase.LEFT if code else Phase.FINISHED)
        if code == 0:
            self._leaving = True
            logger.info("worker %d has finished", worker.number)
        elif self._leaving:
            logger.info("worker %d %s", worker.number, how)
        else:
            self._replace(worker, f"{how}; see {self._folder}/worker-{worker.number}.log")

    def _lose(self, worker: Worker, reason: str) -> None:
        """The worker's host has died, with or without its process."""
        assert worker.host is not None
        node, address = worker.host.node, worker.host.address
        trained = worker.phase is Phase.TRAINING
        worker.host, worker.phase = None, Phase.LEFT
        if node and node not in {each.id for each in nodes()}:
            logger.warning("worker %d is gone with its node %s", worker.number, address)
            worker.phase = Phase.LEFT if self._leaving else Phase.WAITING
            return
        if trained and node in self._relays:
            self._relays[node].host.tell("end_orphan", worker.pid)
        if not self._leaving:
            self._replace(worker, f"has lost its host: {reason}")

    def _replace(self, worker: Worker, why: str) -> None:
        """Lets another worker take the number, unless too many have already."""
        worker.restarts += 1
        if worker.restarts <= self._plan.max_restarts:
            worker.phase = Phase.WAITING
            logger.warning("worker %d %s. It is replaced", worker.number, why)
            return
        worker.phase = Phase.LEFT
        logger.error(
            "worker %d %s. It has been started again %d times, and is not any more",
            worker.number,
            why,
            worker.restarts - 1,
        )
        left = sum(each.phase is not Phase.LEFT for each in self._workers)
        if left < self._plan.min_workers:
            raise RuntimeError(
                f"{left} workers are left that may be started again, fewer than "
                f"min_workers={self._plan.min_workers}. The run ends, and the workers that still train save. "
                f"Worker {worker.number} {why}. Continue with --resume."
            )

    # --- servers ---

    def _new_relay(self, node: str, address: str) -> Relay:
        name = f"{self._name}-{node[:12]}"
        log = self._folder / f"relay-{address}-{node[:6]}.log"
        host = Remote(RelayHost, [self._plan.shared_memory_dir, name, self._secret, log], node)
        return Relay(host, self._plan.shared_memory_dir / f"{LAUNCH_PREFIX}{name}")

    def _tend_relay(self, node: str, relay: Relay) -> None:
        try:
            answer = relay.host.answer()
        except HostDied as error:
            if node not in {each.id for each in nodes()}:
                del self._relays[node]
                return
            relay.hosts_lost = _one_more(relay.hosts_lost, "relay", error)
            relay.host = self._new_relay(node, relay.host.address).host  # in the same folder, where the workers wait
            return
        if answer is not None:
            relay.is_there, (relay.holds_run, relay.version) = True, answer
        if not relay.host.is_asked and self._root_at:
            relay.host.ask("tend", self._root_at)

    def _tend_root(self) -> None:
        if self._root is None:
            self._place_root()
            return
        try:
            answer = self._root.answer()
        except HostDied as error:
            if self._root_node in {each.id for each in nodes()}:
                self._roots_lost = _one_more(self._roots_lost, "root", error)
            self._root = None
            return
        if answer is not None:
            self._root_port, self._root_at = answer[1], "{}:{}".format(*answer)
        if not self._root.is_asked:
            relay = self._relays.get(self._root.node)
            there = relay.folder if relay is not None and relay.holds_run else None
            self._root.ask("tend", there, max((each.version for each in self._relays.values()), default=0))

    def _place_root(self) -> None:
        """Places the root where it was, or else on a node that has a relay, one with a run if possible."""
        addresses = {each.id: each.address for each in nodes() if each.id in self._relays}
        if not addresses:
            return
        there = self._root_node in addresses
        node = self._root_node if there else max(addresses, key=lambda each: self._relays[each].holds_run)
        logger.info("the root is to be on %s", addresses[node])
        # One folder per node: where two nodes share a machine, neither finds what only the other can know.
        arguments = [self._plan.shared_memory_dir, f"{self._name}-root-{node[:12]}", self._secret]
        arguments += [self._folder / "root.log", self._folder / "root", self._root_port if there else None]
        self._root, self._root_node = Remote(RootHost, arguments, node), node

    # --- the end, and reports ---

    def _leave(self) -> None:
        """Workers save and leave, relays forward what they have, the root saves: in this order."""
        self._leaving = True
        told: list[Remote] = []
        try:
            while not self._is_over:
                for worker in self._workers:
                    try:
                        self._tend_worker(worker)
                    except RuntimeError as error:
                        logger.error("%s", error)
                        self._let_go(worker, Phase.LEFT)
                    host = worker.host
                    if worker.phase is Phase.TRAINING and host is not None and host not in told:
                        host.tell("signal", signal.SIGTERM)
                        told.append(host)
                time.sleep(TURN_SECONDS)
        except (KeyboardInterrupt, SystemExit):  # a second signal
            for host in told:
                ray.wait([host.tell("signal", signal.SIGKILL)], timeout=1.0)
            raise
        for servers in ([relay.host for relay in self._relays.values()], [self._root] if self._root else []):
            if servers:
                ray.wait([host.tell("end") for host in servers], num_returns=len(servers))

    def _report(self) -> None:
        """Logs a line about each worker that trains, and what keeps the others from training."""
        plan = self._plan
        training = [worker for worker in self._workers if worker.phase is Phase.TRAINING]
        waiting = [worker for worker in self._workers if worker.phase in (Phase.WAITING, Phase.PLACED)]
        if waiting:
            room = sum(node.places(plan.needs) for node in nodes())
            few = f"; {plan.min_workers} must begin together" if not self._started else ""
            logger.info(
                "%d of %d workers train, %d wait for a place of %s (the cluster has %d in all)%s",
                *(len(training), len(self._workers), len(waiting), plan.needs, room, few),
            )
        elif len(training) < plan.min_workers:
            logger.warning("%d workers train, fewer than min_workers=%d", len(training), plan.min_workers)
        try:
            record = self._record.read()
        except (FileNotFoundError, ValueError):
            if training and not self._misses_record:
                self._misses_record = True
                logger.info("there is no record in %s yet; it comes if that is the script's output_dir", plan.run_dir)
            return
        for worker in training:
            if points := record.points(worker.number):
                logger.info(
                    "worker %d: step %s, loss %s, anchor %s",
                    worker.number,
                    *(points[-1].get(name, "-") for name in ("step", "loss", "lsam/anchor_version")),
                )


def _one_more(lost: int, what: str, error: HostDied) -> int:
    """Counts the hosts of a server that died while their node was alive.

    Raises:
        RuntimeError: if there were too many.
    """
    logger.warning("the host of the %s is gone and is created again: %s", what, error)
    if lost + 1 == MOST_ERRORS:
        raise RuntimeError(
            f"The host of the {what} died {MOST_ERRORS} times while its node lived; the last time: {error}"
        )
    return lost + 1
