"""The server's arithmetic, its process, and the mailboxes in between."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launch import TIMEOUT, wait_until
from links import SlowServerLink
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.checkpoint import load_tensors, save_tensors
from hf_lsam.files import replacing, write_atomically
from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.core import RelayCore, ServerCore
from hf_lsam.server.lifetime import start_server
from hf_lsam.server.root import Root, refuse_taken_port
from hf_lsam.server.service import Service, ServiceSettings
from hf_lsam.transport.base import RefusedError, ServerGone
from hf_lsam.transport.channel import Channel
from hf_lsam.transport.copier import Copier
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.transport.messages import ANY_NUMBER, WORKER_MESSAGES, Answer, Message, Push
from hf_lsam.transport.ownership import is_served
from hf_lsam.transport.shared_memory import SharedMemoryLink
from hf_lsam.worker import Worker

# Forked children run nothing.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
CPU = torch.device("cpu")
SETTINGS = ServerSettings(sync_steps=4, anchor_momentum_correction=0.0)


def live_core(workers: int, numel: int = 3, settings: ServerSettings = SETTINGS) -> ServerCore:
    core = ServerCore(torch.zeros(numel), settings)
    for worker in range(workers):
        core.join(worker)
    return core


# --- core.py ---


def test_the_anchor_moves_once_n_tau_steps_are_in_from_whichever_workers():
    core = live_core(2)
    assert core.push(torch.ones(3) * 4, 4)
    assert core.anchor.version == 0
    assert core.push(torch.ones(3) * 12, 4)  # the same worker again would do as well
    assert core.anchor.version == 1
    assert core.anchor.vector.tolist() == [2.0, 2.0, 2.0]  # 16 / 8 steps
    assert core.state_tensors()["pending_steps"] == 0


@pytest.mark.parametrize(("pushes_movement", "expected"), [(True, 5.0), (False, 2.0)])
def test_movement_that_a_slow_link_held_back_moves_the_anchor_in_full(pushes_movement, expected):
    """Two machines of one worker each, which has moved by 1 in each of 5 periods. Differences are averaged."""
    settings = ServerSettings(sync_steps=4, pushes_movement=pushes_movement)
    root = ServerCore(torch.zeros(1), settings)
    for machine in (-1, -2):
        root.count(machine, 1, 1)
    for machine in (-1, -2):
        relay = RelayCore(torch.zeros(1), settings)
        relay.join(0)
        for _ in range(5):
            assert relay.push(torch.tensor([4.0]), 4)
        total, steps, _, _ = relay.claim()
        assert root.push(total, steps, machine)
    assert root.anchor.vector.item() == expected


def test_n_shrinks_with_a_worker_that_leaves_and_a_waiting_period_ends():
    core = live_core(3)
    core.push(torch.ones(3) * 4, 4)
    core.push(torch.ones(3) * 4, 4)
    assert core.anchor.version == 0
    core.leave(2)
    assert core.anchor.version == 1
    assert core.anchor.vector.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 131_072, -1])
def test_a_push_that_is_not_finite_is_refused_and_leaves_no_trace(bad, where):
    numel = 300_000
    core, untouched = live_core(2, numel), live_core(2, numel)
    good = torch.randn(numel)
    broken = torch.randn(numel)
    broken[where] = bad
    for server in (core, untouched):
        assert server.push(good, 4)
    assert not core.push(broken, 4)
    assert (core.refused_pushes, core.accepted_pushes, core.state_tensors()["pending_steps"]) == (1, 1, 4)
    for server in (core, untouched):
        assert server.push(good * 3, 4)
    assert torch.equal(core.anchor.vector, untouched.anchor.vector)
    assert core.anchor.vector.isfinite().all()


def test_a_push_that_its_sender_found_not_to_be_finite_is_not_looked_at():
    core = live_core(1)
    assert not core.push(torch.ones(3), 4, finite=False)
    assert (core.refused_pushes, core.accepted_pushes, core.anchor.version) == (1, 0, 0)


class NormCounter(TorchDispatchMode):
    """Counts how often a norm is taken: on CPU a dot product, by which `is_finite` is known."""

    taken = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.taken += function is torch.ops.aten.dot.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("claimed", [None, True])
def test_a_push_that_is_a_whole_period_is_checked_once_whatever_its_sender_says(claimed):
    core = live_core(1)
    with NormCounter() as counter:
        assert core.push(torch.ones(3) * 4, 4, finite=claimed)
    assert (counter.taken, core.anchor.version) == (1, 1)
    assert not core.push(torch.tensor([0.0, math.nan, 1.0]), 4, finite=claimed)
    assert (core.refused_pushes, core.anchor.vector.tolist()) == (1, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("steps", [4, 8])
def test_a_sender_that_is_wrong_about_its_push_costs_a_period_and_never_the_anchor(steps):
    core = live_core(2)
    assert core.push(torch.ones(3) * 4, 4, finite=True)
    assert core.push(torch.tensor([0.0, math.nan, 1.0]), 4, finite=True)
    assert (core.anchor.version, core.anchor.vector.tolist()) == (0, [0.0, 0.0, 0.0])
    for _ in range(8 // steps):
        assert core.push(torch.ones(3) * steps, steps, finite=True)
    assert (core.anchor.version, core.anchor.vector.tolist()) == (1, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 131_072, -1])
def test_a_copy_tells_whether_what_it_carried_is_finite(bad, where):
    copier = Copier(torch.device("cpu"), [])
    source, target = torch.randn(300_000), torch.empty(300_000)
    source[where] = bad
    copier.start(target, source, check=True)
    assert torch.equal(target.view(torch.int32), source.view(torch.int32))
    assert copier.is_finite == math.isfinite(bad)
    copier.start(target, torch.ones(300_000))  # says nothing of itself
    assert copier.is_finite == math.isfinite(bad)
    copier.start(target, torch.ones(300_000), check=True)
    assert copier.is_finite


def test_infinities_of_both_signs_do_not_cancel():
    core = live_core(1)
    assert not core.push(torch.tensor([math.inf, -math.inf, 0.0]), 4)


def test_the_rest_of_a_run_moves_the_anchor_by_its_fraction_of_a_period():
    core = live_core(1)
    core.push(torch.tensor([2.0, 2.0, 2.0]), 1)  # one step of four
    core.leave(0)
    assert core.anchor.version == 0
    core.flush()
    assert core.anchor.vector.tolist() == [0.5, 0.5, 0.5]
    core.flush()
    assert core.anchor.version == 1


def test_a_core_goes_on_from_its_state():
    core = live_core(2, settings=ServerSettings(4, 0.7, 0.3))
    pushes = [torch.randn(3) for _ in range(7)]
    for push in pushes[:3]:
        core.push(push, 4)
    copy = live_core(2, settings=ServerSettings(4, 0.7, 0.3))
    copy.load_state_tensors({name: tensor.clone() for name, tensor in core.state_tensors().items()})
    for push in pushes[3:]:
        core.push(push, 4)
        copy.push(push, 4)
    assert torch.equal(core.anchor.vector, copy.anchor.vector)
    assert core.anchor.version == copy.anchor.version == 3


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_that_comes_back_within_a_period_counts_once(restarted):
    settings = ServerSettings(sync_steps=4, pushes_movement=True)
    core = live_core(2, 1, settings)
    core.count(-2, 2, 2)
    core.push(torch.ones(1) * 4, 4, 0)
    core.push(torch.ones(1) * 8, 8, -2)
    if restarted:
        state = {name: tensor.clone() for name, tensor in core.state_tensors().items()}
        core = ServerCore(torch.zeros(1), settings)
        core.load_state_tensors(state)
        core.join(1)  # the first to find the new server, and it completes the period before the others are back
        core.push(torch.ones(1) * 4, 4, 1)
        core.join(0)
        core.count(-2, 2, 2)
    else:
        core.leave(0)
        core.leave(-2)
        assert core.anchor.version == 0
        core.join(0)
        core.count(-2, 2, 2)
        core.push(torch.ones(1) * 4, 4, 1)
    assert (core.anchor.version, core.anchor.vector.item()) == (1, 1.0)  # all four have moved by 1
    core.push(torch.ones(1) * 16, 16, 0)
    assert (core.anchor.version, core.anchor.vector.item()) == (2, 2.0)  # and n is 4 again


# --- worker.py with a server that is busy ---


def test_a_push_that_finds_the_mailbox_full_is_skipped_and_its_sum_goes_out_with_the_next():
    x = nn.Parameter(torch.full((2,), 3.0))
    core = ServerCore(torch.zeros(2), SETTINGS)
    link = SlowServerLink(core)
    link.busy = True
    worker = Worker([("x", x)], link, WorkerSettings(4, 0.0, "decoupled"))
    for _ in range(6):
        worker.after_optimizer_step([0.1])
    assert (worker.skipped_pushes, link.status.accepted, worker.steps_in_total) == (1, 0, 6)
    link.busy = False
    for _ in range(2):
        worker.after_optimizer_step([0.1])
    assert (worker.skipped_pushes, link.status.accepted, worker.steps_in_total) == (1, 1, 0)
    assert worker.anchor.tolist() == [3.0, 3.0]  # the mean of eight steps


# --- mailbox.py ---


def make_folder(tmp_path, numel=5, workers=2, settings=SETTINGS) -> tuple[RunFolder, ParameterLayout]:
    layout = ParameterLayout([("w", torch.zeros(numel))])
    path = tmp_path / "run"
    path.mkdir()
    run = {"fingerprint": layout.fingerprint.hex(), "settings": settings.as_dict()}
    return RunFolder.create(path, torch.arange(float(numel)), workers, layout.manifest, run), layout


def test_a_run_folder_is_private_and_shared_by_those_who_open_it(tmp_path):
    folder, _ = make_folder(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    mailbox = folder.make_mailbox(1)
    assert (folder.path / "mailbox_1").stat().st_mode & 0o077 == 0
    other = RunFolder(folder.path)
    assert other.slot(0).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    mailbox.fill_(7.0)
    theirs = other.mailbox(1)
    assert theirs.tolist() == [7.0] * 5
    folder.drop_mailbox(1)
    theirs.fill_(8.0)  # whoever still writes there writes to nobody
    assert folder.make_mailbox(1).tolist() == [0.0] * 5
    folder.publish(torch.full((5,), 9.0), 1)
    assert other.version == 1
    assert other.slot(1).tolist() == [9.0] * 5
    assert other.is_whole(1)
    assert other.is_whole(0)
    folder.publish(torch.full((5,), 10.0), 2)
    assert not other.is_whole(0)


def test_a_copy_that_counts_as_whole_is_never_a_mixture(tmp_path):
    """A process publishes as fast as it can; every copy that `is_whole` accepts is of one version."""
    numel = 400_000
    folder, _ = make_folder(tmp_path, numel)
    folder.slot(0).zero_()
    publisher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, torch; from hf_lsam.transport.mailbox import RunFolder; torch.set_num_threads(1)\n"
            f"folder = RunFolder({str(folder.path)!r}); vector = torch.zeros({numel})\n"
            "for version in range(1, 3000): folder.publish(vector.fill_(version), version)",
        ]
    )
    whole = torn = 0
    out = torch.empty(numel)
    while publisher.poll() is None:
        version = folder.version
        out.copy_(folder.slot(version))
        if folder.is_whole(version):
            whole += 1
            assert (out == version).all()
        else:
            torn += 1
    assert publisher.returncode == 0
    assert whole > 0
    assert torn > 0, "the publisher never overtook the reader, so the check was not tried"


def test_no_room_in_shared_memory_is_an_error_that_names_the_bytes_and_leaves_nothing(tmp_path):
    """A file system that is really full: /dev/shm stands in by a size limit that the kernel enforces."""
    script = (
        "import resource, signal, sys, torch; from pathlib import Path\n"
        "from hf_lsam.transport.mailbox import RunFolder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "path = Path(sys.argv[1]); path.mkdir()\n"
        "try: RunFolder.create(path, torch.zeros(262_144), 2, [], {})\n"
        "except OSError as error: print(error.errno, path.exists(), error)"
    )
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True, check=True)
    code, exists, message = run.stdout.split(" ", 2)
    assert int(code) == errno.EFBIG
    assert exists == "False"
    assert "2 workers: 4 vectors of 1.0 MiB are needed" in message
    assert "shared_memory_dir" in message


def test_a_channel_reassembles_frames_and_tells_what_is_not_one():
    near, far = socket.socketpair()
    channel = Channel(near)
    frame = struct.pack("<IHqqd?", 0x4C53414D, 2, 3, 16, 0.5, True).ljust(WORKER_MESSAGES.size, b"\0")
    assert channel.receive() is None
    far.sendall(frame[:11])
    assert channel.receive() is None
    far.sendall(frame[11:])
    assert channel.receive() == Push(number=3, steps=16, loss=0.5, finite=True)
    assert channel.receive() is None
    far.sendall(b"GET / HTTP/1.1\r\n" * 8)
    with pytest.raises(ValueError, match="not a frame"):
        channel.receive()
    far.close()
    channel.close()


# --- service.py and shared_memory.py: a real server process ---


@pytest.fixture
def served(tmp_path):
    """A run folder with its server process; the server must have ended by itself when the test is over."""
    folder, layout = make_folder(tmp_path)
    server = start_server(folder.path, tmp_path / "server.log")
    yield folder, layout, server
    try:
        server.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
        raise
    assert not folder.path.exists()


def join_all(folder, layout, workers=(0, 1)) -> list[SharedMemoryLink]:
    """Joins several workers at once: each is welcomed only when all are there."""
    links: dict[int, SharedMemoryLink] = {}
    threads = [
        threading.Thread(
            target=lambda n=n: links.__setitem__(n, SharedMemoryLink(folder, n, layout, CPU)), name=f"join-{n}"
        )
        for n in workers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [links[n] for n in workers]


def finish_all(links) -> None:
    """FINISH from all, then all closed: each waits for the others."""
    out = torch.empty(5)
    threads = [threading.Thread(target=link.finish, args=(False, -1, out.clone())) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.close()


def test_pushes_move_the_anchor_of_a_server_process(served):
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    start = torch.arange(5.0)
    out = torch.empty(5)
    assert first.poll(-1, out) == 0
    assert torch.equal(out, start)
    first.push(torch.full((5,), 4.0), 4, 0)
    first.settle()
    assert folder.version == 0
    second.push(torch.full((5,), 12.0), 4, 0)
    second.settle()
    assert first.poll(0, out) == 1
    assert torch.equal(out, start + 2.0)
    assert (first.status.accepted, first.status.staleness_sum, first.status.bytes_pushed) == (1, 0, 20)
    first.push(torch.full((5,), 0.0), 4, 0)  # still around version 0
    first.settle()
    assert (first.status.staleness_sum, first.status.staleness_max) == (1, 1)
    finish_all([first, second])


def test_a_server_process_refuses_what_is_not_finite_and_says_so(served):
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    first.push(torch.tensor([0.0, math.nan, 0.0, 0.0, 0.0]), 4, 0)
    first.settle()
    assert (first.status.refused, first.status.accepted) == (1, 0)
    for link in (first, second):
        link.push(torch.ones(5) * 4, 4, 0)
        link.settle()
    out = torch.empty(5)
    assert second.poll(0, out) == 1
    assert torch.equal(out, torch.arange(5.0) + 1)
    finish_all([first, second])


def test_a_worker_that_does_not_match_is_refused_with_the_first_difference(served):
    folder, layout, _ = served
    other = ParameterLayout([("v", torch.zeros(5))])
    with pytest.raises(RefusedError, match=r"Worker 1's.*`v` \[5\] torch.float32 here, `w` \[5\]"):
        SharedMemoryLink(folder, 1, other, CPU)
    finish_all(join_all(folder, layout))


def test_a_second_worker_with_the_same_number_is_refused(served):
    folder, layout, _ = served
    links = join_all(folder, layout)
    with pytest.raises(RefusedError, match="already takes part as worker 1"):
        SharedMemoryLink(folder, 1, layout, CPU)
    finish_all(links)


def test_a_worker_that_dies_is_dropped_and_the_others_go_on(served):
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    first.push(torch.ones(5) * 4, 4, 0)
    first.settle()
    assert folder.version == 0
    second.close()  # as the kernel does when a process is killed
    wait_until(lambda: folder.version)
    assert folder.version == 1, "with one worker left, the four steps that are in complete a period"
    finish_all([first])


def test_a_worker_has_left_although_a_child_of_its_process_lives_on(served):
    """As the workers of a DataLoader with `persistent_workers` do."""
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    first.push(torch.ones(5) * 4, 4, 0)
    first.settle()
    with forked_child():
        second.close()
        wait_until(lambda: folder.version)
    finish_all([first])


def test_a_killed_worker_is_dropped_although_a_child_of_its_process_lives_on(served):
    folder, layout, _ = served
    near, far = multiprocessing.get_context("fork").Pipe()

    def body():
        SharedMemoryLink(folder, 1, layout, CPU)
        with forked_child() as child:
            far.send(child)
            signal.pause()

    worker = multiprocessing.get_context("fork").Process(target=body)
    worker.start()
    (first,) = join_all(folder, layout, [0])
    child = near.recv()
    first.push(torch.ones(5) * 4, 4, 0)
    first.settle()
    worker.kill()
    worker.join()
    try:
        wait_until(lambda: folder.version)
    finally:
        os.kill(child, signal.SIGKILL)
    finish_all([first])


@contextmanager
def forked_child() -> Iterator[int]:
    """The id of a child of this process that does nothing."""
    child = os.fork()
    if not child:
        signal.pause()
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_garbage_on_the_socket_changes_nothing(served):
    folder, layout, _ = served
    links = join_all(folder, layout)
    unknown_kind = struct.pack("<IH", 0x4C53414D, 99).ljust(WORKER_MESSAGES.size, b"\0")
    for garbage in (b"GET / HTTP/1.0\r\n\r\n" * 10, os.urandom(1000), unknown_kind):
        channel = folder.connect(lambda: True, TIMEOUT)
        channel._socket.sendall(garbage)
        with pytest.raises(ConnectionError):  # the server hangs up
            channel.receive(TIMEOUT)
        channel.close()
    links[0].push(torch.ones(5) * 8, 8, 0)
    links[0].settle()
    assert torch.equal(folder.slot(1), torch.arange(5.0) + 1)
    finish_all(links)


def test_an_early_stop_and_the_best_step_reach_the_others(served):
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    results = {}
    stopper = threading.Thread(target=lambda: results.update(first=first.finish(True, 40, torch.empty(5))))
    stopper.start()
    while not second.status.stop_requested:
        second.poll(0, torch.empty(5))
    results["second"] = second.finish(False, -1, torch.empty(5))
    stopper.join()
    assert results["first"][1] == results["second"][1] == 40
    first.close()
    second.close()


def test_a_snapshot_holds_the_servers_state(served, tmp_path):
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    first.push(torch.ones(5) * 3, 3, 0)
    first.settle()
    first.snapshot(tmp_path / "saved" / "server.safetensors")
    state = load_tensors(tmp_path / "saved" / "server.safetensors")
    assert torch.equal(state["pending"], torch.ones(5) * 3)
    assert state["pending_steps"].item() == 3
    assert torch.equal(state["anchor"], torch.arange(5.0))
    finish_all([first, second])


def test_a_snapshot_holds_a_push_whose_copy_into_the_mailbox_has_not_ended(served, tmp_path):
    """As on an accelerator, which copies while the worker goes on."""
    folder, layout, _ = served
    first, second = join_all(folder, layout)
    ends = time.monotonic() + 0.5
    first.outgoing.finished = lambda: time.monotonic() > ends
    first.outgoing.wait = lambda: time.sleep(max(0.0, ends - time.monotonic()))
    first.push(torch.ones(5) * 3, 3, 0)
    first.poll(0, torch.empty(5))
    assert first.snapshot(tmp_path / "server.safetensors")
    state = load_tensors(tmp_path / "server.safetensors")
    assert torch.equal(state["pending"], torch.ones(5) * 3)
    del first.outgoing.wait, first.outgoing.finished
    finish_all([first, second])


def test_a_server_that_stays_away_is_an_error_that_says_where_to_look(tmp_path):
    folder, layout = make_folder(tmp_path)
    server = start_server(folder.path, tmp_path / "server.log")
    first, second = join_all(folder, layout)
    server.send_signal(signal.SIGKILL)
    server.wait()
    for _ in range(3):  # the worker trains on, around the last anchor
        assert first.poll(0, torch.empty(5)) is None
    assert not first.status.connected
    assert not first.can_push
    second._server_timeout = 0.0
    second.poll(0, torch.empty(5))
    with pytest.raises(ServerGone, match=r"server\.log.*resume from the last checkpoint"):
        second.poll(0, torch.empty(5))
    first.close()
    second.close()
    folder.remove()


def test_sigterm_ends_a_server_and_its_folder(tmp_path):
    folder, layout = make_folder(tmp_path)
    server = start_server(folder.path, tmp_path / "server.log")
    links = join_all(folder, layout)
    server.terminate()
    while not all(link.status.save_requested for link in links):
        for link in links:
            link.poll(0, torch.empty(5))
    assert all(link.status.stop_requested for link in links)
    finish_all(links)
    assert server.wait() == 143
    assert not folder.path.exists()


def test_a_server_that_was_started_by_hand_waits_until_its_workers_have_saved_unless_told_to_end_twice(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("hf_lsam.server.service.GRACE_SECONDS", 1.5)  # heartbeats come every second
    folder, layout = make_folder(tmp_path, workers=0)
    service = Service(folder, Root(folder))
    with service.listening():
        link = join_turning(service, folder, layout)
        service.terminating = True
        deadline = time.monotonic() + 4.0
        while time.monotonic() < deadline:  # it writes a checkpoint
            assert service.turn(0.01)
        link.poll(0, torch.empty(5))
        assert link.status.save_requested
        service.waits_for_nobody = True
        assert not service.turn(0.01)
        link.close()


def test_a_worker_whose_server_never_comes_is_told(tmp_path):
    folder, layout = make_folder(tmp_path)
    with pytest.raises(ServerGone, match="found no server"):
        SharedMemoryLink(folder, 0, layout, CPU, server_alive=lambda: False)


def test_what_an_evicted_worker_had_half_handed_in_is_dropped_though_it_holds_the_newest_anchor(tmp_path):
    folder, layout = make_folder(tmp_path, workers=0)
    service = Service(folder, Root(folder))
    incoming = torch.empty(5)
    with service.listening():
        link = join_turning(service, folder, layout)
        link.push(torch.ones(5) * 4, 4, 0)  # its frame goes out with the next poll, which comes too late
        (connection,) = service._workers.values()
        connection.last_heard, service._sweep_at = -math.inf, 0.0
        service.turn(0.0)
        while not (link.status.evictions and link.status.connected):
            link.poll(0, incoming)
            service.turn(0.01)
        assert link.can_push
        assert folder.version == 0
        link.push(torch.ones(5) * 8, 4, 0)
        while not link.can_push:
            link.poll(0, incoming)
            service.turn(0.01)
        assert (link.status.evictions, link.status.accepted, folder.version) == (1, 1, 1)
        assert torch.equal(folder.slot(1), torch.arange(5.0) + 2)
        link.close()
        service.turn(0.0)


def join_turning(service: Service, folder: RunFolder, layout: ParameterLayout) -> SharedMemoryLink:
    """An external worker of a service that this thread turns."""
    links: list[SharedMemoryLink] = []
    joining = threading.Thread(target=lambda: links.append(SharedMemoryLink(folder, ANY_NUMBER, layout, CPU)))
    joining.start()
    while joining.is_alive():
        service.turn(0.01)
    return links[0]


def test_an_anchor_is_not_taken_before_the_answer_that_says_whether_it_counts_the_last_push(tmp_path):
    folder, layout = make_folder(tmp_path, workers=0)
    service = Service(folder, Root(folder))
    incoming = torch.empty(5)
    with service.listening():
        link = join_turning(service, folder, layout)
        (connection,) = service._workers.values()
        tell, seen = connection.tell, []

        def look_before_telling(message: Message) -> None:
            if isinstance(message, Answer):
                seen.extend([folder.version, link.poll(0, incoming)])
            tell(message)

        connection.tell = look_before_telling
        link.push(torch.ones(5) * 4, 4, 0)
        link.poll(0, incoming)
        while not seen:
            service.turn(0.01)
        assert seen == [1, None]  # published, and not taken
        while (version := link.poll(0, incoming)) is None:
            service.turn(0.01)
        assert (version, link.status.counted_at) == (1, 0)
        assert torch.equal(incoming, torch.arange(5.0) + 1)
        link.close()
        service.turn(0.0)


def test_a_worker_follows_a_server_that_has_ended_cleanly_and_was_started_again(tmp_path):
    folder, layout = make_folder(tmp_path, workers=0)
    incoming = torch.empty(5)

    def push_until_counted(service: Service) -> None:
        accepted = link.status.accepted
        while not link.can_push:
            link.poll(link_version, incoming)
            service.turn(0.01)
        link.push(torch.ones(5) * 4, 4, link_version)
        while link.status.accepted == accepted:
            link.poll(link_version, incoming)
            service.turn(0.01)

    link_version = 0
    service = Service(folder, Root(folder))
    with service.listening():
        link = join_turning(service, folder, layout)
        push_until_counted(service)
        service.save()
    folder.clear()
    again = RunFolder.reopen(folder.path)
    service = Service(again, Root(again), resume=True)
    with service.listening():
        push_until_counted(service)
        link_version = link.poll(0, incoming)
        assert link_version == again.version > folder.version == 1
        assert torch.equal(incoming, torch.arange(5.0) + 2)
        link.close()
        service.turn(0.0)


def test_snapshots_that_take_long_are_taken_rarely(tmp_path, monkeypatch):
    folder, _ = make_folder(tmp_path, workers=0)
    service = Service(folder, Root(folder))
    service._settings = ServiceSettings(snapshot_seconds=0.01)
    monkeypatch.setattr(service, "save", lambda: time.sleep(0.05))
    begin = service._snapshot_at
    with service.listening():
        service.turn(0.0)
    assert service._snapshot_at > begin + 10 * 0.05


def test_a_lone_worker_that_goes_on_from_its_own_older_state_leaves_the_servers_anchor():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    worker = Worker(
        [("w", parameter)], InProcessLink(ServerCore(torch.zeros(2), SETTINGS), alone=True), WorkerSettings(4)
    )
    older = {name: tensor.clone() for name, tensor in worker.state_tensors().items()}
    worker.anchor += 5.0
    worker.load_state_tensors(older)
    assert worker.anchor.tolist() == [5.0, 5.0]


# --- files.py and checkpoint.py ---


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "name.json"
    write_atomically(path, "old: \u00e4\n", durable=True)
    assert path.read_bytes() == b"old: \xc3\xa4\n"
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new", durable=True)
    assert path.read_bytes() == b"old: \xc3\xa4\n"
    assert [file.name for file in tmp_path.iterdir()] == ["name.json"]


def test_what_a_killed_writer_has_left_goes_with_the_next_file(tmp_path):
    path = tmp_path / "name.json"
    writer = multiprocessing.get_context("fork").Process(target=kill_itself_while_it_writes, args=[path])
    writer.start()
    writer.join()
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1
    write_atomically(path, "whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


def kill_itself_while_it_writes(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("a part and more than the wh")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_tensors(path, {"x": torch.ones(3)})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"x": torch.zeros(3)})
    assert torch.equal(load_tensors(path)["x"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_damaged_or_malicious_file_is_no_checkpoint(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_tensors(whole, {"x": torch.ones(300)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tensors(cut)
    pickled = tmp_path / "pickled.safetensors"
    torch.save({"x": torch.ones(3)}, pickled)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_tensors(pickled)


def test_a_server_imports_nothing_from_the_current_folder(tmp_path, monkeypatch):
    folder, _ = make_folder(tmp_path)
    (tmp_path / "secrets.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    server = start_server(folder.path, tmp_path / "server.log")
    wait_until(lambda: is_served(folder.path), (tmp_path / "server.log").read_text)
    server.terminate()
    server.wait()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_free_port_of_either_family_is_no_error(host):
    if host == "::1" and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this kernel has no IPv6")
    refuse_taken_port((host, 0))
