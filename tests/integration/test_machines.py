"""Several machines: relays between their workers and the global server, over real networks where this host has any."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launch import PATHS, TIMEOUT, free_port, wait_until, write_script
from netns import Machine, machines, why_not
from wiretap import Wiretap

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.checkpoint import newest_sealed
from hf_lsam.compression import encoded_bytes, round_
from hf_lsam.identity import Identity
from hf_lsam.joining import Launch, Timeouts
from hf_lsam.parameters import ParameterLayout
from hf_lsam.run import Run
from hf_lsam.server.core import RelayCore, ServerCore
from hf_lsam.server.lifetime import SIGTERM_CODE, start_server
from hf_lsam.server.machines import MachineSettings, machine_settings
from hf_lsam.server.relay import Relay
from hf_lsam.server.root import Root, listen
from hf_lsam.server.service import Service
from hf_lsam.transport.base import ServerGone
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.transport.messages import ANY_NUMBER, Message, NewAnchor, StopMachine, Sum, SumAnswer
from hf_lsam.transport.ownership import is_served
from hf_lsam.transport.peer import Peer
from hf_lsam.transport.secret import new_secret
from hf_lsam.transport.shared_memory import SharedMemoryLink

CPU = torch.device("cpu")
NUMEL, TAU = 5, 4
SETTINGS = ServerSettings(sync_steps=TAU, anchor_momentum_correction=0.0)
LAYOUT = ParameterLayout([("w", torch.zeros(NUMEL))])
SECRET = bytes(range(32))


@pytest.fixture(autouse=True, scope="module")
def optimizers_are_loaded():
    """What a server in a thread would otherwise load by itself, for seconds."""
    torch.optim.SGD([torch.zeros(1)])


# --- the relay's arithmetic ---


def test_a_relay_sums_until_each_live_worker_has_done_its_steps_and_goes_on_until_it_is_answered():
    core = RelayCore(torch.zeros(2), SETTINGS)
    core.join(0)
    core.join(1)
    assert core.push(torch.tensor([1.0, 2.0]), TAU)
    assert core.claim() is None
    assert core.push(torch.tensor([10.0, 20.0]), TAU)
    vector, steps, number, bits = core.claim()
    assert (vector.tolist(), steps, number, bits) == ([11.0, 22.0], 2 * TAU, 1, 32)
    for _ in range(3):
        core.push(torch.ones(2), TAU)
    assert core.claim() is None  # not answered
    core.answered(1)
    assert vector.tolist() == [11.0, 22.0]
    vector, steps, number, _ = core.claim()
    assert (vector.tolist(), steps, number) == ([3.0, 3.0], 3 * TAU, 2)
    core.answered(2)
    assert not core.steps_left
    core.push(torch.ones(2), TAU)
    assert core.claim() is None
    core.leave(1)
    assert core.claim()[1] == TAU


def test_a_relay_tells_how_many_steps_of_each_worker_the_link_takes_for_an_exchange():
    core = RelayCore(torch.zeros(1), SETTINGS)
    core.join(0)
    core.join(1)
    told = []
    for pushes in 2, 2, 2, 40, 6, 6, 6, 2:  # between two sums, of both workers; once by accident
        for number in range(pushes):
            core.push(torch.ones(1), TAU, number % 2)
        assert core.claim()[1] == pushes * TAU
        core.answered(core.forwarded)
        told.append(core.exchange_steps)
    assert told == [0, 0, 0, 0, 0, 3 * TAU, 3 * TAU, 3 * TAU]
    core.push(torch.ones(1), TAU)
    core.claim(all_of_it=True)  # the end of a run says nothing about the link
    assert core.exchange_steps == 3 * TAU


@pytest.mark.parametrize(("last_counted", "left"), [(0, 5.0), (1, 2.0)])
def test_a_sum_under_way_is_handed_in_again_unless_it_was_counted(last_counted, left):
    core = RelayCore(torch.zeros(1), SETTINGS)
    core.join(0)
    core.push(torch.tensor([3.0]), TAU)
    core.claim()
    core.push(torch.tensor([2.0]), TAU)
    core.settle(last_counted)
    vector, steps, number, _ = core.claim()
    assert (vector.item(), steps, number) == (left, TAU * (2 - last_counted), 2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lost", [None, "counted", "not counted"])
def test_what_rounding_leaves_behind_goes_with_the_next_sum_and_the_last_is_exact(bits, lost):
    core = RelayCore(torch.zeros(100), replace(SETTINGS, exchange_bits=bits))
    core.join(0)
    generator = torch.Generator().manual_seed(0)
    pushed, crossed = torch.zeros(2, 100)
    for number in range(1, 11):
        vector = torch.randint(-1000, 1000, (100,), generator=generator).float()  # whose sums are exact
        pushed += vector
        core.push(vector, TAU)
        claimed, _, _, crosses_in = core.claim()
        assert crosses_in == bits
        assert torch.equal(round_(claimed.clone(), bits), claimed)  # so the wire adds no error
        assert not torch.equal(claimed, vector)
        if number == 5 and lost is not None:
            core.settle(number if lost == "counted" else number - 1)
            if lost == "not counted":
                continue
        crossed += claimed
        core.answered(number)
        assert torch.equal(crossed + core._sum, pushed)  # what has crossed, and what is held back
        assert (pushed - crossed).abs().max() < 2000 / 2 ** (bits - 2)
    core.push(torch.zeros(100), TAU)
    claimed, _, _, crosses_in = core.claim(True)
    assert crosses_in == 32
    assert torch.equal(crossed + claimed, pushed)


def test_a_relay_refuses_what_is_not_finite_and_takes_no_older_anchor():
    core = RelayCore(torch.zeros(2), SETTINGS)
    assert not core.push(torch.tensor([1.0, math.nan]), TAU)
    assert not core.push(torch.tensor([1.0, math.nan]), TAU, finite=True)
    assert not core.push(torch.ones(2), TAU, finite=False)
    assert core.refused_pushes == 3
    assert core.claim(True) is None
    core.adopt(torch.ones(2), 5)
    core.adopt(torch.zeros(2), 4)
    assert core.anchor.version == 5
    assert core.state_tensors()["anchor"].tolist() == [1.0, 1.0]


def test_a_machine_counts_with_its_workers():
    core = ServerCore(torch.zeros(1), SETTINGS)
    core.join(0)
    core.count(-1, 3, 3)
    core.push(torch.ones(1), TAU)
    core.push(torch.ones(1), 2 * TAU, -1)
    assert core.anchor.version == 0
    core.count(-1, 2, 2)  # one of its three is gone: the period is complete
    assert core.anchor.version == 1
    assert core.anchor.vector.item() == pytest.approx(2 / (3 * TAU))


def test_versions_that_are_left_out_never_write_over_what_is_read(tmp_path):
    folder = RunFolder.create(tmp_path, torch.zeros(1), 0, [], {})
    folder.publish(torch.full((1,), 4.0), 4)
    reading = folder.slot(4)
    folder.publish(torch.full((1,), 5.0), 5)
    assert reading.item() == 4.0
    folder.publish(torch.full((1,), 7.0), 7)
    assert folder.version == 7
    assert folder.slot(7).item() == 7.0
    assert not folder.is_whole(5)


# --- servers of several machines in threads of the test's own process ---


class CountingRoot(Root):
    """Notes what machines say."""

    def __init__(self, folder, listener):
        self.said: list[tuple[int, Message]] = []  # machine, what
        super().__init__(folder, listener)

    def _handle(self, machine, message, vector):
        self.said.append((machine.number, message))
        super()._handle(machine, message, vector)

    def pushes_of(self, machine: int) -> list[int]:
        return [said.steps for number, said in self.said if number == machine and isinstance(said, Sum)]


class Cluster:
    """One server a machine, each with links of some workers.

    Args:
        folder: of the test.
        workers: how many on each machine.
        settings: of the run.
        across: fields of `MachineSettings`.
    """

    def __init__(self, folder: Path, workers: list[int], settings: ServerSettings = SETTINGS, **across):
        self.settings = settings
        self.folders = [self._make_folder(folder, m, workers, across) for m in range(len(workers))]
        listener = listen(self.folders[0], ("127.0.0.1", 0), SECRET)
        self.address = listener.address
        self.top = CountingRoot(self.folders[0], listener)
        self.relays = [Relay(made, self.address, SECRET) for made in self.folders[1:]]
        services = [Service(made, role) for made, role in zip(self.folders, (self.top, *self.relays), strict=True)]
        self.top_service = services[0]
        self.threads = [threading.Thread(target=service.serve) for service in services]
        for thread in self.threads:
            thread.start()
        self.links: dict[tuple[int, int], SharedMemoryLink] = {}
        self.all_at_once(self._join, [(m, w) for m, count in enumerate(workers) for w in range(count)])

    def _make_folder(self, folder: Path, machine: int, workers: list[int], across: dict) -> RunFolder:
        path = folder / f"machine{machine}"
        path.mkdir()
        across = {"silence": 10.0, "server_timeout": 30.0, **across}
        contents = {
            "fingerprint": LAYOUT.fingerprint.hex(),
            "settings": self.settings.as_dict(),
            "machines": MachineSettings(len(workers), machine, "run", **across).as_dict(),
        }
        first = torch.full((NUMEL,), float(machine + 1))
        return RunFolder.create(path, first, workers[machine], LAYOUT.manifest, contents)

    def _join(self, machine: int, worker: int) -> None:
        self.links[machine, worker] = SharedMemoryLink(self.folders[machine], worker, LAYOUT, CPU)

    def all_at_once(self, work: Callable, arguments: list[tuple]) -> None:
        threads = [threading.Thread(target=work, args=each) for each in arguments]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def until(self, condition: Callable[[], bool]) -> None:
        """Lets workers poll until it holds."""
        nowhere = torch.empty(NUMEL)
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline
            for link in self.links.values():
                link.poll(0, nowhere)
            time.sleep(0.001)

    def period(self, difference: float = 0.1) -> None:
        """Every worker hands in TAU steps at a distance of `difference`; all have the anchor that follows."""
        version = self.top.core.anchor.version
        for link in self.links.values():
            self.until(lambda link=link: link.can_push)
            for _ in range(TAU):
                link.begin_step()
            link.push(torch.full((NUMEL,), TAU * difference), TAU, version)
        self.until(lambda: all(folder.version > version for folder in self.folders))

    def finish(self, stop: tuple[int, int] | None = None) -> list[tuple[int, int, float]]:
        """All workers finish; (version, best step, value of the final anchor) of each, in the order of machines."""
        found = {}

        def body(machine: int, worker: int) -> None:
            link, final = self.links[machine, worker], torch.empty(NUMEL)
            link.settle()
            version, best = link.finish((machine, worker) == stop, 10 * machine + worker, final)
            found[machine, worker] = (version, best, final[0].item())

        self.all_at_once(body, list(self.links))
        return [found[key] for key in self.links]

    def end(self) -> None:
        for link in self.links.values():
            link.close()
        for thread in self.threads:
            thread.join()


def cut(peer: Peer) -> None:
    """Breaks a link under both its ends."""
    socket.socket.shutdown(peer._connection, socket.SHUT_RDWR)


def poll_for_ever(link: SharedMemoryLink) -> None:
    while True:
        link.poll(0, torch.empty(NUMEL))
        time.sleep(0.01)


def add_by_hand(folder: Path, run: Cluster) -> tuple[Relay, Service, threading.Thread]:
    """Adds a machine to `run` by hand: its relay, linked, the relay's service, and the thread that serves."""
    path = folder / "by_hand"
    path.mkdir()
    across = MachineSettings(run_id="run", silence=10.0, server_timeout=30.0).as_dict()
    contents = {**run.folders[0].run, "machines": across}
    made = RunFolder.create(path, torch.zeros(NUMEL), 0, LAYOUT.manifest, contents)
    relay = Relay(made, run.address, SECRET)
    service = Service(made, relay)
    serving = threading.Thread(target=service.serve)
    serving.start()
    run.until(lambda: relay._linked)
    return relay, service, serving


@contextmanager
def cluster(folder: Path, workers: list[int], **across) -> Iterator[Cluster]:
    made = Cluster(folder, workers, **across)
    try:
        yield made
    finally:
        made.end()


@pytest.mark.parametrize("bits", [8, 4])
def test_anchors_cross_in_few_bits_and_the_last_exactly(tmp_path, bits):
    settings = replace(SETTINGS, exchange_bits=bits)
    with cluster(tmp_path, [1, 2], settings=settings) as run:
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            version = run.top.core.anchor.version
            for link in run.links.values():
                run.until(lambda link=link: link.can_push)
                link.push(torch.randn(NUMEL, generator=generator), TAU, version)
            run.until(lambda version=version: all(folder.version > version for folder in run.folders))
        root, relay = (folder.slot(folder.version).clone() for folder in run.folders)
        assert 0 < (root - relay).abs().max() < 1 / 2 ** (bits - 2)  # about one rounding, not the sum of six
        ends = run.finish()
        assert set(ends) == {ends[0]}
        finals = [folder.slot(folder.version) for folder in run.folders]
        assert torch.equal(*finals)
        # Six sums and six changes in few bits, and the first anchor and the last whole; heartbeats, and messages.
        least = 12 * encoded_bytes(NUMEL, bits) + 2 * 4 * NUMEL
        counted = [run.links[machine, 0].bytes_between_machines for machine in (0, 1)]
        assert all(least < count < least + 100_000 for count in counted), counted


def test_each_machine_hands_in_one_sum_a_period_and_all_begin_and_end_at_one_anchor(tmp_path):
    with cluster(tmp_path, [1, 2, 3]) as run:
        assert [folder.slot(folder.version)[0].item() for folder in run.folders] == [1.0, 1.0, 1.0]  # machine 0's
        for _ in range(5):
            run.period()
        assert run.top.pushes_of(1) == [2 * TAU] * 5
        assert run.top.pushes_of(2) == [3 * TAU] * 5
        # What a machine's workers have begun they know themselves; of the others', what came with the last anchor.
        root, *relays = run.folders
        run.until(lambda: root.steps_begun == 5 * 6 * TAU)
        for relay, here in zip(relays, (2, 3), strict=True):
            assert relay.steps_begun_here == 5 * here * TAU
            assert 5 * here * TAU + 4 * (6 - here) * TAU - here * TAU <= relay.steps_begun <= 5 * 6 * TAU
        ends = run.finish()
        assert len(ends) == 6
        assert set(ends) == {ends[0]}
        version, best, value = ends[0]
        assert (version, best) == (5, 22)
        assert value == pytest.approx(1.5)


def test_a_sum_is_answered_before_the_anchor_that_it_completes_which_counts_its_steps(tmp_path):
    """So the next sum crosses a slow link while the anchor comes back."""
    with cluster(tmp_path, [1, 1]) as run:
        peer, posted = run.top._machines[1].peer, []

        class Noting(type(peer)):
            def post(self, message, vector=None, bits=32):
                posted.append(message)
                super().post(message, vector, bits)

        peer.__class__ = Noting
        for _ in range(2):
            run.period()
        run.finish()
        assert posted[:4] == [
            SumAnswer(1, True),
            NewAnchor(1, 2 * TAU),
            SumAnswer(2, True),
            NewAnchor(2, 4 * TAU),
        ]


def test_an_early_stop_on_one_machine_reaches_the_workers_of_all(tmp_path):
    with cluster(tmp_path, [1, 1, 1]) as run:
        run.period()
        stopper = run.links.pop((2, 0))
        thread = threading.Thread(target=stopper.finish, args=(True, -1, torch.empty(NUMEL)))
        thread.start()
        run.until(lambda: all(link.status.stop_requested for link in run.links.values()))
        run.finish()
        thread.join()
        stopper.close()


def test_a_worker_that_dies_leaves_n_on_all_machines(tmp_path):
    with cluster(tmp_path, [1, 2]) as run:
        run.period()
        run.links.pop((1, 1)).close()
        run.until(lambda: run.top.core.live_workers == 2)
        run.period()
        assert run.top.pushes_of(1) == [2 * TAU, TAU]
        run.finish()


@pytest.mark.parametrize("failing", [(0, 0), (1, 1)])
def test_a_worker_that_ends_with_an_error_ends_those_of_all_machines_with_one(tmp_path, failing):
    with cluster(tmp_path, [1, 2, 1]) as run:
        run.period()
        waiting = run.links.pop((2, 0))  # it has finished, and waits for the others
        errors = []

        def wait():
            with pytest.raises(ServerGone) as error:
                waiting.finish(False, -1, torch.empty(NUMEL))
            errors.append(str(error.value))
            waiting.close()

        thread = threading.Thread(target=wait)
        thread.start()
        run.links.pop(failing).close(failed=True)
        for (machine, _), link in list(run.links.items()):
            who = f"Worker {failing[1]} on this" if machine == failing[0] else "A worker on another"
            with pytest.raises(ServerGone, match=f"{who} machine ended with an error"):
                poll_for_ever(link)
            link.close()
        thread.join()
        assert "A worker on another machine ended with an error" in errors[0]


def test_a_lost_link_comes_back_and_each_sum_is_counted_once(tmp_path):
    with cluster(tmp_path, [1, 1]) as run:
        run.period()
        for _ in range(3):
            relay = run.relays[0]
            lost = relay._peer
            cut(lost)
            link = run.links[1, 0]
            for _ in range(TAU):
                link.begin_step()
            link.push(torch.full((NUMEL,), TAU * 0.1), TAU, 0)  # into whatever is left of the link
            run.until(lambda relay=relay, lost=lost: relay._linked and relay._peer is not lost)
            run.until(lambda: run.top.core.live_workers == 2)
            run.until(lambda relay=relay: not relay.core.steps_left)
        assert run.links[1, 0].status.connected
        run.period()
        ends = run.finish()
        assert ends[0] == ends[1]
        assert sum(run.top.pushes_of(1)) == 5 * TAU
        assert run.folders[0].steps_begun == run.folders[1].steps_begun == (2 + 5) * TAU
        assert run.top.core.accepted_pushes == len(run.top.pushes_of(1)) + 2


@pytest.mark.parametrize("way", ["to server", "from server"])
def test_bytes_that_are_changed_on_the_way_cost_a_link_and_nothing_else(tmp_path, way):
    with cluster(tmp_path, [1, 1]) as run, Wiretap(run.address) as tap:
        run.period()
        (relay,) = run.relays
        relay._address = tap.address
        lost = relay._peer
        cut(lost)
        run.until(lambda: relay._linked and relay._peer is not lost)
        for _ in range(3):
            run.until(lambda: run.top.core.live_workers == 2)
            lost = relay._peer
            tap.flip(way, after=20)  # in the sum; or in its acknowledgement, its answer or the anchor that follows
            run.period()
            run.until(lambda lost=lost: relay._linked and relay._peer is not lost)
        ends = run.finish()
        assert ends[0] == ends[1]
        # Every period moves the anchor by 0.1; there are more of them where the machine was not counted for a moment.
        assert ends[0][2] == pytest.approx(1 + 0.1 * ends[0][0])
        assert sum(run.top.pushes_of(1)) == 4 * TAU


def test_a_global_server_that_is_told_to_end_waits_until_all_machines_have_the_final_anchor(tmp_path):
    with cluster(tmp_path, [1, 1]) as run:
        run.period()
        hold = threading.Event()
        peer = run.top._machines[1].peer

        class Slow(type(peer)):  # its link takes what it is given late
            can_post = property(lambda self: hold.is_set() and Peer.can_post.fget(self))

        peer.__class__ = Slow
        run.top_service.terminating = True
        run.until(lambda: all(link.status.save_requested for link in run.links.values()))
        ended = threading.Thread(target=run.finish)
        ended.start()
        run.threads[0].join(1.0)
        assert run.threads[0].is_alive()
        hold.set()
        run.top.exchange()  # as the root does when a link can take more
        ended.join(30)
        assert not ended.is_alive()


def test_a_machine_ends_with_its_last_anchor_if_the_global_server_was_told_to_end_and_is_gone(tmp_path):
    with cluster(tmp_path, [1, 1]) as run:
        run.period()
        relay = run.relays[0]
        relay._address = ("127.0.0.1", 1)  # where nobody listens
        run.top_service.terminating = True
        run.until(lambda: run.links[1, 0].status.save_requested)
        cut(relay._peer)
        assert run.finish()[1][0] == 1


def test_a_relay_by_hand_comes_back_to_a_global_server_that_was_told_to_end(tmp_path):
    with cluster(tmp_path, [1]) as run:
        relay, service, serving = add_by_hand(tmp_path, run)
        with closing(SharedMemoryLink(service.folder, ANY_NUMBER, LAYOUT, CPU)) as link:
            (machine,) = run.top._machines.values()
            machine.peer.post(StopMachine(save=True, failed=False))
            while not link.status.save_requested:
                link.poll(0, torch.empty(NUMEL))
            cut(relay._peer)
            run.until(lambda: not relay._linked)
            run.until(lambda: relay._linked)  # as when the global server has been started again
        service.terminating = True
        serving.join()
        run.finish()


def test_a_relay_that_leaves_forwards_what_it_has_as_long_as_the_link_lives(tmp_path, caplog):
    with cluster(tmp_path, [1]) as run:
        relay, service, serving = add_by_hand(tmp_path, run)
        ready = time.monotonic() + 5.0

        class Slow(type(relay._peer)):  # its link takes what it is given late
            can_post = property(lambda self: time.monotonic() > ready and Peer.can_post.fget(self))

        relay._peer.__class__ = Slow
        with closing(SharedMemoryLink(service.folder, ANY_NUMBER, LAYOUT, CPU)) as link:
            link.push(torch.ones(NUMEL), TAU // 2, 0)
            link.settle()
            service.terminating = True
        serving.join()
        assert run.top.pushes_of(1) == [TAU // 2]
        run.finish()
    assert "not counted" not in caplog.text


def test_the_first_worker_waits_for_its_server_as_long_as_a_vector_crosses(tmp_path):
    (tmp_path / "run").mkdir()
    folder = RunFolder.create(tmp_path / "run", torch.zeros(NUMEL), 1, LAYOUT.manifest, {})
    moves = (
        "import sys, time; from pathlib import Path; from hf_lsam.transport.mailbox import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]))\n"
        "for second in range(1, int(sys.argv[2]) + 1):\n"
        "    folder.set_between_machines(folder.bytes_between_machines + (1 << 23), 0); time.sleep(1.0)\n"
        "time.sleep(float(sys.argv[3]))"
    )
    for seconds, then, code in (("5", "0", 0), ("1", "600", -signal.SIGTERM)):
        launch = Launch(Identity(0, 2, 0, 2, 0, 1), None, tmp_path, tmp_path / "log", Timeouts(server_timeout=3.0))
        launch.folder = folder
        launch._server = server = subprocess.Popen([sys.executable, "-c", moves, str(folder.path), seconds, then])
        launch.leave(finished=True)
        assert server.returncode == code


def test_a_global_server_that_hears_no_more_of_a_machine_ends_without_it(tmp_path):
    with cluster(tmp_path, [1, 1], server_timeout=1.0) as run:
        run.period()
        relay = run.relays[0]
        relay._address = ("127.0.0.1", 1)  # where nobody listens
        cut(relay._peer)
        lost = run.links.pop((1, 0))
        with pytest.raises(ServerGone, match="has lost the one of all machines"):
            poll_for_ever(lost)
        lost.close()
        run.until(lambda: run.top.core.live_workers == 1)
        run.links[0, 0].push(torch.ones(NUMEL), TAU, 1)
        assert run.finish()[0][0] == 2


def test_a_welcome_may_take_longer_than_server_timeout_to_arrive(tmp_path):
    with cluster(tmp_path, [1, 1], server_timeout=1.0) as run:
        run.period()
        relay, give_up_at = run.relays[0], time.monotonic() + 2.5
        run.top._send_newest = lambda machine: None  # a link that takes nothing
        cut(relay._peer)
        run.until(lambda: relay._asked and not relay._linked)
        run.until(lambda: time.monotonic() > give_up_at)
        assert run.threads[1].is_alive()
        del run.top._send_newest
        run.top.exchange()
        run.until(lambda: relay._linked)
        run.period()
        assert {version for version, _, _ in run.finish()} == {2}


def test_a_relay_with_another_secret_is_refused_and_its_workers_are_told(tmp_path):
    with cluster(tmp_path, [1]) as run:
        path = tmp_path / "wrong"
        path.mkdir()
        contents = {**run.folders[0].run, "machines": MachineSettings(2, 1, "run").as_dict()}
        folder = RunFolder.create(path, torch.zeros(NUMEL), 1, LAYOUT.manifest, contents)
        relay = Service(folder, Relay(folder, run.address, bytes(32)))
        thread = threading.Thread(target=relay.serve)
        thread.start()
        with pytest.raises(ServerGone):
            SharedMemoryLink(folder, 0, LAYOUT, CPU)
        thread.join()
        run.finish()


def test_a_relay_with_other_settings_is_refused(tmp_path, caplog):
    with cluster(tmp_path, [1]) as run:
        path = tmp_path / "other"
        path.mkdir()
        contents = {**run.folders[0].run, "machines": MachineSettings(2, 1, "run").as_dict()}
        contents["settings"] = {**contents["settings"], "sync_steps": 8}
        folder = RunFolder.create(path, torch.zeros(NUMEL), 1, LAYOUT.manifest, contents)
        relay = Service(folder, Relay(folder, run.address, SECRET))
        thread = threading.Thread(target=relay.serve)
        thread.start()
        with pytest.raises(ServerGone):
            SharedMemoryLink(folder, 0, LAYOUT, CPU)
        thread.join()
        assert "The settings of this machine are not those of the run" in caplog.text
        run.finish()


def test_what_cannot_work_across_machines_is_an_error_at_the_start(tmp_path):
    contents = {"fingerprint": LAYOUT.fingerprint.hex(), "settings": {**SETTINGS.as_dict(), "algorithm": "lsgd"}}
    folder = RunFolder.create(tmp_path, torch.zeros(NUMEL), 0, LAYOUT.manifest, contents)
    with pytest.raises(RuntimeError, match=r"algorithm=.lsgd. works on one machine only"):
        Relay(folder, ("127.0.0.1", 1), SECRET)
    folder.run["settings"]["algorithm"] = "lsam"
    with pytest.raises(RuntimeError, match=r"lets other machines connect.*allow_remote"):
        listen(folder, ("0.0.0.0", 0), SECRET)


# --- whole runs, through the real launcher ---

SCRIPT = """
import hashlib, json, os, sys, time
from pathlib import Path

import torch
from models import arguments, blobs, net, vector
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
FIELDS = json.loads(sys.argv[2])
PAUSE = FIELDS.pop("pause", 0.0)
STOP_AT = FIELDS.pop("stop_at", {}).get(str(RANK))
progress = OUT / f"progress{RANK}"


class Watch(TrainerCallback):
    versions = []

    def on_step_end(self, args, state, control, **keywords):
        time.sleep(PAUSE)
        progress.write_text(str(state.global_step))
        self.versions.append(trainer.worker.version)
        control.should_training_stop = control.should_training_stop or state.global_step == STOP_AT


fields = dict(sam_rho=0.05, sync_steps=4, coupling_strength=0.2, per_device_train_batch_size=4, num_train_epochs=50)
args = arguments(LSAMConfig, OUT / "out" / os.environ["GROUP_RANK"], **{**fields, **FIELDS})
trainer = LSAMTrainer(model=net(RANK), args=args, train_dataset=blobs(64), callbacks=[Watch()])
error = None
try:
    trainer.train()
except Exception as caught:
    error = f"{type(caught).__name__}: {caught}"
report = dict(
    end=hashlib.sha256(vector(trainer.model).numpy().tobytes()).hexdigest(),
    versions=Watch.versions,
    steps=trainer.state.global_step,
    local_rank=args.identity.local_rank,
    machine=args.identity.machine,
    error=error,
)
(OUT / f"rank{RANK}.new").write_text(json.dumps(report))
os.rename(OUT / f"rank{RANK}.new", OUT / f"rank{RANK}.json")
"""


class Launches:
    """`accelerate launch` on each machine of a run.

    Args:
        folder: of this test.
        count: how many machines, with `workers` workers each.
        on: where they are started; None: all on this one, over loopback.
        fields: of the configuration of the run.
    """

    def __init__(self, folder: Path, count: int, workers: int, on: list[Machine] | None = None, **fields):
        self.folder, self.workers = folder, count * workers
        script = write_script(folder / "script.py", SCRIPT)
        address, port = ("127.0.0.1", free_port()) if on is None else (on[0].address, 29500)
        memory = folder / "memory"  # a machine that is killed leaves its run folder behind
        memory.mkdir()
        fields["shared_memory_dir"] = str(memory)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
        self.processes = []
        for machine in range(count):
            command = [] if on is None else list(on[machine].prefix)
            command += [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
            command += ["--num_processes", str(self.workers), "--num_machines", str(count)]
            command += ["--machine_rank", str(machine), "--main_process_ip", address, "--main_process_port", str(port)]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            command += [str(script), str(folder), json.dumps(fields)]
            with (folder / f"launch{machine}.log").open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            self.processes.append(process)

    def until(self, condition: Callable[[], object]) -> None:
        wait_until(condition, self.story)

    def has_reached(self, rank: int, step: int) -> bool:
        path = self.folder / f"progress{rank}"
        return path.exists() and int(path.read_text() or 0) >= step

    def report(self, rank: int) -> dict | None:
        path = self.folder / f"rank{rank}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def reports(self, ranks: range) -> list[dict]:
        """Of these workers, once they have ended."""
        self.until(lambda: all(self.report(rank) for rank in ranks))
        return [self.report(rank) for rank in ranks]

    def log(self, machine: int) -> str:
        path = self.folder / "out" / str(machine) / "server.log"
        return path.read_text() if path.exists() else ""

    def story(self) -> str:
        logs = sorted([*self.folder.glob("launch*.log"), *self.folder.glob("out/*/server.log")])
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in logs)

    def kill(self, machine: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.processes[machine].pid, signal.SIGKILL)


@contextmanager
def launches(*arguments, **fields) -> Iterator[Launches]:
    made = Launches(*arguments, **fields)
    try:
        yield made
    finally:
        for machine, process in enumerate(made.processes):
            made.kill(machine)
            process.wait()


def sums_forwarded(log: str) -> list[int]:
    return [int(steps) for steps in re.findall(r"forwarded sum \d+ of (\d+) steps", log)]


def test_two_launches_on_loopback_are_one_run(tmp_path):
    port = free_port()
    with launches(tmp_path, 2, 2, max_steps=40, server_port=port) as run:
        reports = run.reports(range(4))
        for process in run.processes:
            assert process.wait() == 0, run.story()
    assert f"listening to other machines at 127.0.0.1:{port}" in run.log(0)
    assert [(report["machine"], report["local_rank"]) for report in reports] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(report["steps"] == 40 and report["error"] is None for report in reports), (reports, run.story())
    assert len({report["end"] for report in reports}) == 1
    assert all(report["versions"] == sorted(report["versions"]) for report in reports)
    assert sum(sums_forwarded(run.log(1))) == 2 * 40
    # One a period of 2 * 4 steps, until the first of the two has finished.
    assert min(sums_forwarded(re.split(r"worker \d+ finished", run.log(1))[0])) >= 2 * 4


def test_sigterm_to_the_global_server_has_the_workers_of_all_machines_save_and_leave(tmp_path):
    with launches(tmp_path, 2, 1, max_steps=1_000_000, pause=0.02) as run:
        run.until(lambda: run.has_reached(0, 10) and run.has_reached(1, 10))
        os.kill(json.loads((run_folder(run, 0) / "server.json").read_text())["pid"], signal.SIGTERM)
        reports = run.reports(range(2))
        for process in run.processes:
            assert process.wait() == 0, run.story()
    for report, folder in zip(reports, ("0", "1/workers/1"), strict=True):
        assert report["error"] is None, run.story()
        newest = newest_sealed(tmp_path / "out" / folder)
        assert newest is not None
        assert newest.name == f"checkpoint-{report['steps']}"
    assert list((tmp_path / "memory").iterdir()) == []


def run_folder(run: Launches, machine: int) -> Path:
    """Of a launch, on one machine."""
    for path in (run.folder / "memory").glob("hf_lsam-*"):
        if json.loads((path / "run.json").read_text())["machines"]["number"] == machine:
            return path
    raise AssertionError(run.story())


def test_the_servers_of_both_machines_are_killed_and_the_run_goes_on(tmp_path):
    with launches(tmp_path, 2, 1, max_steps=200, pause=0.1, snapshot_seconds=0.5) as run:
        for machine, step in ((1, 20), (0, 60)):  # the relay, then the global server
            run.until(lambda step=step: run.has_reached(0, step) and run.has_reached(1, step))
            folder = run_folder(run, machine)
            secret = stat.S_IMODE((folder / "secret").stat().st_mode)
            assert secret == 0o600
            before = json.loads((folder / "server.json").read_text())["pid"]
            os.kill(before, signal.SIGKILL)
            again = "resumed the run" if machine == 0 else "takes part as a machine"
            run.until(lambda machine=machine, again=again: run.log(machine).count(again) == 2 - (machine == 0))
        reports = run.reports(range(2))
        for process in run.processes:
            assert process.wait() == 0, run.story()
    assert reports[0]["end"] == reports[1]["end"]
    assert all(report["steps"] == 200 and report["error"] is None for report in reports)
    assert all(report["versions"] == sorted(report["versions"]) for report in reports)
    assert run.log(1).count("takes part as a machine") == 3  # at the start, as another relay, to another global server
    assert "did not come back" not in run.log(0)


# --- by hand ---


def test_machines_that_are_added_by_hand_share_an_anchor_and_a_wrong_secret_does_not_get_in(tmp_path):
    (tmp_path / "a").mkdir()
    new_secret(tmp_path / "a" / "secret")
    new_secret(tmp_path / "wrong")
    address = f"127.0.0.1:{free_port()}"
    places = {
        "a": ["--listen", address, "--secret_file", str(tmp_path / "a" / "secret")],
        "b": ["--connect", address, "--secret_file", str(tmp_path / "a" / "secret")],
        "c": ["--connect", address, "--secret_file", str(tmp_path / "wrong")],
    }
    servers, links = {}, {}
    timeouts = Timeouts(server_timeout=60.0)
    try:
        for name, options in places.items():
            servers[name] = start_server(tmp_path / name / "run", tmp_path / f"{name}.log", None, options)
        for name in places:
            while not is_served(tmp_path / name / "run"):
                assert servers[name].poll() is None, (tmp_path / f"{name}.log").read_text()
                time.sleep(0.05)
            run = Run(Identity(), tmp_path, tmp_path / "log", str(tmp_path / name / "run"), timeouts)
            x = torch.nn.Parameter(torch.full((NUMEL,), float(len(links))))
            links[name] = (run, None)
            if name == "c":
                with pytest.raises(ServerGone):
                    run.join([("x", x)], WorkerSettings(TAU), SETTINGS)
                assert "refused (SECRET)" in (tmp_path / "c.log").read_text()
            else:
                links[name] = (run, run.join([("x", x)], WorkerSettings(TAU), SETTINGS))
        run_id = json.loads((tmp_path / "a" / "run" / "server.json").read_text())["run"]
        server = start_server(tmp_path / "d" / "run", tmp_path / "d.log", None, places["a"])
        assert server.wait() == 1
        owner = f"The port belongs to run {run_id}, pid {servers['a'].pid}. Give this run another one, or end that."
        assert owner in (tmp_path / "d.log").read_text()
        first, second = links["a"][1], links["b"][1]
        assert torch.equal(second.anchor, torch.zeros(NUMEL))  # the first worker's on the first machine
        while not re.search("with 1 workers|has 1 live workers", (tmp_path / "a.log").read_text()):
            time.sleep(0.05)
        for worker in (first, second):
            worker.link.push(torch.full((NUMEL,), 0.1 * TAU), TAU, 0)
        while min(first.version, second.version) < 1:
            first.pull_newest()
            second.pull_newest()
            time.sleep(0.01)
        assert torch.equal(first.anchor, second.anchor)
        assert first.anchor[0].item() == pytest.approx(0.1)
    finally:
        for run, _ in links.values():
            run.leave()
        for server in servers.values():
            server.terminate()
            server.wait()


@pytest.mark.parametrize("took_part", [False, True])
def test_a_relay_refuses_a_run_that_is_behind_what_it_holds(tmp_path, caplog, took_part):
    """Its folder is of another run; or its root began anew, whose differences would go onto an anchor of before."""
    with cluster(tmp_path, [1]) as run:
        path = tmp_path / "other"
        path.mkdir()
        contents = {**run.folders[0].run, "machines": MachineSettings(2, 1, "run").as_dict()}
        folder = RunFolder.create(path, torch.zeros(NUMEL), 0, LAYOUT.manifest, contents)
        if not took_part:
            folder.publish(torch.ones(NUMEL), 7)
        relay = Relay(folder, run.address, SECRET)
        if took_part:
            relay.core.adopt(torch.ones(NUMEL), 7)
        Service(folder, relay, not took_part or None).serve()
        assert re.search("is at anchor 0, and this folder holds anchor 7 of another run.*new folder", caplog.text)
        run.finish()


needs_networks = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@needs_networks
def test_a_link_that_is_slow_and_then_cut_comes_back_and_all_machines_end_at_one_anchor(tmp_path):
    fields = {"max_steps": 400, "pause": 0.1, "machine_timeout": 4.0, "server_timeout": 120.0}
    with machines(3) as network, launches(tmp_path, 3, 1, network, **fields) as run:
        if shutil.which("tc"):
            rate = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "64kbit", "burst", "4kb"]
            subprocess.run([*network[1].prefix, *rate, "latency", "2s"], check=True, capture_output=True)
        run.until(lambda: all(run.has_reached(rank, 20) for rank in range(3)))
        network[2].cut()
        back = time.monotonic() + 20
        run.until(lambda: "machine 2 is gone" in run.log(0))
        assert "no sign of life in 4 s" in run.log(0)
        # A worker may be writing the file at this very moment.
        here = next(int(text) for text in iter((tmp_path / "progress0").read_text, None) if text)
        run.until(lambda: run.has_reached(0, here + 10))  # nobody waits for it
        run.until(lambda: time.monotonic() > back)
        network[2].restore()
        run.until(lambda: run.log(0).count("machine 2 joined from") == 2)
        reports = run.reports(range(3))
        for process in run.processes:
            assert process.wait() == 0, run.story()
    assert len({report["end"] for report in reports}) == 1
    assert all(report["steps"] == 400 and report["error"] is None for report in reports)
    assert all(report["versions"] == sorted(report["versions"]) for report in reports)
    assert "did not come back" not in run.log(0)
    for machine in (1, 2):
        sums = sums_forwarded(run.log(machine))
        assert len(sums) <= 400 // 4
    assert sum(sums_forwarded(run.log(1))) == 400  # each of its steps crossed once, in one push a period


@needs_networks
@pytest.mark.skipif(shutil.which("tc") is None, reason="needs tc, of iproute2")
def test_workers_behind_a_slow_link_say_what_to_set_sync_steps_to(tmp_path):
    fields = {"max_steps": 500, "pause": 0.02, "sync_steps": 2, "logging_steps": 10, "optim": "adamw_torch"}
    with machines(2) as network, launches(tmp_path, 2, 1, network, **fields) as run:
        rate = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "16kbit", "burst", "2kb"]
        subprocess.run([*network[1].prefix, *rate, "latency", "2s"], check=True, capture_output=True)
        for process in run.processes:
            assert process.wait() == 0, run.story()
    quick, slow = ((tmp_path / f"launch{machine}.log").read_text() for machine in (0, 1))
    (said,) = re.findall(r"worker 1: the link .* takes (\d+) steps .* sync_steps=(\d+)", slow)
    assert said[0] == said[1]
    sums = sums_forwarded(run.log(1))
    assert 4 <= int(said[0]) <= max(sums)
    assert "the link to the other machines takes" not in quick


@needs_networks
def test_a_machine_that_vanishes_without_a_word_leaves_n_and_the_others_end(tmp_path):
    fields = {"max_steps": 160, "pause": 0.1, "machine_timeout": 3.0, "server_timeout": 8.0}
    with machines(3) as network, launches(tmp_path, 3, 1, network, **fields) as run:
        run.until(lambda: all(run.has_reached(rank, 20) for rank in range(3)))
        network[2].cut()
        kill_all_on(network[2])
        reports = run.reports(range(2))
        assert "machine 2 is gone" in run.log(0)
        assert "; 2 workers go on" in run.log(0)
        assert "machine 2 did not come back" in run.log(0)
        assert run.report(2) is None
    assert reports[0]["end"] == reports[1]["end"]
    assert all(report["steps"] == 160 and report["error"] is None for report in reports)


# A worker on a machine that was added by hand: `worker.py FOLDER`. It pushes once, and stays.
BY_HAND = """
import sys, time
from pathlib import Path

import torch

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.identity import Identity
from hf_lsam.joining import Timeouts
from hf_lsam.run import Run

folder = sys.argv[1]
run = Run(Identity(), Path(folder), Path(folder) / "log", folder, Timeouts(server_timeout=120.0))
settings = ServerSettings(sync_steps=4, anchor_momentum_correction=0.0)
worker = run.join([("x", torch.nn.Parameter(torch.zeros(5)))], WorkerSettings(4), settings)
print("joined at", worker.anchor[0].item(), flush=True)
worker.link.push(torch.full((5,), 0.3 * 4), 4, worker.version)
while True:
    worker.pull_newest()
    time.sleep(0.01)
"""


@pytest.mark.skipif(why_not(behind_a_router=True) is not None, reason=str(why_not(behind_a_router=True)))
def test_a_machine_that_was_added_by_hand_starts_again_and_joins_by_the_same_commands(tmp_path):
    (tmp_path / "worker.py").write_text(BY_HAND)
    secret = tmp_path / "secret"
    new_secret(secret)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}

    def start(machine: Machine, log: str, *words: str) -> subprocess.Popen:
        with (tmp_path / log).open("a") as file:
            command = [*machine.prefix, sys.executable, *words]
            return subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def story() -> str:
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(tmp_path.glob("*.log")))

    def said(text: str) -> int:
        return (tmp_path / "root.log").read_text().count(text)

    with machines(2, behind_a_router=True) as (first, second):
        where = f"{first.address}:29400"
        server = ["-m", "hf_lsam.server", "--secret_file", str(secret), "--run_dir"]
        processes = [start(first, "root.log", *server, str(tmp_path / "a"), "--listen", where, "--allow_remote")]
        # This process is the first machine's worker: a folder is found from any network.
        run = Run(Identity(), tmp_path, tmp_path / "log", str(tmp_path / "a"), Timeouts(server_timeout=130.0))
        try:
            wait_until(lambda: is_served(tmp_path / "a"), story)
            worker = run.join([("x", torch.nn.Parameter(torch.zeros(NUMEL)))], WorkerSettings(TAU), SETTINGS)
            assert machine_settings(RunFolder(tmp_path / "a")).server_timeout == 130.0

            def push_and_pull(expected: float) -> None:
                worker.link.settle()
                version = worker.version
                worker.link.push(torch.full((NUMEL,), 0.1 * TAU), TAU, version)
                wait_until(lambda: worker.pull_newest() or worker.version > version, story)
                assert worker.anchor[0].item() == pytest.approx(expected)

            for times in (1, 2):
                processes.append(start(second, "relay.log", *server, str(tmp_path / "b"), "--connect", where))
                processes.append(start(second, "worker.log", str(tmp_path / "worker.py"), str(tmp_path / "b")))
                wait_until(lambda n=times: said("with 1 workers") + said("has 1 live workers") == n, story)
                push_and_pull(0.3 * times - 0.1)  # by the mean of 0.1 and 0.3
                # Nothing has to reach the second machine, and through its router nothing does.
                assert (listening_ports(first), listening_ports(second)) == ([29400], [])
                kill_all_on(second)
                wait_until(lambda n=times: said("; 1 workers go on") == n, story)
                push_and_pull(0.3 * times)  # n is 1
                for left in ("socket", "server.json", "mailbox_0"):
                    assert (tmp_path / "b" / left).exists()
            for times in (3, 4):  # and after a relay that was told to end
                processes.append(start(second, "relay.log", *server, str(tmp_path / "b"), "--connect", where))
                wait_until(lambda n=times: (tmp_path / "relay.log").read_text().count("takes part as a") == n, story)
                processes[-1].terminate()
                assert processes[-1].wait() == SIGTERM_CODE, story()
                assert not (tmp_path / "b" / "version").exists()
            begun = re.findall(r"joined at ([\d.]+)", (tmp_path / "worker.log").read_text())
            assert [float(value) for value in begun] == pytest.approx([0.0, 0.3])
        finally:
            run.leave()
            for process in processes:
                process.kill()
                process.wait()


def listening_ports(machine: Machine) -> list[int]:
    """TCP ports of a machine that take connections."""
    command = [*machine.prefix, "cat", "/proc/net/tcp", "/proc/net/tcp6"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sockets = [line.split() for line in lines if "local_address" not in line]
    return [int(local.rpartition(":")[2], 16) for _, local, _, state, *_ in sockets if state == "0A"]


def kill_all_on(machine: Machine) -> None:
    inside = subprocess.run(["ip", "netns", "pids", machine.name], capture_output=True, text=True, check=True).stdout
    for process in inside.split():
        with suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)
