"""What happens when something dies, hangs, fills up or lies: faults are scheduled as data and carried out for real."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launch import PATHS, TIMEOUT, accelerate_launch, wait_until, write_script
from lockstep import SYNC_STEPS, LockstepProblem, digest, initial_parameters
from models import arguments, blobs, net, vector
from torch import nn
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.checkpoint import SEAL, SERVER_STATE, is_sealed, load_tensors, newest_sealed, save_tensors, seal
from hf_lsam.identity import Identity
from hf_lsam.joining import Timeouts
from hf_lsam.parameters import ParameterLayout
from hf_lsam.run import Run
from hf_lsam.server import service
from hf_lsam.server.core import ServerCore
from hf_lsam.server.lifetime import run_server
from hf_lsam.transport.base import RefusedError, ServerGone
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.transport.messages import ANY_NUMBER, Snapshot
from hf_lsam.transport.ownership import dead_launches, is_served, make_launch_folder
from hf_lsam.transport.shared_memory import SharedMemoryLink
from hf_lsam.worker import Worker
from scripts.stress import chaos
from scripts.stress.chaos import Cluster, Fault, processes, run_schedule

# Forked children run neither autograd nor threads of the parent.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CPU = torch.device("cpu")
NUMEL = 5
SETTINGS = ServerSettings(sync_steps=4, anchor_momentum_correction=0.0)


@pytest.fixture(autouse=True, scope="module")
def optimizers_are_loaded():
    """What a forked server would otherwise load by itself, for seconds."""
    torch.optim.SGD([torch.zeros(1)])


@pytest.fixture(autouse=True)
def signal_handlers_stay():
    """`run_server` sets those of its process, which a test may call it in."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# --- external workers: scripts/stress/chaos.py's workers, one schedule each ---


def outcome_of(*faults: Fault) -> chaos.Outcome:
    outcome = run_schedule(list(faults))
    assert outcome.failures == []
    return outcome


def test_an_external_worker_that_is_killed_is_dropped_and_each_push_is_counted_once():
    outcome = outcome_of(Fault(2, 70, "kill"), Fault(0, 100, "join"))
    assert sorted(report["worker"] for report in outcome.reports) == [0, 1, 3, 4]
    assert outcome.restarts == 0  # so `run_schedule` has compared every worker's count with the server's


def test_an_external_worker_that_hangs_is_evicted_and_begins_again_when_it_wakes():
    outcome = outcome_of(Fault(2, 70, "stop"))
    assert len(outcome.reports) == 4
    stopped = next(report for report in outcome.reports if report["worker"] == 2)
    assert stopped["fell_back"] >= 1


def test_fifty_steps_of_nan_are_refused_and_counted_and_the_worker_begins_again():
    outcome = outcome_of(*(Fault(1, step, "nan") for step in range(40, 90)))
    broken = next(report for report in outcome.reports if report["worker"] == 1)
    assert broken["refused"] >= 3
    assert broken["fell_back"] >= 1
    assert math.isfinite(outcome.loss)
    assert all(report["refused"] == 0 for report in outcome.reports if report["worker"] != 1)


def test_external_workers_outlive_a_server_that_is_killed_and_started_again():
    outcome = outcome_of(Fault(0, 50, "kill server"), Fault(3, 120, "kill server"))
    assert outcome.restarts == 2
    assert len(outcome.reports) == 4


def test_ten_random_schedules_end_as_a_run_without_faults_does():
    baseline = outcome_of()
    generator = random.Random(11)
    for _ in range(10):
        schedule = chaos.random_schedule(generator)
        outcome = run_schedule(schedule)
        chaos.judge(outcome, baseline.loss)
        assert outcome.failures == [], schedule


def test_the_place_of_a_dead_external_worker_is_taken_by_a_new_one_that_begins_at_the_anchor(tmp_path):
    cluster = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        cluster.start_worker([Fault(0, 30, "kill")])
        while cluster.workers:
            cluster.look_after()
        run, worker = join_by_address(cluster.folder, chaos.DIMENSION, chaos.SYNC_STEPS)
        worker.adopt_anchor()
        assert worker.link.worker == 0
        assert worker.version > 0
        folder = RunFolder(cluster.folder)
        assert torch.equal(worker.own_parameters, folder.slot(worker.version))
        assert [path.name for path in cluster.folder.glob("mailbox_*")] == ["mailbox_1"]
        run.leave()
        cluster.end()
    finally:
        cluster.kill_all()
    assert "worker 0 is gone" in (tmp_path / "log").read_text()


def test_an_external_worker_that_comes_before_its_server_waits_for_it(tmp_path, caplog):
    folder, results = tmp_path / "run", []
    folder.mkdir()

    def body():
        try:
            run, worker = join_by_address(folder, 3, 4)
            results.append(worker.link.worker)
            run.leave()
        except ServerGone as error:
            results.append(error)

    with caplog.at_level(logging.INFO, "hf_lsam.joining"):
        external = threading.Thread(target=body)
        external.start()
        wait_until(lambda: "waiting for a server in server_address=" in caplog.text or results)
    cluster = Cluster(folder, tmp_path / "log")
    try:
        external.join()
        assert results == [0]
    finally:
        cluster.end()
        cluster.kill_all()


def join_by_address(folder: Path, numel: int, sync_steps: int, **timeouts) -> tuple[Run, Worker]:
    """Joins the run in `folder` from the test's own process, with the settings of chaos.py's workers."""
    run = Run(Identity(), folder, folder / "log", str(folder), Timeouts(**{"server_timeout": TIMEOUT, **timeouts}))
    settings = ServerSettings(sync_steps, anchor_momentum_correction=0.0)
    try:
        worker = run.join([("x", nn.Parameter(torch.zeros(numel)))], WorkerSettings(sync_steps), settings)
    except BaseException:
        run.leave()
        raise
    return run, worker


def test_an_external_worker_with_other_settings_or_without_a_server_is_refused(tmp_path):
    with pytest.raises(ServerGone, match=r"No server runs in .*python -m hf_lsam\.server --run_dir"):
        join_by_address(tmp_path, 3, 4, server_timeout=0.1)
    cluster = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        run, _ = join_by_address(cluster.folder, 3, 4)
        with pytest.raises(RefusedError, match="sync_steps is 8 here and 4 in the run"):
            join_by_address(cluster.folder, 3, 8)
        with pytest.raises(RefusedError, match=r"This worker's trainable.*`x` \[4\]"):
            join_by_address(cluster.folder, 4, 4)
        run.leave()
        assert cluster.end() == 143
    finally:
        cluster.kill_all()


def test_a_second_server_in_a_folder_is_refused_with_the_firsts_run_and_pid(tmp_path):
    cluster = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        record = cluster.folder / "server.json"
        while not record.exists():
            time.sleep(0.01)
        owner = json.loads(record.read_text())
        assert owner["pid"] == cluster.server.pid
        with pytest.raises(RuntimeError, match=rf"served already, by run {owner['run']}, pid {owner['pid']}"):
            run_server(cluster.folder)
    finally:
        cluster.end()
        cluster.kill_all()


def test_a_server_by_hand_keeps_its_snapshot_and_goes_on_from_it(tmp_path):
    first = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        first.start_worker(steps=40)
        while first.workers:
            first.look_after()
        before = RunFolder(first.folder).version
        assert first.end() == 143
        assert {path.name for path in first.folder.iterdir()} == chaos.KEPT
        with pytest.raises(RuntimeError, match=r"holds the anchor of another run.*--resume"):
            run_server(first.folder)
        state = load_tensors(first.folder / "snapshot.safetensors")
        unfinished = first.folder / ".snapshot.safetensors.1"  # of a server that was killed while it saved
        unfinished.mkdir()
        (unfinished / "snapshot.safetensors").touch()
        first._start_server(resume=True)
        run, worker = join_by_address(first.folder, chaos.DIMENSION, chaos.SYNC_STEPS)
        assert not unfinished.exists()
        assert worker.version > before > 0
        assert torch.equal(worker.anchor, state["anchor"])
        run.leave()
        first.end()
    finally:
        first.kill_all()
    snapshot = first.folder / "snapshot.safetensors"
    snapshot.write_bytes(snapshot.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run_server(first.folder, True)
    for path in [snapshot, *first.folder.glob("anchor_*"), first.folder / "version"]:
        path.unlink()
    with pytest.raises(RuntimeError, match="neither an anchor nor a snapshot"):
        run_server(first.folder, True)


# --- the server of a launch, started again in the same folder ---


class Served:
    """A launch of one worker whose server is a forked process and whose link is in the test's own."""

    def __init__(self, tmp_path: Path, numel: int = NUMEL, limit: int | None = None, **service):
        self.layout = ParameterLayout([("w", torch.zeros(numel))])
        self.path, self.log, self.limit = tmp_path / "run", tmp_path / "log", limit
        self.path.mkdir()
        run = {"fingerprint": self.layout.fingerprint.hex(), "settings": SETTINGS.as_dict(), "service": service}
        self.folder = RunFolder.create(self.path, torch.zeros(numel), 1, self.layout.manifest, run)
        self.start(None)

    def start(self, resume: bool | None) -> None:
        def body():
            logging.basicConfig(filename=self.log, level=logging.INFO, force=True)
            if self.limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
            run_server(self.path, resume)

        self.server = processes.Process(target=body)
        self.server.start()
        while not is_served(self.path) and self.server.is_alive():
            time.sleep(0.01)

    def join(self, **options) -> SharedMemoryLink:
        return SharedMemoryLink(self.folder, 0, self.layout, CPU, server_timeout=TIMEOUT, **options)

    def kill(self) -> None:
        self.server.kill()
        self.server.join()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_) -> None:
        self.server.join(TIMEOUT)
        self.kill()
        self.folder.remove()


def finish(link: SharedMemoryLink) -> torch.Tensor:
    final = torch.empty(NUMEL)
    link.finish(False, -1, final)
    link.close()
    return final


def test_a_push_that_a_killed_server_had_not_counted_is_handed_in_again(tmp_path):
    with Served(tmp_path) as run:
        link = run.join()
        link.push(torch.ones(NUMEL) * 4, 4, 0)
        link.settle()
        assert link.snapshot(tmp_path / "first.safetensors")
        os.kill(run.server.pid, signal.SIGSTOP)
        link.push(torch.ones(NUMEL) * 12, 4, 1)
        link.poll(1, torch.empty(NUMEL))  # sends the frame, which nobody reads
        run.kill()
        assert link.poll(1, torch.empty(NUMEL)) is None
        assert not link.status.connected
        run.start(True)
        link.settle()
        assert link.status.accepted == 2
        assert finish(link).tolist() == [4.0] * NUMEL  # 1 + 12 / 4, neither 1 nor 7
        assert load_tensors(tmp_path / "first.safetensors")["counted"].tolist() == [[link.process, 1]]


def test_a_push_that_a_killed_server_had_counted_and_not_answered_is_not_handed_in_again(tmp_path):
    with Served(tmp_path) as run:
        link = run.join()
        link.push(torch.ones(NUMEL) * 4, 4, 0)
        link._progress(0.0)
        while run.folder.version == 0:  # it is counted; its answer is not read
            time.sleep(0.01)
        while link._send(Snapshot()) and not snapshot_holds(run, link):
            time.sleep(0.01)
        link._lose_server()  # and is lost with the connection
        run.kill()
        run.start(True)
        link.settle()
        assert link.status.accepted == 1
        assert finish(link).tolist() == [1.0] * NUMEL


def test_a_server_that_dies_while_its_worker_evaluates_is_started_again(tmp_path):
    with Served(tmp_path) as run:
        died = run.server

        def revive() -> None:
            if not died.is_alive() and run.server is died:
                run.start(True)

        link = run.join(revive=revive)
        link.push(torch.ones(NUMEL) * 4, 4, 0)
        link.settle()
        assert link.snapshot(tmp_path / "state.safetensors")
        os.kill(died.pid, signal.SIGKILL)
        wait_until(lambda: run.server is not died)  # nobody polls the link
        link.push(torch.ones(NUMEL) * 12, 4, 1)
        link.settle()
        assert finish(link).tolist() == [4.0] * NUMEL


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_is_told_to_end_stays_for_a_worker_of_the_launch_that_still_saves(tmp_path, monkeypatch, silent):
    monkeypatch.setattr(service, "GRACE_SECONDS", 1.5)  # heartbeats come every second
    with Served(tmp_path) as run:
        link = run.join()
        os.kill(run.server.pid, signal.SIGTERM)
        while not link.status.save_requested:
            link.poll(0, torch.empty(NUMEL))
        if silent:  # and then it does not stay for ever
            link._left.set()
            run.server.join(TIMEOUT)
            assert run.server.exitcode is not None
            link.close()
        else:
            time.sleep(3)
            assert link.snapshot(tmp_path / "state.safetensors")
            finish(link)


def snapshot_holds(run: Served, link: SharedMemoryLink) -> bool:
    path = run.folder.snapshot_path
    return path.exists() and load_tensors(path)["counted"].tolist() == [[link.process, 1]]


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_versions_go_on_above_all_that_were_published(tmp_path, with_snapshot):
    with Served(tmp_path, snapshot_seconds=0.0) as run:
        link = run.join()
        for count in range(5):
            if with_snapshot and count == 2:
                link.snapshot(tmp_path / "state.safetensors")
            link.push(torch.ones(NUMEL) * 4, 4, count)
            link.settle()
        assert run.folder.version == 5
        run.kill()
        run.start(True)
        held = torch.empty(NUMEL)
        while (version := link.poll(5, held)) is None:
            time.sleep(0.01)
        assert version > 5
        assert held.tolist() == [2.0 if with_snapshot else 5.0] * NUMEL
        link.push(torch.ones(NUMEL) * 4, 4, version)
        link.settle()
        finish(link)
        assert run.folder.version == version + 1


def test_a_server_killed_while_it_publishes_leaves_the_last_anchor_readable(tmp_path):
    with Served(tmp_path, snapshot_seconds=0.0) as run:
        link = run.join()
        link.push(torch.ones(NUMEL) * 4, 4, 0)
        link.settle()
        run.kill()
        run.folder._version[1] = 2  # it had begun version 2
        run.folder._slots[0].fill_(math.nan)
        held = torch.empty(NUMEL)
        assert link.poll(0, held) == 1
        assert held.tolist() == [1.0] * NUMEL
        run.start(True)
        while (version := link.poll(1, held)) is None:
            time.sleep(0.01)
        assert version == 4  # not 3, whose slot held version 1, the only one that could be read
        assert finish(link).tolist() == [1.0] * NUMEL


def test_an_external_worker_of_a_launch_is_asked_to_stop_when_the_launch_has_finished(tmp_path):
    with Served(tmp_path) as run:
        link = run.join()
        external = SharedMemoryLink(run.folder, ANY_NUMBER, run.layout, CPU, server_timeout=TIMEOUT)
        assert external.worker == 1
        for who in (link, external):
            who.push(torch.ones(NUMEL) * 4, 4, 0)
            who.settle()
        assert run.folder.version == 1  # n = 2
        results = []
        waiting = threading.Thread(target=lambda: results.append(finish(link)))
        waiting.start()
        while not external.status.stop_requested:
            external.poll(1, torch.empty(NUMEL))
        external.push(torch.ones(NUMEL) * 4, 4, 1)  # of the steps it made meanwhile
        external.settle()
        results.append(finish(external))
        waiting.join()
        assert [result.tolist() for result in results] == [[2.0] * NUMEL] * 2


def test_a_worker_of_a_launch_that_ends_with_an_error_does_not_harm_an_external_one_nor_that_one_the_others(tmp_path):
    with Served(tmp_path) as run:
        link = run.join()
        first, second = (SharedMemoryLink(run.folder, ANY_NUMBER, run.layout, CPU) for _ in range(2))
        first.close(failed=True)
        while "worker 1 is gone" not in run.log.read_text():
            link.poll(0, torch.empty(NUMEL))
        link.push(torch.ones(NUMEL) * 4, 4, 0)
        link.settle()
        link.close(failed=True)
        while not second.status.save_requested:
            second.poll(0, torch.empty(NUMEL))
        finish(second)
    assert "worker 0 ended with an error, which ends the launch" in run.log.read_text()


# --- a full disk, a damaged file ---


def test_a_server_without_room_for_its_snapshot_says_so_and_goes_on(tmp_path):
    numel = 100_000
    with Served(tmp_path, numel, limit=6 * numel) as run:  # a mailbox fits, two vectors in one file do not
        link = run.join()
        with pytest.raises(OSError, match="could not write its snapshot"):
            link.snapshot(tmp_path / "state.safetensors")
        link.push(torch.ones(numel), 1, 0)
        link.settle()
        assert link.status.accepted == 1
        link.finish(False, -1, torch.empty(numel))
        link.close()
    assert "snapshot not written" in run.log.read_text()


def test_a_server_without_room_for_a_mailbox_refuses_the_worker(tmp_path):
    numel = 100_000
    with Served(tmp_path, numel, limit=2 * numel) as run:
        with pytest.raises(RefusedError, match=r"no room for one more mailbox of 0\.4 MiB"):
            run.join()
        run.kill()


def test_a_save_that_finds_the_disk_full_is_an_error_and_the_old_file_stands(tmp_path):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"x": torch.ones(1000)})

    def body():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            save_tensors(path, {"x": torch.zeros(100_000)})
        except OSError:
            os._exit(3)

    saver = processes.Process(target=body)
    saver.start()
    saver.join()
    assert saver.exitcode == 3
    assert torch.equal(load_tensors(path)["x"], torch.ones(1000))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_folder_that_cannot_be_written_is_an_error_before_the_save():
    with pytest.raises(OSError, match="/proc/nowhere"):
        save_tensors(Path("/proc/nowhere/state.safetensors"), {"x": torch.ones(3)})


def test_a_file_cut_at_any_length_or_with_any_byte_changed_does_not_load(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    save_tensors(whole, {"x": torch.randn(50), "n": torch.tensor(3)})
    data = whole.read_bytes()
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="resume from an older checkpoint"):
            load_tensors(cut)
    header = 8 + int.from_bytes(data[:8], "little")
    for position in range(header, len(data)):
        cut.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match="checksum does not match"):
            load_tensors(cut)


def test_a_saver_killed_at_any_instant_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.safetensors"
    numel = 200_000

    def save_for_ever(has_saved):
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        for value in itertools.count(1):
            save_tensors(path, {"x": torch.full((numel,), float(value)), "value": torch.tensor(value)})
            has_saved.set()

    generator = random.Random(5)
    for _ in range(25):
        has_saved = processes.Event()
        saver = processes.Process(target=save_for_ever, args=[has_saved])
        saver.start()
        assert has_saved.wait(TIMEOUT)
        saver.join(generator.uniform(0.0, 0.05))
        saver.kill()
        saver.join()
        state = load_tensors(path)
        assert torch.equal(state["x"], torch.full((numel,), float(state["value"])))
    # What is left of the killed ones lies under a name that tells whose it was: a server removes what another left.
    assert all(left.match(".state.safetensors.*") for left in tmp_path.iterdir() if left != path)


def test_only_a_checkpoint_that_is_complete_is_taken_for_the_newest(tmp_path):
    for number in (2, 10):
        folder = tmp_path / f"checkpoint-{number}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "weights").write_bytes(bytes(100))
        (folder / f"{SEAL}.partial").write_text("{")  # a process was killed while it sealed this folder
        seal(folder)
    assert newest_sealed(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_sealed(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10" / "adapter" / "weights").write_bytes(bytes(99))
    assert not is_sealed(tmp_path / "checkpoint-10")
    assert newest_sealed(tmp_path) == tmp_path / "checkpoint-2"
    assert newest_sealed(tmp_path / "checkpoint-2") is None


def test_whether_a_launch_is_dead_can_be_asked_while_it_removes_its_folder(tmp_path, monkeypatch):
    folder, lock = make_launch_folder(tmp_path)
    lock.close()
    assert dead_launches(tmp_path) == [folder]
    look = Path.stat

    def removed_after_the_first_look(path: Path, **options):
        found = look(path, **options)
        if path == folder / "launch":
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(Path, "stat", removed_after_the_first_look)
    dead_launches(tmp_path)


# --- resume ---


def test_a_run_that_stops_and_resumes_ends_with_the_bits_of_one_that_did_not(tmp_path):
    """The arrival order is replayed; all state goes through files."""
    orders = [[0, 1, 2], [2, 0, 1], [1, 1, 0], [2, 1, 0], [0, 2, 1], [1, 2, 2]]

    def build():
        initial = torch.cat([p.detach().flatten() for p in initial_parameters()])
        core = ServerCore(initial, ServerSettings(SYNC_STEPS, 0.7, 0.3, "nesterov", 0.5))
        problems = [LockstepProblem(rank) for rank in range(3)]
        workers = [
            p.make_worker(InProcessLink(core, rank), WorkerSettings(SYNC_STEPS)) for rank, p in enumerate(problems)
        ]
        return core, problems, workers

    def advance(problems, workers, orders):
        for order in orders:
            for rank in order:
                problems[rank].run_period(workers[rank])
            for worker in workers:
                worker.pull_newest()

    def digests(problems, workers):
        return [digest(problem.parameters, worker.anchor) for problem, worker in zip(problems, workers, strict=True)]

    _, problems, workers = build()
    advance(problems, workers, orders)
    expected = digests(problems, workers)

    core, problems, workers = build()
    advance(problems, workers, orders[:3])
    save_tensors(tmp_path / "server", core.state_tensors())
    for rank, (problem, worker) in enumerate(zip(problems, workers, strict=True)):
        momentum = {str(i): problem.optimizer.state[p]["momentum_buffer"] for i, p in enumerate(problem.parameters)}
        save_tensors(tmp_path / f"worker{rank}", worker.state_tensors())
        save_tensors(tmp_path / f"own{rank}", {**momentum, "random": problem.generator.get_state()})

    core, problems, workers = build()
    core.load_state_tensors(load_tensors(tmp_path / "server"))
    for rank, (problem, worker) in enumerate(zip(problems, workers, strict=True)):
        worker.load_state_tensors(load_tensors(tmp_path / f"worker{rank}"))
        own = load_tensors(tmp_path / f"own{rank}")
        problem.generator.set_state(own.pop("random"))
        for index, parameter in enumerate(problem.parameters):
            problem.optimizer.state[parameter]["momentum_buffer"] = own[str(index)]
    advance(problems, workers, orders[3:])
    assert digests(problems, workers) == expected


# --- Trainer ---


class At(TrainerCallback):
    """Does something once a local step is done."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == self.step:
            self.action()


def test_a_trainer_whose_server_stays_away_saves_and_ends_with_an_error(tmp_path):
    cluster = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        kill = At(5, cluster.kill_all)
        fields = {"server_address": str(tmp_path / "run"), "server_timeout": 0.3, "sync_steps": 2}
        args = arguments(LSAMConfig, tmp_path / "out", max_steps=1_000_000, logging_steps=1000, **fields)
        trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[kill])
        with pytest.raises(ServerGone, match="resume from the last checkpoint"):
            trainer.train()
    finally:
        cluster.kill_all()
    checkpoint = newest_sealed(tmp_path / "out")
    assert checkpoint.name == f"checkpoint-{trainer.state.global_step}"
    saved = load_tensors(checkpoint / "lsam_worker.safetensors")
    assert torch.equal(saved["anchor"], trainer.worker.anchor)
    args = arguments(LSAMConfig, tmp_path / "out", max_steps=trainer.state.global_step + 4, sync_steps=2)
    resumed = LSAMTrainer(model=net(1), args=args, train_dataset=blobs())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == trainer.state.global_step + 4
    assert resumed.worker.local_steps == trainer.worker.local_steps + 4
    assert vector(resumed.model).isfinite().all()


def test_a_worker_killed_at_any_instant_of_its_saves_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    """With room for one checkpoint only, killed at each flush to the disk and at each deletion in turn."""

    def save_until(instant: int):
        first_is_whole = threading.Event()
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        count = itertools.count(1)

        def deadly(action):
            def act(*positional, **keywords):
                if first_is_whole.is_set() and next(count) == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                return action(*positional, **keywords)

            return act

        monkeypatch.setattr(os, "fsync", deadly(os.fsync))
        monkeypatch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
        args = arguments(LSAMConfig, tmp_path / str(instant), **fields)
        begin = At(2, first_is_whole.set)
        LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[begin]).train()
        os._exit(0)

    for instant in itertools.count(1):
        saver = processes.Process(target=save_until, args=[instant])
        saver.start()
        saver.join()
        left = newest_sealed(tmp_path / str(instant))
        assert left is not None, instant
        assert load_tensors(left / "lsam_worker.safetensors")["parameters"].isfinite().all()
        if saver.exitcode == 0:
            break
        assert saver.exitcode == -signal.SIGKILL
    assert instant > 10
    assert left.name == "checkpoint-2"
    assert [path.name for path in left.parent.glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_trainer_at_the_next_step_with_a_checkpoint(tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    args = arguments(LSAMConfig, tmp_path, max_steps=1_000_000)
    strike = At(5, lambda: os.kill(os.getpid(), number))
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[strike])
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as error:
        trainer.train()
    assert number == signal.SIGINT or error.value.code == 143
    assert newest_sealed(tmp_path).name == "checkpoint-5"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_server_that_is_told_to_end_has_its_workers_save_and_leave(tmp_path):
    cluster = Cluster(tmp_path / "run", tmp_path / "log")
    try:
        args = arguments(LSAMConfig, tmp_path / "out", max_steps=1_000_000, server_address=str(tmp_path / "run"))
        strike = At(5, cluster.server.terminate)
        trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[strike])
        trainer.train()
        cluster.server.join()
        assert cluster.server.exitcode == 143
    finally:
        cluster.kill_all()
    assert newest_sealed(tmp_path / "out").name == f"checkpoint-{trainer.state.global_step}"
    assert {path.name for path in cluster.folder.iterdir()} == chaos.KEPT


def test_a_server_without_room_for_its_snapshot_costs_a_checkpoint_its_state_and_no_training(tmp_path):
    cluster = Cluster(tmp_path / "run", tmp_path / "log")

    def limit(size: int):
        return lambda: resource.prlimit(cluster.server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    try:
        fields = {"max_steps": 8, "sync_steps": 2, "save_strategy": "steps", "save_steps": 4}
        args = arguments(LSAMConfig, tmp_path / "out", server_address=str(tmp_path / "run"), **fields)
        callbacks = [At(3, limit(1000)), At(6, limit(resource.RLIM_INFINITY))]
        LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=callbacks).train()
    finally:
        cluster.kill_all()
    full, roomy = (tmp_path / "out" / f"checkpoint-{step}" for step in (4, 8))
    assert is_sealed(full)
    assert not (full / SERVER_STATE).exists()
    assert is_sealed(roomy)
    assert (roomy / SERVER_STATE).exists()


READ_ONLY = """
import sys

from models import arguments, blobs, net

from hf_lsam import LSAMConfig, LSAMTrainer

for strategy in ("no", "steps"):
    args = arguments(LSAMConfig, sys.argv[1], max_steps=2, save_strategy=strategy, save_steps=2)
    LSAMTrainer(model=net(), args=args, train_dataset=blobs()).train()
    print("trained with", strategy)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_an_output_dir_that_cannot_be_written_is_an_error_before_training(tmp_path):
    script, folder = write_script(tmp_path / "script.py", READ_ONLY), tmp_path / "out"
    folder.mkdir()
    inside = 'mount -t tmpfs -o ro tmpfs "$1" && exec "$2" "$3" "$1"'
    command = ["unshare", "-m", "sh", "-c", inside, "sh", str(folder), sys.executable, str(script)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, check=False)
    assert "trained with no" in run.stdout
    assert "trained with steps" not in run.stdout
    assert f"Nothing can be written to output_dir={folder}" in run.stderr
    assert "'loss'" in run.stdout.partition("trained with no")[0]
    assert "'loss'" not in run.stdout.partition("trained with no")[2]


LAUNCHED = """
import json, os, signal, sys, time
from pathlib import Path

from models import arguments, blobs, net, vector
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, FAULT, RANK = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
# Of one launch with --max_restarts, or of two: nobody begins before all have come this far.
ATTEMPT = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) or int((OUT / "begin0.0").exists())


class Strike(TrainerCallback):
    def on_train_begin(self, args, state, control, **keywords):
        (OUT / f"begin{RANK}.{ATTEMPT}").write_text(str(state.global_step))

    def on_step_end(self, args, state, control, **keywords):
        while FAULT == "server" and state.global_step == 20 and "resumed the run" not in SERVER_LOG.read_text():
            time.sleep(0.01)
        if state.global_step != 7 or ATTEMPT:
            return
        if FAULT == "worker" and RANK == 1:
            while not (OUT / "run" / "checkpoint-4" / "lsam_complete.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "server" and RANK == 1:
            record = next((OUT / "shared").glob("*/server.json"))
            os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
        if FAULT in ("launcher", "launcher, worker 0 saves last") and RANK == 1:
            while not (OUT / "begin0.0").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGTERM)
        if FAULT == "launcher, worker 0 waits" and RANK == 1:
            while "worker 0 finished" not in SERVER_LOG.read_text():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGTERM)
        if FAULT == "long evaluation" and RANK == 0:
            time.sleep(2.5 * TIMEOUT)
        if FAULT == "long evaluation" and RANK == 1:
            while "evicted" not in SERVER_LOG.read_text() and not (OUT / "evaluated").exists():
                time.sleep(0.01)
        if FAULT == "long evaluation" and RANK == 0:
            (OUT / "evaluated").touch()
        if FAULT.startswith("frozen") and RANK == 0:
            (OUT / "frozen").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        if FAULT == "frozen" and RANK == 1:
            while "worker 0 is gone" not in SERVER_LOG.read_text():
                time.sleep(0.01)
            os.kill(int((OUT / "frozen").read_text()), signal.SIGCONT)
        if FAULT == "all" and RANK == 1:
            record = next((OUT / "shared").glob("*/server.json"))
            launcher = os.getppid()
            workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            for process in (launcher, json.loads(record.read_text())["pid"], *map(int, workers)):
                os.kill(process, signal.SIGKILL)


class Trainer(LSAMTrainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        while FAULT == "launcher, worker 0 saves last" and RANK == 0 and LAST_WORDS not in SERVER_LOG.read_text():
            time.sleep(0.01)
        super()._save_optimizer_and_scheduler(output_dir)


SERVER_LOG, LAST_WORDS = OUT / "run" / "server.log", "worker 1 ended with an error, which ends the launch"
(OUT / "shared").mkdir(exist_ok=True)
steps = 1_000_000 if FAULT.startswith(("launcher", "all")) else 40
TIMEOUT = 5.0 if "frozen" in FAULT or "evaluation" in FAULT else 600.0
strategy = "steps"
if FAULT == "launcher, worker 0 waits" and RANK == 0:
    steps, strategy = 4, "no"
saves = 4 if FAULT == "worker" else 10**6
args = arguments(
    LSAMConfig, OUT / "run", max_steps=steps, sync_steps=2, save_strategy=strategy, save_steps=saves,
    shared_memory_dir=str(OUT / "shared"), logging_steps=10**6, per_device_train_batch_size=4, sam_rho=0.0,
    worker_timeout=TIMEOUT,
)
trainer = Trainer(model=net(), args=args, train_dataset=blobs(), callbacks=[Strike()])
trainer.train(resume_from_checkpoint=ATTEMPT > 0 and any((OUT / "run").glob("checkpoint-*")))
report = dict(steps=trainer.state.global_step, weights=vector(trainer.model).tolist(), away=trainer.worker_summary())
(OUT / f"rank{RANK}.json").write_text(json.dumps(report))
if FAULT == "frozen beyond the end" and RANK == 1:
    os.kill(int((OUT / "frozen").read_text()), signal.SIGCONT)
"""


def launch(tmp_path: Path, fault: str, *extra: str, fork: bool = False):
    script = write_script(tmp_path / "script.py", LAUNCHED)
    run = accelerate_launch(script, str(tmp_path), fault, check=False, extra=extra, fork=fork, PYTHONPATH=PATHS)
    wait_until(lambda: not list((tmp_path / "shared").iterdir()))
    reports = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    return run, [json.loads(report.read_text()) for report in reports if report.exists()]


@pytest.mark.parametrize("again", ["restarted by the launcher", "launched again"])
def test_a_launch_whose_worker_is_killed_goes_on_from_its_last_checkpoint(tmp_path, again):
    if again == "launched again":
        run, reports = launch(tmp_path, "worker")
        assert run.returncode != 0
        assert reports == []
        run, reports = launch(tmp_path, "worker", fork=True)
    else:
        run, reports = launch(tmp_path, "worker", "--max_restarts", "1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert [report["steps"] for report in reports] == [40, 40]
    assert reports[0]["weights"] == reports[1]["weights"]
    assert int((tmp_path / "begin0.1").read_text()) >= 4  # not from the start


def test_a_launch_whose_server_is_killed_starts_it_again_and_goes_on(tmp_path):
    run, reports = launch(tmp_path, "server", fork=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [report["steps"] for report in reports] == [40, 40]
    assert reports[0]["weights"] == reports[1]["weights"]
    assert "resumed the run at version" in (tmp_path / "run" / "server.log").read_text()


def test_a_worker_that_evaluates_for_longer_than_the_timeout_is_not_dropped(tmp_path):
    run, reports = launch(tmp_path, "long evaluation", fork=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "evicted" not in (tmp_path / "run" / "server.log").read_text()
    assert [report["steps"] for report in reports] == [40, 40]
    assert reports[0]["weights"] == reports[1]["weights"]


@pytest.mark.parametrize("wakes", ["frozen", "frozen beyond the end"])
def test_a_worker_that_was_frozen_comes_back_to_the_run_or_to_its_end(tmp_path, wakes):
    run, reports = launch(tmp_path, wakes, fork=True)
    assert run.returncode == 0, run.stderr[-3000:]
    log = (tmp_path / "run" / "server.log").read_text()
    assert "worker 0 is gone" in log
    assert ("did not come back" in log) == (wakes == "frozen beyond the end")
    assert [report["steps"] for report in reports] == [40 if wakes == "frozen" else 8, 40]
    assert reports[0]["weights"] == reports[1]["weights"]


@pytest.mark.parametrize("moment", ["launcher", "launcher, worker 0 saves last", "launcher, worker 0 waits"])
def test_sigterm_to_a_launch_ends_all_of_it_with_a_checkpoint(tmp_path, moment):
    run, reports = launch(tmp_path, moment)
    assert run.returncode != 0
    assert reports == []
    assert newest_sealed(tmp_path / "run") is not None, run.stderr[-3000:]
    assert newest_sealed(tmp_path / "run" / "workers" / "1") is not None


def test_what_a_launch_leaves_that_was_killed_with_all_its_processes_is_removed_by_the_next(tmp_path):
    script = write_script(tmp_path / "script.py", LAUNCHED)
    run = accelerate_launch(script, str(tmp_path), "all", check=False, PYTHONPATH=PATHS)
    assert run.returncode == -signal.SIGKILL
    shared = tmp_path / "shared"
    (left,) = shared.iterdir()
    while is_served(left):  # killed, but not yet gone
        time.sleep(0.01)
    first, lock = make_launch_folder(shared)
    with lock:
        assert list(shared.iterdir()) == [first]
        second, other = make_launch_folder(shared)
        other.close()
        assert sorted(shared.iterdir()) == sorted([first, second])  # the first lives
    third, other = make_launch_folder(shared)
    other.close()
    assert list(shared.iterdir()) == [third]


def test_a_folder_of_another_user_or_that_others_may_look_into_is_left_alone_and_not_taken_over(tmp_path):
    (tmp_path / "hf_lsam-file").write_text("")
    for name, mode, owner in (("open", 0o777, os.getuid()), ("theirs", 0o700, 65534)):
        folder = tmp_path / f"hf_lsam-{name}"
        folder.mkdir()
        (folder / "launch").write_text("")
        folder.chmod(mode)
        if owner != os.getuid():
            if os.getuid():
                continue  # only root may give a folder away
            os.chown(folder, owner, -1)
        with pytest.raises(PermissionError, match="was there already, and it is another user's"):
            make_launch_folder(tmp_path, name)
    (tmp_path / "hf_lsam-link").symlink_to(tmp_path / "hf_lsam-open")
    with pytest.raises(PermissionError):
        make_launch_folder(tmp_path, "link")
    assert dead_launches(tmp_path) == []
