"""algorithms: EASGD and LSGD against the update equations of their papers; LSAM's rule is in test_server.py."""

from __future__ import annotations

import math

import pytest
import torch
from links import SlowServerLink
from torch import nn

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.coupling import drift_slowdown
from hf_lsam.server.core import RelayCore, ServerCore
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.worker import Worker

WORKERS, TAU, ETA, SIZE = 3, 4, 0.1, 6


class Quadratics:
    """n workers on f_i(x) = ||x - t_i||^2 / 2, joined to one server, taking turns step by step."""

    def __init__(self, algorithm: str, strength: float):
        generator = torch.Generator().manual_seed(3)
        self.targets = torch.randn(WORKERS, SIZE, generator=generator)
        start = torch.randn(SIZE, generator=generator)
        self.core = ServerCore(start.clone(), ServerSettings(TAU, algorithm=algorithm, moving_rate=strength))
        self.x = [nn.Parameter(start.clone()) for _ in range(WORKERS)]
        settings = WorkerSettings(TAU, strength, algorithm=algorithm)
        links = [SlowServerLink(self.core, number) for number in range(WORKERS)]
        self.workers = [Worker([("x", x)], link, settings) for x, link in zip(self.x, links, strict=True)]

    def loss(self, number: int) -> torch.Tensor:
        return (self.x[number] - self.targets[number]).square().sum() / 2

    def step(self, number: int) -> None:
        worker, x = self.workers[number], self.x[number]
        worker.pull_newest()
        loss = self.loss(number)
        loss.backward()
        worker.note_loss(loss.detach(), 1.0)
        worker.before_optimizer_step([ETA])
        with torch.no_grad():
            x -= ETA * x.grad
        x.grad = None
        worker.after_optimizer_step([ETA])


def test_elastic_is_asynchronous_easgd():
    """arXiv 1412.6651, Algorithm 1: when tau divides t_i, with e = alpha (x_i - c):  x_i -= e  and  c += e."""
    alpha = 0.25
    ours = Quadratics("easgd", alpha)
    x = [p.detach().double() for p in ours.x]
    centre = x[0].clone()
    for time in range(1, 41):
        for number in range(WORKERS):
            x[number] = x[number] - ETA * (x[number] - ours.targets[number].double())
            if time % TAU == 0:
                elastic = alpha * (x[number] - centre)
                x[number], centre = x[number] - elastic, centre + elastic
            ours.step(number)
        for number in range(WORKERS):
            torch.testing.assert_close(ours.x[number].detach().double(), x[number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.core.anchor.vector.double(), centre, rtol=1e-5, atol=1e-5)
    assert ours.core.anchor.version == WORKERS * 40 // TAU


def test_leader_is_asynchronous_lsgd():
    """arXiv 1905.10395:  x_i <- x_i - eta g_i, x_i <- x_i - lambda (x_i - leader); who had the lowest mean loss leads.

    The paper's lambda is lambda0 / tau here.
    """
    strength = 0.4
    ours = Quadratics("lsgd", strength)
    x = [p.detach().double() for p in ours.x]
    leader = x[0].clone()
    last = [math.inf] * WORKERS
    losses: list[list[float]] = [[] for _ in range(WORKERS)]
    leaders = []
    for time in range(1, 41):
        for number in range(WORKERS):
            target = ours.targets[number].double()
            losses[number].append(((x[number] - target).square().sum() / 2).item())
            x[number] = x[number] - ETA * (x[number] - target)
            x[number] = x[number] - strength / TAU * (x[number] - leader)
            if time % TAU == 0:
                last[number] = sum(losses[number]) / TAU
                losses[number] = []
                if last[number] == min(last):
                    leader = x[number].clone()
                    leaders.append(number)
            ours.step(number)
            torch.testing.assert_close(ours.x[number].detach().double(), x[number], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.core.anchor.vector.double(), leader, rtol=1e-5, atol=1e-5)
    assert len(set(leaders)) > 1  # the lead has changed hands
    assert ours.core.anchor.version == len(leaders)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_worker_without_a_finite_loss_never_leads(loss):
    core = ServerCore(torch.zeros(2), ServerSettings(TAU, algorithm="lsgd"))
    assert core.push(torch.ones(2), TAU, worker=0, loss=5.0)
    assert core.push(torch.ones(2) * 2, TAU, worker=1, loss=loss)
    assert core.anchor.vector.tolist() == [1.0, 1.0]


def test_a_leader_that_leaves_can_be_followed_by_one_with_a_higher_loss():
    core = ServerCore(torch.zeros(2), ServerSettings(TAU, algorithm="lsgd"))
    core.push(torch.ones(2), TAU, worker=0, loss=1.0)
    core.push(torch.ones(2) * 2, TAU, worker=1, loss=2.0)
    assert core.anchor.vector.tolist() == [1.0, 1.0]
    core.leave(0)
    core.push(torch.ones(2) * 3, TAU, worker=1, loss=2.5)
    assert core.anchor.vector.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("algorithm", ["easgd", "lsgd"])
def test_a_server_whose_anchor_every_push_moves_takes_nobodys_word(algorithm):
    core = ServerCore(torch.zeros(2), ServerSettings(TAU, algorithm=algorithm, moving_rate=0.3))
    assert not core.push(torch.tensor([1.0, math.nan]), TAU, finite=True)
    assert (core.anchor.version, core.anchor.vector.tolist()) == (0, [0.0, 0.0])


@pytest.mark.parametrize("algorithm", ["easgd", "lsgd"])
def test_a_restored_server_goes_on_as_the_first_would(algorithm):
    settings = ServerSettings(TAU, algorithm=algorithm, moving_rate=0.3)
    core = ServerCore(torch.zeros(3), settings)
    pushes = [(torch.randn(3), worker % 2, float(worker % 3)) for worker in range(8)]
    for vector, worker, loss in pushes[:4]:
        core.push(vector, TAU, worker, loss)
    copy = ServerCore(torch.zeros(3), settings)
    copy.load_state_tensors({name: tensor.clone() for name, tensor in core.state_tensors().items()})
    for vector, worker, loss in pushes[4:]:
        core.push(vector, TAU, worker, loss)
        copy.push(vector, TAU, worker, loss)
    assert copy.anchor.version == core.anchor.version
    assert torch.equal(copy.anchor.vector, core.anchor.vector)


def test_an_elastic_worker_moves_only_together_with_the_anchor():
    """A worker whose mailbox is still full must not give away what the centre does not receive."""
    ours = Quadratics("easgd", 0.5)
    link = ours.workers[0].link
    for _ in range(TAU - 1):
        ours.step(0)
    link.busy = True
    before, anchor = ours.x[0].detach().clone(), ours.core.anchor.vector.clone()
    ours.step(0)
    torch.testing.assert_close(ours.x[0].detach(), before - ETA * (before - ours.targets[0]))
    assert torch.equal(ours.core.anchor.vector, anchor)
    assert ours.workers[0].skipped_pushes == 1


# --- merging workers (coupling="merge") against the methods that are its corners ---


class MergingWorkers:
    """n SGD workers on f_i(x) = ||x - t_i||^2 / 2 in lock step: a period each, in turn, then the new anchor."""

    def __init__(self, share: float, workers: int = WORKERS, **server):
        generator = torch.Generator().manual_seed(3)
        self.targets = torch.randn(workers, SIZE, generator=generator)
        self.start = torch.randn(SIZE, generator=generator)
        self.core = ServerCore(self.start.clone(), ServerSettings(TAU, **server))
        self.x = [nn.Parameter(self.start.clone()) for _ in range(workers)]
        links = [SlowServerLink(self.core, number) for number in range(workers)]
        settings = WorkerSettings(TAU, share)
        self.workers = [Worker([("x", x)], link, settings) for x, link in zip(self.x, links, strict=True)]

    def steps(self, number: int, count: int = TAU) -> None:
        for _ in range(count):
            with torch.no_grad():
                self.x[number] -= ETA * (self.x[number] - self.targets[number])
            self.workers[number].after_optimizer_step([ETA])

    def period(self) -> None:
        for number in range(len(self.workers)):
            self.steps(number)
        for worker in self.workers:
            worker.pull_newest()


def local_period(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """tau steps of every worker, in float64."""
    for _ in range(TAU):
        x = x - ETA * (x - targets)
    return x


@pytest.mark.parametrize(
    ("server", "momentum"),
    [({}, 0.0), ({"anchor_lr": 0.7, "anchor_optimizer": "nesterov", "anchor_momentum": 0.9}, 0.9)],
    ids=["local SGD", "DiLoCo"],
)
def test_workers_that_merge_fully_are_local_sgd_and_with_nesterov_diloco(server, momentum):
    """DiLoCo (arXiv 2311.08105), Algorithm 1: y <- OuterOpt(y, mean_i(y - x_i)), x_i <- y; local SGD: y <- mean x_i."""
    ours = MergingWorkers(1.0, **server)
    targets, y, velocity = ours.targets.double(), ours.start.double(), torch.zeros(SIZE, dtype=torch.float64)
    lr = server.get("anchor_lr", 1.0)
    for _ in range(12):
        gradient = (y - local_period(y.expand(WORKERS, SIZE), targets)).mean(0)
        velocity = momentum * velocity + gradient
        y = y - lr * (gradient + momentum * velocity)
        ours.period()
        torch.testing.assert_close(ours.core.anchor.vector.double(), y, rtol=1e-5, atol=1e-5)
        for x in ours.x:
            torch.testing.assert_close(x.detach().double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9])
def test_a_merge_brakes_nobody_and_lets_deviations_shrink_by_what_is_left(share):
    """With eta' = 1 the anchor is the mean of the workers, for every lambda0, and moves as their mean moves; what sets
    a worker apart from the mean is 1 - lambda0 of what it was, after each exchange."""
    ours = MergingWorkers(share)
    x = ours.start.double().expand(WORKERS, SIZE)
    for _ in range(12):
        moved = local_period(x, ours.targets.double())
        mean = moved.mean(0)
        x = mean + (1 - share) * (moved - mean)
        ours.period()
        torch.testing.assert_close(ours.core.anchor.vector.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(list(ours.x)).detach().double(), x, rtol=1e-5, atol=1e-5)


def test_a_merge_keeps_what_the_worker_has_done_since_it_handed_in():
    """The delta rule: x <- y_new + (x - x at the push), though the anchor comes three steps late."""
    ours = MergingWorkers(1.0, workers=2)
    ours.steps(0)
    at_push = ours.x[0].detach().clone()
    ours.steps(0, 3)
    since = ours.x[0].detach() - at_push
    ours.steps(1)  # completes the period
    ours.workers[0].pull_newest()
    assert ours.core.anchor.version == 1
    torch.testing.assert_close(ours.x[0].detach(), ours.core.anchor.vector + since)


def test_an_anchor_that_does_not_count_a_push_yet_leaves_its_movement_to_the_worker():
    ours = MergingWorkers(1.0, workers=2)
    link, worker, x = ours.workers[0].link, ours.workers[0], ours.x[0]
    ours.steps(0)
    moved = x.detach() - ours.start
    link.counted_late_at = 1  # as if it had come in after the update that made version 1 ...
    ours.core.anchor.vector.add_(5.0)
    ours.core.anchor.version = 1
    worker.pull_newest()
    torch.testing.assert_close(x.detach(), ours.start + 5.0 + moved)
    ours.core.anchor.vector.add_(moved / 2)  # ... and counts in version 2
    ours.core.anchor.version = 2
    worker.pull_newest()
    torch.testing.assert_close(x.detach(), ours.core.anchor.vector)


def test_a_worker_whose_pushes_are_skipped_hands_all_of_its_movement_in_later():
    ours = MergingWorkers(1.0, workers=1)
    ours.workers[0].link.busy = True
    ours.steps(0)
    ours.workers[0].link.busy = False
    ours.steps(0)
    expected = local_period(local_period(ours.start.double(), ours.targets[0].double()), ours.targets[0].double())
    torch.testing.assert_close(ours.core.anchor.vector.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_merging_worker_goes_on_from_its_state_as_it_would_have():
    ours, other = MergingWorkers(0.6), MergingWorkers(0.6)
    ours.period()
    ours.steps(0, 2)
    for number, worker in enumerate(ours.workers):
        state = {name: tensor.clone() for name, tensor in worker.state_tensors().items()}
        other.workers[number].load_state_tensors(state)
    other.core.load_state_tensors({name: tensor.clone() for name, tensor in ours.core.state_tensors().items()})
    for cluster in (ours, other):
        cluster.steps(0, TAU - 2)
        cluster.steps(1)
        cluster.steps(2)
        cluster.period()
    assert all(torch.equal(a, b) for a, b in zip(ours.x, other.x, strict=True))
    assert torch.equal(ours.core.anchor.vector, other.core.anchor.vector)


def test_a_merging_worker_goes_on_from_the_state_of_one_that_did_not_merge():
    """Such a state has no r: x is where the worker begins to hand in, and the next anchor draws it from there."""
    share, core = 0.6, ServerCore(torch.zeros(SIZE), ServerSettings(TAU))
    stepwise = nn.Parameter(torch.zeros(SIZE))
    before = Worker([("x", stepwise)], InProcessLink(core), WorkerSettings(TAU, 0.1, "decoupled"))

    def steps(x: nn.Parameter, worker: Worker, count: int) -> None:
        for _ in range(count):
            with torch.no_grad():
                x -= ETA * (x - torch.arange(1.0, SIZE + 1))
            worker.after_optimizer_step([ETA])

    steps(stepwise, before, TAU + 2)
    state = {name: tensor.clone() for name, tensor in before.state_tensors().items()}
    assert "known" not in state
    assert state["total"].abs().min() > 0  # of the two steps of a period that the new worker does not hand in

    x = nn.Parameter(torch.randn(SIZE))
    worker = Worker([("x", x)], InProcessLink(core), WorkerSettings(TAU, share))
    worker.load_state_tensors(state)
    assert torch.equal(x, stepwise)
    assert torch.equal(worker.state_tensors()["known"], stepwise)
    assert (worker.local_steps, worker.version, core.anchor.version) == (TAU + 2, 1, 1)

    anchor, begun, own = core.anchor.vector.clone(), x.detach().clone(), x.detach().clone()
    for _ in range(TAU - 2):
        own -= ETA * (own - torch.arange(1.0, SIZE + 1))
    steps(x, worker, TAU - 2)
    torch.testing.assert_close(core.anchor.vector, anchor + own - begun)  # y moves as the worker has, and no further
    torch.testing.assert_close(x.detach(), own + share * (core.anchor.vector - own))
    assert torch.equal(worker.state_tensors()["known"], x)
    assert worker.steps_in_total == 0

    anchor, begun, own = core.anchor.vector.clone(), x.detach().clone(), x.detach().clone()
    for _ in range(TAU):
        own -= ETA * (own - torch.arange(1.0, SIZE + 1))
    steps(x, worker, TAU)
    torch.testing.assert_close(core.anchor.vector, anchor + own - begun)
    torch.testing.assert_close(x.detach(), own + share * (core.anchor.vector - own))


@pytest.mark.parametrize("coupling", ["decoupled", "score"])
@pytest.mark.parametrize(("strength", "anchor_lr"), [(0.1, 1.0), (0.4, 1.0), (2.0, 1.5)])
def test_a_coupling_at_every_step_slows_a_steady_drift_by_its_closed_form(coupling, strength, anchor_lr):
    """With SGD's momentum m, lambda0 in the score is lambda0 / (1 - m) after the step, but for where it is measured."""
    momentum, tau, slope, eta = 0.8, 8, 2.0, 0.01
    if coupling == "score":
        strength *= 1 - momentum
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=eta, momentum=momentum)
    core = ServerCore(torch.zeros(1), ServerSettings(tau, anchor_lr))
    worker = Worker([("x", x)], InProcessLink(core), WorkerSettings(tau, strength, coupling))

    def drift(steps: int) -> None:
        for _ in range(steps):
            x.grad = torch.full((1,), -slope, dtype=torch.float64)
            worker.before_optimizer_step([eta])
            optimizer.step()
            worker.after_optimizer_step([eta])

    drift(100 * tau)
    before = core.anchor.vector.clone()
    drift(10 * tau)
    speed = (core.anchor.vector - before).item() / (10 * tau)
    unbraked = eta * slope / (1 - momentum)
    slowdown = drift_slowdown(strength, tau, anchor_lr, coupling == "score", momentum)
    assert speed == pytest.approx(unbraked / slowdown, rel=1e-3)


@pytest.mark.parametrize("coupling", ["merge", "decoupled"])
def test_a_difference_counts_with_the_rows_that_its_worker_has_seen(coupling):
    def run(weights: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        core = ServerCore(torch.zeros(3), ServerSettings(2))
        xs = [nn.Parameter(torch.zeros(3)) for _ in weights]
        links = [InProcessLink(core, rank, weight=weight) for rank, weight in enumerate(weights)]
        strength = 1.0 if coupling == "merge" else 0.0
        workers = [
            Worker([("x", x)], link, WorkerSettings(2, strength, coupling, weight=weight))
            for x, link, weight in zip(xs, links, weights, strict=True)
        ]
        for _ in range(2):
            for rank, (x, worker) in enumerate(zip(xs, workers, strict=True)):
                x.data += (rank + 1) * torch.tensor([0.1, 0.2, 0.3])
                worker.after_optimizer_step([0.1])
        for worker in workers:
            worker.pull_newest()
        return core.anchor.vector.clone(), [x.detach().clone() for x in xs]

    move = torch.tensor([0.2, 0.4, 0.6]) if coupling == "merge" else torch.tensor([0.15, 0.3, 0.45])
    anchor, xs = run([1, 3])  # of 8 and of 24 rows
    torch.testing.assert_close(anchor, move * (1 * 1 + 3 * 2) / 4)
    if coupling == "merge":  # all that was handed in is counted: they hold y
        for x in xs:
            torch.testing.assert_close(x, anchor)
    torch.testing.assert_close(run([1, 1])[0], move * 1.5)


@pytest.mark.parametrize("relayed", [False, True])
def test_where_the_worker_with_most_rows_leaves_the_others_move_the_anchor_as_far_as_they_move(relayed):
    """The mean is over the rows of those that take part: it was over those of all that had begun."""
    settings = ServerSettings(TAU, pushes_movement=True)
    root = ServerCore(torch.zeros(2), settings)
    cores = [RelayCore(torch.zeros(2), settings) for _ in range(2)] if relayed else [root, root]

    def push(worker: int, movement: float) -> None:
        weight = (3, 1)[worker]
        core = cores[worker]
        core.push(torch.full((2,), weight * TAU * movement), weight * TAU, worker)
        if isinstance(core, RelayCore):
            vector, steps, number, _ = core.claim()
            root.push(vector, steps, -1 - worker)
            core.answered(number)

    for worker, weight in enumerate((3, 1)):
        cores[worker].join(worker, weight)
        if relayed:
            root.count(-1 - worker, 1, weight)
    push(1, 1.0)
    assert root.anchor.version == 0
    push(0, 2.0)
    assert root.anchor.vector.tolist() == pytest.approx([(3 * 2 + 1 * 1) / 4] * 2)
    cores[0].leave(0)
    if relayed:
        root.count(-1, 0, 0)
    push(1, 1.0)
    assert root.anchor.version == 2
    assert root.anchor.vector.tolist() == pytest.approx([7 / 4 + 1] * 2)


@pytest.mark.parametrize("steps", [TAU, 1])  # a period's, or what a coupled worker has left of one
@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov"])
def test_workers_that_end_one_after_the_other_move_the_anchor_as_those_do_that_end_together(steps, workers, optimizer):
    """However n shrinks meanwhile: the mean of n counts each worker's last push with 1/n."""
    ends = []
    for one_after_the_other in (True, False):
        core = ServerCore(torch.zeros(2), ServerSettings(TAU, anchor_optimizer=optimizer, anchor_momentum=0.8))
        for worker in range(workers):
            core.join(worker)
        for worker in range(workers):
            core.push(torch.full((2,), float(steps)), steps, worker)
            if one_after_the_other:
                core.leave(worker)
        for worker in range(workers):
            core.leave(worker)
        core.flush()
        ends.append(core.anchor.vector[0].item())
    far = (1 + 0.8 * (optimizer == "nesterov")) * steps / TAU
    assert ends == pytest.approx([far, far])
    assert core.anchor.version == 1


def test_a_worker_that_leaves_without_a_push_in_the_period_completes_it():
    core = ServerCore(torch.zeros(2), ServerSettings(TAU))
    core.join(0)
    core.count(1000, 2, 2)  # two workers of another machine
    core.push(torch.ones(2) * TAU, TAU, 0)
    core.count(1000, 1, 1)
    assert core.anchor.version == 0
    core.count(1000, 0, 0)
    assert (core.anchor.version, core.anchor.vector.tolist()) == (1, [1.0, 1.0])
