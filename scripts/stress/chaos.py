"""Fault injection: random schedules of faults on real processes, and what must hold after each.

    python scripts/stress/chaos.py --schedules 20 --seed 0

Four external workers of a server that was started manually fit a linear model, each by SGD on its own batches. A
schedule is data, printed before it runs: (worker, its local step, fault). Workers carry out their own faults, exactly
at that step:

    kill         SIGKILL to itself
    stop         SIGSTOP to itself; continued after the server must have evicted it
    nan          its parameters become NaN
    join         asks for one more worker
    kill server  SIGKILL to the server, which is started again with --resume

After each schedule: the anchor is finite; the versions that each worker saw strictly increased; the server counted no
push twice and, without a restart, every push that a worker knows to be answered; nothing is left of the run except its
snapshot and its description; the loss at the anchor is within 5 % of that of a run without faults, unless most steps
were made while a killed server was not back yet. Otherwise the exit code is 1, and the reason is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.checkpoint import load_tensors
from hf_lsam.identity import Identity
from hf_lsam.joining import Timeouts
from hf_lsam.run import Run
from hf_lsam.server.lifetime import SIGTERM_CODE, run_server
from hf_lsam.server.service import ServiceSettings
from hf_lsam.transport.ownership import is_served
from recipes.common.progress import Progress, add_quiet

FAULTS = ("kill", "stop", "nan", "join", "kill server")
WORKERS, STEPS, SYNC_STEPS, STEP_SECONDS = 4, 300, 4, 0.004
DIMENSION, ROWS, BATCH, LEARNING_RATE = 16, 512, 32, 0.02
WORKER_TIMEOUT, SERVER_TIMEOUT = 1.5, 240.0
KEPT = {"create", "lock", "parameters.json", "run.json", "snapshot.safetensors"}
# Forked, not spawned: importing torch takes longer than a schedule.
processes = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Fault:
    """What happens to `worker` when it has done `step` local steps."""

    worker: int
    step: int
    what: str


@dataclass
class Outcome:
    """What is known once all processes have ended."""

    reports: list[dict] = field(default_factory=list)  # one for each worker that reached its end
    restarts: int = 0
    loss: float = float("nan")
    failures: list[str] = field(default_factory=list)


def regression() -> tuple[Tensor, Tensor]:
    """The data, [ROWS, DIMENSION] and [ROWS]: a linear model with noise."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(ROWS, DIMENSION, generator=generator)
    return inputs, inputs @ torch.randn(DIMENSION, generator=generator) + 0.5 * torch.randn(ROWS, generator=generator)


def mean_loss(parameters: Tensor) -> float:
    inputs, targets = regression()
    return (inputs @ parameters - targets).square().mean().item()


# --- the processes ---


def serve(run_dir: Path, log: Path, resume: bool) -> None:
    """The body of a server process."""
    logging.basicConfig(filename=log, level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    run_server(run_dir, resume or None, idle_timeout=240.0)


def work(run_dir: Path, log: Path, number: int, steps: int, faults: list[Fault], pipe: Connection) -> None:
    """The body of a worker process: joins, trains `steps` local steps with its faults, leaves, reports."""
    logging.basicConfig(filename=log, level=logging.INFO, format=f"%(asctime)s [{number}] %(message)s", force=True)
    torch.set_num_threads(1)
    inputs, targets = regression()
    generator = torch.Generator().manual_seed(1000 + number)
    x = nn.Parameter(torch.zeros(DIMENSION))
    timeouts = Timeouts(ServiceSettings(WORKER_TIMEOUT, snapshot_seconds=0.05), SERVER_TIMEOUT)
    run = Run(Identity(), run_dir, log, str(run_dir), timeouts)
    try:
        server = ServerSettings(SYNC_STEPS, anchor_momentum_correction=0.0)
        worker = run.join([("x", x)], WorkerSettings(SYNC_STEPS, coupling_strength=0.4), server)
        worker.adopt_anchor()
        versions = [worker.version]
        fell_back = 0
        for step in range(steps):
            for fault in faults:
                if fault.step == step:
                    commit(fault, run_dir, x, pipe)
            batch = torch.randint(ROWS, (BATCH,), generator=generator)
            difference = inputs[batch] @ x.detach() - targets[batch]
            x.detach().sub_(inputs[batch].T @ difference, alpha=2 * LEARNING_RATE / BATCH)
            worker.after_optimizer_step([LEARNING_RATE])
            fell_back, worker.fell_back = fell_back + worker.fell_back, False
            if worker.version != versions[-1]:
                versions.append(worker.version)
            time.sleep(STEP_SECONDS)
        worker.finish()
        link = worker.link.status
        counts = {"accepted": link.accepted, "refused": link.refused, "skipped": worker.skipped_pushes}
        increasing = all(later > earlier for earlier, later in itertools.pairwise(versions))
        report = {"worker": number, "process": worker.link.process, "fell_back": fell_back, "increasing": increasing}
        pipe.send(("report", {**report, **counts, "version": worker.version}))
    finally:
        run.leave()


def commit(fault: Fault, run_dir: Path, x: nn.Parameter, pipe: Connection) -> None:
    """Carries out `fault`."""
    if fault.what == "nan":
        x.detach().fill_(float("nan"))
        return
    if fault.what == "kill server":
        record = run_dir / "server.json"
        if is_served(run_dir) and record.exists():
            with suppress(ProcessLookupError):  # another worker has just killed it
                os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        return
    pipe.send((fault.what, os.getpid()))
    if fault.what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


# --- a run ---


class Cluster:
    """The processes of one run: a server in `folder`, started again whenever it is killed, and its external workers."""

    def __init__(self, folder: Path, log: Path):
        self.folder = folder
        self.log = log
        self.workers: dict[Connection, multiprocessing.Process] = {}
        self.restarts = 0
        self._numbers = 0
        self._to_continue: list[tuple[float, int]] = []
        self._start_server(resume=False)

    def _start_server(self, resume: bool) -> None:
        self.server = processes.Process(target=serve, args=(self.folder, self.log, resume), name="server")
        self.server.start()
        while not is_served(self.folder) and self.server.is_alive():
            time.sleep(0.01)

    def start_worker(self, faults: list[Fault] = (), steps: int = STEPS) -> multiprocessing.Process:
        near, far = processes.Pipe()
        arguments = (self.folder, self.log, self._numbers, steps, list(faults), far)
        worker = processes.Process(target=work, args=arguments, name=f"worker-{self._numbers}")
        self._numbers += 1
        worker.start()
        far.close()
        self.workers[near] = worker
        return worker

    def look_after(self, timeout: float = 0.05) -> list[dict]:
        """Waits a moment, does what workers ask for, and restarts a killed server; returns the reports received."""
        reports = []
        for pipe in wait(list(self.workers), timeout=timeout):
            try:
                what, value = pipe.recv()
            except EOFError:
                self.workers.pop(pipe).join()
                pipe.close()
                continue
            if what == "report":
                reports.append(value)
            elif what == "join":
                self.start_worker()
            elif what == "stop":
                self._to_continue.append((time.monotonic() + WORKER_TIMEOUT + 1.0, value))
        now = time.monotonic()
        for due, pid in [entry for entry in self._to_continue if entry[0] <= now]:
            self._to_continue.remove((due, pid))
            os.kill(pid, signal.SIGCONT)
        if self.server.exitcode is not None and self.workers:
            self.restarts += 1
            self._start_server(resume=True)
        return reports

    def end(self) -> int:
        """Ends the server as a user would; returns its exit code."""
        self.server.terminate()
        self.server.join(60)
        if self.server.is_alive():
            self.server.kill()
            self.server.join()
        return self.server.exitcode

    def kill_all(self) -> None:
        """Kills all processes, so that none is left behind whatever went wrong."""
        for process in (*self.workers.values(), self.server):
            if process.is_alive():
                process.kill()
            process.join()


def run_schedule(schedule: list[Fault], limit: float = 600.0) -> Outcome:
    """Runs one schedule and checks what must hold after it."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="hf_lsam-chaos-") as scratch:
        folder, log = Path(scratch) / "run", Path(scratch) / "log"
        cluster = Cluster(folder, log)
        try:
            for number in range(WORKERS):
                cluster.start_worker([fault for fault in schedule if fault.worker == number])
            deadline = time.monotonic() + limit
            while cluster.workers:
                outcome.reports += cluster.look_after()
                if time.monotonic() > deadline:
                    left = [process.name for process in cluster.workers.values()]
                    outcome.failures.append(f"{left} did not end; the log:\n{log.read_text()}")
                    return outcome
            outcome.restarts = cluster.restarts
            check(outcome, cluster, schedule)
        finally:
            cluster.kill_all()
        if outcome.failures:
            outcome.failures.append(log.read_text())
    return outcome


def check(outcome: Outcome, cluster: Cluster, schedule: list[Fault]) -> None:
    """Ends the server, and adds every violation to `outcome.failures`."""

    def require(ok: bool, what: str) -> None:
        if not ok:
            outcome.failures.append(what)

    code = cluster.end()
    require(code == SIGTERM_CODE, f"the server ended with code {code}")
    left = {path.name for path in cluster.folder.iterdir()} - KEPT
    require(not left, f"left in the run folder: {sorted(left)}")
    state = load_tensors(cluster.folder / "snapshot.safetensors")
    require(bool(state["anchor"].isfinite().all()), "the anchor is not finite")
    killed = sum(fault.what == "kill" for fault in schedule)
    joined = sum(fault.what == "join" for fault in schedule)
    expected = WORKERS + joined - killed
    require(len(outcome.reports) == expected, f"{len(outcome.reports)} workers reached their end, not {expected}")
    counted = dict(state["counted"].tolist())
    handled, numbered = int(state["pushes"].sum()), sum(counted.values())
    require(handled <= numbered, f"{handled} pushes were counted, {numbered} were handed in")
    for report in outcome.reports:
        require(report["increasing"], f"worker {report['worker']} saw versions that did not increase")
    if not outcome.restarts:  # what was counted after the last snapshot before a kill is lost with that server
        require(handled == numbered, f"{handled} pushes were counted, {numbered} were handed in")
        for report in outcome.reports:
            answered = report["accepted"] + report["refused"]
            require(counted.get(report["process"]) == answered, f"worker {report['worker']} knows of {answered} pushes")
    outcome.loss = mean_loss(state["anchor"])


def judge(outcome: Outcome, baseline: float) -> str:
    """Adds to `outcome.failures` if the loss is too far above that of a run without faults; if there is an excuse,
    returns that instead."""
    if outcome.loss <= 1.05 * baseline:
        return ""
    accepted = sum(report["accepted"] for report in outcome.reports)
    above = f"loss {outcome.loss:.4f}, without faults {baseline:.4f}"
    if outcome.restarts and accepted < possible_pushes(outcome) / 2:  # a restart took longer than the remaining steps
        return f" ({above}: most steps fell into the time without a server)"
    outcome.failures.append(above)
    return ""


def possible_pushes(outcome: Outcome) -> int:
    """How many pushes the workers that reached their end could have made."""
    return len(outcome.reports) * (STEPS // SYNC_STEPS)


def random_schedule(generator: random.Random) -> list[Fault]:
    """Two to four faults. Worker 0 is never killed, so that at least one worker reaches its end; none dies twice."""
    faults: list[Fault] = []
    for _ in range(generator.randint(2, 4)):
        what = generator.choice(FAULTS)
        doomed = {fault.worker for fault in faults if fault.what == "kill"}
        worker = generator.choice([n for n in range(1 if what == "kill" else 0, WORKERS) if n not in doomed])
        begin = max((fault.step + 1 for fault in faults if fault.worker == worker), default=20)
        faults.append(Fault(worker, generator.randrange(begin, begin + 60), what))
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    add_quiet(parser)
    arguments = parser.parse_args()
    torch.optim.SGD([torch.zeros(1)])  # loads what every forked server would otherwise have to load
    generator = random.Random(arguments.seed)
    baseline = run_schedule([])
    failed = bool(baseline.failures)
    with Progress(arguments.schedules, "schedules", arguments.quiet) as progress:
        progress.say(f"without faults: loss {baseline.loss:.4f} {baseline.failures}")
        for number in range(arguments.schedules):
            schedule = random_schedule(generator)
            progress.say(f"schedule {number}: {json.dumps([asdict(fault) for fault in schedule])}")
            begin = time.monotonic()
            outcome = run_schedule(schedule)
            reason = judge(outcome, baseline.loss)
            accepted = sum(report["accepted"] for report in outcome.reports)
            failed = failed or bool(outcome.failures)
            said = [
                f"  {'FAILED' if outcome.failures else 'held'}: loss {outcome.loss:.4f}, {len(outcome.reports)} ended, "
                f"{accepted} of {possible_pushes(outcome)} pushes of theirs accepted, {outcome.restarts} restarts, "
                f"{time.monotonic() - begin:.1f} s{reason}",
                *outcome.failures,
            ]
            progress.say("\n    ".join(said))
            progress.advance()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
