"""simulation.py: n workers under a virtual clock are n processes in lock step; what the clock does to them."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from launch import TESTS
from lockstep import ETA, MOMENTUM, RHO, LockstepNet, batch_generator, draw, loss_of
from torch import nn

from hf_lsam import NesterovAdamW
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.compression import encoded_bytes
from hf_lsam.loop import LoopArguments
from hf_lsam.parameters import ParameterLayout, trainable_parameters
from hf_lsam.server.lifetime import start_server
from hf_lsam.simulation import Cluster, DataParallel, Gradient, Machine
from hf_lsam.simulation.exchange import SimulatedServer
from hf_lsam.transport.mailbox import RunFolder
from scripts.common.simulated import make_run

TAU = 4


def cluster(machines: list[Machine], worker=None, server=None, **options) -> Cluster:
    """A cluster on `LockstepProblem`'s problem; the batches do not depend on its seed."""
    generators = [batch_generator(100 + rank) for rank in range(len(machines))]

    def loss(model: nn.Module, rank: int):
        x = draw(generators[rank])
        return lambda: loss_of(model, x)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, ETA, MOMENTUM)

    worker = worker or WorkerSettings(TAU)
    server = server or ServerSettings(worker.sync_steps, algorithm=worker.algorithm)
    return Cluster(LockstepNet(), optimizer, loss, machines, worker, server, Gradient(RHO), **options)


def digest(vector: torch.Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("coupling", ["merge", "decoupled"])
def test_4_equal_workers_without_latency_are_processes_in_lock_step_bit_for_bit(tmp_path, coupling):
    workers, steps = 3, 4 * TAU
    simulated = cluster([Machine()] * workers, WorkerSettings(TAU, 0.7, coupling))
    *_, _ = simulated.run(steps)

    path = tmp_path / "run"
    path.mkdir()
    named = trainable_parameters(LockstepNet())
    layout = ParameterLayout(named)
    start = layout.read([p for _, p in named], torch.empty(layout.numel))
    run = {"fingerprint": layout.fingerprint.hex(), "settings": ServerSettings(TAU).as_dict()}
    folder = RunFolder.create(path, start, workers, layout.manifest, run)
    server = start_server(folder.path, tmp_path / "server.log")
    script = TESTS / "lockstep.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(path), str(rank), "0.7", coupling],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]

    def ask(rank: int, request: str):
        processes[rank].stdin.write(request + "\n")
        processes[rank].stdin.flush()
        return json.loads(processes[rank].stdout.readline())

    try:
        assert [json.loads(process.stdout.readline()) for process in processes] == ["joined"] * workers
        for _ in range(steps):
            for rank in range(workers):
                assert ask(rank, "step") == "stepped"
        x = [ask(rank, "digest")[0] for rank in range(workers)]
        for process in processes:
            process.stdin.write("finish\n")
            process.stdin.flush()
        finals = [json.loads(process.stdout.readline())[1] for process in processes]
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()
        server.wait(60)
    assert x == [digest(vector) for vector in simulated.workers]
    assert finals == [digest(simulated.anchor)] * workers


def test_a_run_is_a_function_of_its_seed():
    machines = [Machine(1.0, jitter=0.3, latency=0.2, bandwidth=1e3), Machine(1.7, jitter=0.3, latency=0.1)]

    def final(seed: int) -> torch.Tensor:
        *_, last = cluster(machines, seed=seed).run(20)
        return last.anchor

    assert torch.equal(final(0), final(0))
    assert not torch.equal(final(0), final(1))  # of jitter alone


def test_fast_workers_wait_for_nobody_and_slow_ones_are_stale():
    moments = [*cluster([Machine(1.0), Machine(3.0, latency=5.0)]).run(24, moments=3)]
    assert [moment.steps for moment in moments] == [8, 16, 24]
    assert [moment.seconds for moment in moments] == [8.0, 16.0, 72.0 + 5.0]
    assert moments[0].steps_in_all == 8 + 2
    assert moments[-1].steps_in_all == 48
    assert max(moment.staleness for moment in moments) > 0


def test_a_push_crosses_the_link_at_its_bandwidth_and_latency():
    numel = ParameterLayout(trainable_parameters(LockstepNet())).numel
    one_way = 0.5 + 4 * numel / 100.0
    run = cluster([Machine(latency=0.5, bandwidth=100.0)])
    seen = [(m.seconds, m.bytes) for m in run.run(12)]
    # The last push leaves at 12 s and arrives one transfer later.
    assert seen[-1][0] == pytest.approx(12 + one_way)
    pushes = 3 if one_way + 0.5 <= TAU else 2  # one that finds the last not yet answered goes out with the next
    assert seen[-1][1] >= 4 * numel * pushes


def test_a_server_that_pushes_keep_busy_takes_them_one_after_another():
    """Four workers push every TAU seconds, each of which the server takes `seconds` for."""
    free, saturated = cluster([Machine()] * 4, push_seconds=TAU / 8), cluster([Machine()] * 4, push_seconds=TAU / 2)
    *_, last = free.run(3 * TAU)
    assert free.server.core.accepted_pushes == 12
    assert last.seconds == 3 * TAU + 4 * TAU / 8  # the last four, pushed at once at the end
    *_, last = saturated.run(3 * TAU)
    # At 2 TAU two of the four have their answer and push; the others' movement goes with what all hand in at the end.
    assert saturated.server.core.accepted_pushes == 4 + 2 + 4
    assert last.seconds == TAU + 10 * TAU / 2
    assert last.staleness > 0


def test_a_barrier_makes_everyone_as_slow_as_the_slowest_and_its_link():
    free = [Machine(1.0), Machine(2.0)]
    *_, last = cluster(free, barrier=True).run(3 * TAU)
    assert last.seconds == 3 * TAU * 2.0
    far = [Machine(1.0, latency=0.25), Machine(2.0, latency=0.25)]
    *_, last = cluster(far, barrier=True).run(3 * TAU)
    assert last.seconds == pytest.approx(3 * TAU * 2.0 + 2 * 2 * 0.25 + 0.25)  # there and back twice, and there


def test_no_worker_waits_for_an_anchor_that_has_arrived():
    """Times are sums of floats: (now + transfer) - transfer may be before now, as here it is."""
    (end,) = cluster([Machine(step_seconds=0.1), Machine(step_seconds=0.1, latency=0.3127)], barrier=True).run(5 * TAU)
    assert end.steps_in_all == 2 * 5 * TAU


def test_a_run_in_which_a_worker_waits_for_ever_is_an_error(monkeypatch):
    monkeypatch.setattr(SimulatedServer, "await_anchor", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"workers 0, 1 still have steps"):
        list(cluster([Machine(latency=0.25)] * 2, barrier=True).run(3 * TAU))


def test_a_worker_that_dies_leaves_n_and_one_that_joins_begins_at_the_anchor():
    run = cluster([Machine(), Machine(dies_at=6.5), Machine(joins_at=9.0)])
    moments = [*run.run(12, moments=2)]
    assert moments[-1].steps_in_all == 12 + 6 + 12
    assert moments[-1].seconds == 9.0 + 12.0
    assert torch.isfinite(moments[-1].anchor).all()


def test_a_pause_holds_up_its_worker_alone():
    *_, last = cluster([Machine(), Machine(pauses=((4.5, 10.0),))]).run(8)
    assert last.seconds == 18.0
    assert last.steps_in_all == 16


@pytest.mark.parametrize(("until", "is_dropped"), [(1000.0, True), (100.0, False)])
def test_what_a_worker_has_done_before_a_long_pause_is_dropped(until, is_dropped):
    """As if it had died before it woke: 48 anchors have passed by until 1,000 s, and 12 until 100 s."""

    def final(**fate):
        paused = Machine(pauses=((6.5, until - 6.5),), **fate)
        *_, last = cluster([Machine(), paused], share_steps=True).run(200)
        return last.anchor

    assert torch.equal(final(), final(dies_at=until - 1.0)) == is_dropped


def test_data_parallel_is_one_worker_with_the_mean_gradient():
    machines = [Machine(1.0), Machine(2.0, latency=0.1, bandwidth=1e4)]
    generators = [batch_generator(rank) for rank in range(2)]

    def loss(model, rank):
        x = draw(generators[rank])
        return lambda: loss_of(model, x)

    run = DataParallel(LockstepNet(), lambda p: torch.optim.SGD(p, ETA, MOMENTUM), loss, machines, Gradient())
    *_, last = run.run(5)
    model, again = LockstepNet(), [batch_generator(rank) for rank in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), ETA, MOMENTUM)
    for _ in range(5):
        (sum(loss_of(model, draw(generator)) for generator in again) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(last.anchor, expected, rtol=1e-5, atol=1e-6)
    all_reduce = 2 * (0.1 + 4 * len(expected) / 2 / 1e4)
    assert last.seconds == pytest.approx(5 * (2.0 + all_reduce))
    assert last.bytes == 5 * 2 * 2 * 4 * len(expected)


def sgd(parameters):
    return torch.optim.SGD(parameters, ETA, MOMENTUM)


def nesterov_sgd(parameters):
    return torch.optim.SGD(parameters, ETA, MOMENTUM, nesterov=True)


@pytest.mark.parametrize(
    ("at_workers", "reference", "seeds"),
    [
        pytest.param(sgd, nesterov_sgd, (0, 1), id="SGD"),
        # Each worker divides by the size of its own gradient: the same for all where they see the same batches.
        pytest.param(torch.optim.AdamW, partial(NesterovAdamW, betas=(0.9, 0.99)), (0, 0), id="AdamW"),
    ],
)
def test_momentum_at_the_anchor_is_nesterovs_where_workers_exchange_every_step(at_workers, reference, seeds):
    generators, again = ([batch_generator(seed) for seed in seeds] for _ in range(2))

    def loss(model, rank):
        x = draw(generators[rank])
        return lambda: loss_of(model, x)

    made, _ = make_run(
        LoopArguments(momentum_at="anchor", sync_steps=1, exchange_bits=32, scale_learning_rate=False),
        LockstepNet(),
        at_workers,
        loss,
        [Machine()] * 2,
        Gradient(),
        lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        seed=0,
        barrier=True,
    )
    *_, last = made.run(6)
    model = LockstepNet()
    optimizer = reference(model.parameters())
    for _ in range(6):
        (sum(loss_of(model, draw(generator)) for generator in again) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(last.anchor, nn.utils.parameters_to_vector(model.parameters()).detach())


@pytest.mark.parametrize("direction", ["momentum", "anchor"])
def test_one_pass_perturbs_along_what_is_known_before_the_step(direction):
    """A lone worker of plain steps and few exchanges, against the loop written out."""
    generator, again = batch_generator(0), batch_generator(0)

    def loss(model, rank):
        x = draw(generator)
        return lambda: loss_of(model, x)

    made = Cluster(
        LockstepNet(),
        lambda parameters: torch.optim.SGD(parameters, ETA, MOMENTUM),
        loss,
        [Machine()],
        WorkerSettings(TAU, keeps_anchor_move=direction == "anchor"),
        ServerSettings(TAU),
        Gradient(RHO, sam_direction=direction),
    )
    steps = 3 * TAU
    *_, last = made.run(steps)

    model = LockstepNet()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, ETA, MOMENTUM)
    anchors = [torch.nn.utils.parameters_to_vector(parameters).detach().clone()]
    for step in range(steps):
        x = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
        if direction == "momentum" and step:
            along = torch.cat([-optimizer.state[p]["momentum_buffer"].flatten() for p in parameters])
        else:  # with one worker and lambda_0 = eta' = 1 the anchor is x at the last exchange
            along = anchors[-2] - anchors[-1] if len(anchors) > 1 else None
        moved = x if along is None else x + RHO * along / along.norm()
        torch.nn.utils.vector_to_parameters(moved, parameters)
        loss_of(model, draw(again)).backward()
        torch.nn.utils.vector_to_parameters(x, parameters)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % TAU == 0:
            anchors.append(torch.nn.utils.parameters_to_vector(parameters).detach().clone())
    torch.testing.assert_close(last.anchor, anchors[-1], rtol=1e-4, atol=1e-5)


def test_easgd_runs_in_it():
    server = ServerSettings(TAU, algorithm="easgd", moving_rate=0.3)
    *_, last = cluster([Machine(), Machine(1.5)], WorkerSettings(TAU, 0.3, algorithm="easgd"), server).run(16)
    assert math.isfinite(last.anchor.norm().item())
    assert last.bytes > 0


def test_in_lsgd_the_worker_with_the_lowest_loss_leads_whoever_pushes_last():
    scales = (1.0, 0.1, 10.0)

    def loss(model, rank):
        x = draw(torch.Generator().manual_seed(0))
        return lambda: scales[rank] * loss_of(model, x)

    made = Cluster(
        LockstepNet(),
        lambda parameters: torch.optim.SGD(parameters, ETA),
        loss,
        [Machine()] * 3,
        WorkerSettings(TAU, 0.0, algorithm="lsgd"),
        ServerSettings(TAU, algorithm="lsgd"),
    )
    *_, last = made.run(2 * TAU)
    assert torch.equal(last.anchor, made.workers[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_rounding_holds_back_goes_with_the_next_push(bits):
    made = cluster([Machine()] * 3, server=ServerSettings(TAU, exchange_bits=bits))
    *_, last = made.run(10 * TAU)
    exchanges, size = 10, encoded_bytes(made.layout.numel, bits)
    assert 3 * (2 * exchanges - 1) * size <= last.bytes <= 3 * (2 * exchanges + 1) * size
    *_, reference = cluster([Machine()] * 3).run(10 * TAU)
    # Without feedback, the rounding of 10 exchanges would add up; with it, about one is left.
    assert 0 < (last.anchor - reference.anchor).norm() < (0.2 if bits == 4 else 0.02) * reference.anchor.norm()


def test_workers_that_share_their_steps_do_not_wait_for_the_slowest():
    steps = 12 * TAU
    *_, alone = cluster([Machine(1.0), Machine(2.0)]).run(steps)
    assert alone.seconds == 2.0 * steps
    made = cluster([Machine(1.0), Machine(2.0)], share_steps=True)
    half, last = made.run(steps, moments=2)
    assert last.seconds == steps * 4 / 3  # not 2: what both together take for 2 * steps
    assert [each.done for each in made._workers] == [steps * 4 / 3, steps * 2 / 3]
    assert half.steps_in_all == steps  # half of the run
    *_, even = cluster([Machine()] * 2, share_steps=True).run(steps)
    *_, before = cluster([Machine()] * 2).run(steps)
    assert torch.equal(even.anchor, before.anchor)  # equally fast workers make what they made


def test_the_schedule_of_shared_steps_follows_the_run():
    rates: dict[int, list[float]] = {}

    def linear(optimizer):
        mine = rates.setdefault(len(rates), [])
        optimizer.register_step_pre_hook(lambda optimizer, *_: mine.append(optimizer.param_groups[0]["lr"]))
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 24)

    made = cluster([Machine(1.0), Machine(2.0), Machine(1.0, joins_at=10.5)], share_steps=True, make_scheduler=linear)
    *_, _ = made.run(24)
    assert sum(each.done for each in made._workers) == 3 * 24
    # The last steps of all are among the last three of the run's 72, at the schedule's last.
    assert [mine[-1] for mine in rates.values()] == pytest.approx([ETA / 24] * 3)
    assert rates[0][:4] == pytest.approx([ETA * (1 - step // 3 / 24) for step in (0, 2, 3, 5)])
    assert rates[2][0] == pytest.approx(ETA * (1 - (11 + 6) // 3 / 24))  # where the run was when it came
    assert all(later <= earlier for mine in rates.values() for earlier, later in pairwise(mine))


def test_what_a_worker_that_dies_has_left_the_others_make():
    made = cluster([Machine(), Machine(dies_at=6.5)], share_steps=True)
    *_, last = made.run(12)
    assert last.steps_in_all == 2 * 12 - 1  # but for the step in which it died
    assert last.seconds == 17.0


def test_four_workers_with_a_scaled_learning_rate_step_with_twice_of_it():
    def anchor(rate: float, **lsam) -> torch.Tensor:
        generators = [batch_generator(100 + rank) for rank in range(4)]

        def loss(model: nn.Module, rank: int):
            x = draw(generators[rank])
            return lambda: loss_of(model, x)

        def optimizer(parameters):
            return torch.optim.AdamW(parameters, rate, weight_decay=0.0)

        def scheduler(optimizer):
            return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

        arguments, machines = LoopArguments(**lsam), [Machine()] * 4
        made, _ = make_run(arguments, LockstepNet(), optimizer, loss, machines, Gradient(), scheduler, seed=0)
        return [moment.anchor for moment in made.run(3 * TAU)][-1]

    assert torch.equal(anchor(0.001), anchor(0.002, scale_learning_rate=False))
    assert not torch.equal(anchor(0.001), anchor(0.001, scale_learning_rate=False))
