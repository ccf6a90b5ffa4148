"""rules.py: EASGD and LSGD against the update equations of their papers; LSAM's rule is in test_server.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hf_lsam.server.core import ServerCore, ServerSettings
from hf_lsam.server.local import LocalLink
from hf_lsam.worker import Worker, WorkerSettings

WORKERS, TAU, ETA, SIZE = 3, 4, 0.1, 6


class Quadratics:
    """n workers on f_i(x) = ||x - t_i||^2 / 2, joined to one server of the given rule, taking turns step by step."""

    def __init__(self, rule: str, strength: float, coupling: str = "decoupled"):
        generator = torch.Generator().manual_seed(3)
        self.targets = torch.randn(WORKERS, SIZE, generator=generator)
        start = torch.randn(SIZE, generator=generator)
        self.core = ServerCore(start.clone(), ServerSettings(TAU, anchor_lr=strength, rule=rule))
        self.x = [nn.Parameter(start.clone()) for _ in range(WORKERS)]
        settings = WorkerSettings(TAU, strength, coupling, rule=rule)
        self.workers = [Worker([("x", x)], LocalLink(self.core, number), settings) for number, x in enumerate(self.x)]

    def loss(self, number: int) -> torch.Tensor:
        return (self.x[number] - self.targets[number]).square().sum() / 2

    def step(self, number: int) -> None:
        worker, x = self.workers[number], self.x[number]
        worker.pull_newest()
        loss = self.loss(number)
        loss.backward()
        worker.note_loss(loss.detach())
        worker.before_optimizer_step([ETA])
        with torch.no_grad():
            x -= ETA * x.grad
        x.grad = None
        worker.after_optimizer_step([ETA])


def test_elastic_is_asynchronous_easgd():
    """arXiv 1412.6651, Algorithm 1: when tau divides t_i, with e = alpha (x_i - c):  x_i -= e  and  c += e."""
    alpha = 0.25
    ours = Quadratics("elastic", alpha)
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
    """arXiv 1905.10395:  x_i <- x_i - eta g_i - lambda (x_i - leader); the leader: lowest mean loss of tau steps.

    The paper's lambda is lambda0 / tau here, inside the gradient: coupling="score".
    """
    strength = 0.4
    ours = Quadratics("leader", strength, coupling="score")
    x = [p.detach().double() for p in ours.x]
    leader = x[0].clone()
    last = [math.inf] * WORKERS
    losses: list[list[float]] = [[] for _ in range(WORKERS)]
    leaders = []
    for time in range(1, 41):
        for number in range(WORKERS):
            target = ours.targets[number].double()
            losses[number].append(((x[number] - target).square().sum() / 2).item())
            pull = strength / TAU * (x[number] - leader)
            x[number] = x[number] - ETA * (x[number] - target) - pull
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
    core = ServerCore(torch.zeros(2), ServerSettings(TAU, rule="leader"))
    assert core.push(torch.ones(2), TAU, worker=0, loss=5.0)
    assert core.push(torch.ones(2) * 2, TAU, worker=1, loss=loss)
    assert core.anchor.vector.tolist() == [1.0, 1.0]


def test_a_leader_that_leaves_can_be_followed_by_one_with_a_higher_loss():
    core = ServerCore(torch.zeros(2), ServerSettings(TAU, rule="leader"))
    core.push(torch.ones(2), TAU, worker=0, loss=1.0)
    core.push(torch.ones(2) * 2, TAU, worker=1, loss=2.0)
    assert core.anchor.vector.tolist() == [1.0, 1.0]
    core.leave(0)
    core.push(torch.ones(2) * 3, TAU, worker=1, loss=2.5)
    assert core.anchor.vector.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("rule", ["elastic", "leader"])
def test_a_restored_server_goes_on_as_the_first_would(rule):
    settings = ServerSettings(TAU, anchor_lr=0.3, rule=rule)
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
    ours = Quadratics("elastic", 0.5)
    link = ours.workers[0].link
    for _ in range(TAU - 1):
        ours.step(0)
    link.can_push = False
    before, anchor = ours.x[0].detach().clone(), ours.core.anchor.vector.clone()
    ours.step(0)
    torch.testing.assert_close(ours.x[0].detach(), before - ETA * (before - ours.targets[0]))
    assert torch.equal(ours.core.anchor.vector, anchor)
    assert ours.workers[0].skipped_pushes == 1
