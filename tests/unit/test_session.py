"""What Trainer and a hand-written loop share, through both: a radius on a schedule, learning rates, totals."""

from __future__ import annotations

import math

import pytest
import torch
from models import arguments, blobs, net, vector
from torch import nn
from toy_loop import LSAM_FIELDS, batches, network, train
from transformers import TrainerCallback

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.metrics import WorkerMetrics
from hf_lsam.optimizers import StepHooks
from hf_lsam.server.core import ServerCore
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.worker import Worker


def in_a_loop(model: nn.Module, learning_rate: float = 0.05, **fields) -> LSAM:
    return LSAM(model, torch.optim.SGD(model.parameters(), learning_rate), **{**LSAM_FIELDS, **fields})


def step(lsam: LSAM, model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return lsam.step(lambda: nn.functional.cross_entropy(model(x), labels))


class EverySecondStep(TrainerCallback):
    """A schedule of the radius that is what `sam_interval=2` does."""

    trainer: LSAMTrainer

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.sam_rho = 0.0 if state.global_step % 2 else args.sam_rho


def test_a_schedule_of_the_radius_in_a_loop():
    expected_model, model = network(), network()
    optimizer = torch.optim.SGD(expected_model.parameters(), lr=0.05)
    _, expected, losses = train(expected_model, optimizer, steps=7, sam_interval=2)
    lsam, seen = in_a_loop(model), []
    torch.manual_seed(5)
    with lsam:
        for number, (x, labels) in enumerate(batches(7)):
            lsam.sam_rho = 0.0 if number % 2 else LSAM_FIELDS["sam_rho"]
            seen.append(step(lsam, model, x, labels))
        assert torch.equal(lsam.worker.own_parameters, expected)
    assert torch.equal(torch.stack(seen), losses)


def test_a_schedule_of_the_radius_from_a_callback(tmp_path):
    def run(folder: str, callbacks: list[TrainerCallback], **fields) -> LSAMTrainer:
        args = arguments(LSAMConfig, tmp_path / folder, max_steps=7, sync_steps=2, sam_rho=0.1, **fields)
        trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=callbacks)
        for callback in callbacks:
            callback.trainer = trainer
        trainer.train()
        return trainer

    schedule = EverySecondStep()
    scheduled, expected = run("schedule", [schedule]), run("interval", [], sam_interval=2)
    assert torch.equal(vector(scheduled.model), vector(expected.model))
    assert not torch.equal(vector(scheduled.model), vector(run("constant", []).model))
    assert scheduled.sam_rho == 0.1  # the last step perturbed
    assert scheduled.args.sam_rho == 0.1


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf, "0.1", None])
def test_a_radius_out_of_range_is_refused_and_the_old_one_stays(radius):
    lsam = in_a_loop(network())
    with pytest.raises(ValueError, match="`sam_rho` must be a number in"):
        lsam.sam_rho = radius
    assert lsam.sam_rho == LSAM_FIELDS["sam_rho"]


def test_a_direction_that_is_kept_from_the_beginning_is_not_switched_on_later():
    lsam = in_a_loop(network(), sam_direction="anchor", sam_rho=0.0)
    with pytest.raises(ValueError, match=r"began with sam_rho=0.*Configure a positive sam_rho"):
        lsam.sam_rho = 0.1
    lsam.sam_rho = 0.0
    configured = in_a_loop(network(), sam_direction="anchor", sam_rho=0.1)
    configured.sam_rho = 0.0
    configured.sam_rho = 0.2


def test_the_learning_rates_are_those_of_a_state_that_is_loaded_within_a_run():
    model = network()
    other = torch.optim.SGD(model.parameters(), lr=0.01)
    lsam = in_a_loop(model, coupling="score")
    with lsam:
        lsam.optimizer.load_state_dict(other.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1.0
        lsam.sam_rho = 0.0
        lsam.step(lambda: sum((0.0 * parameter).sum() for parameter in model.parameters()))
        # lambda = lambda0 / (eta tau): with another eta than the optimizer's, the coupling would be another share.
        distance = lsam.worker.own_parameters - lsam.worker.anchor
        factor = lsam.arguments.learning_rate_factor(4, other)
        share = LSAM_FIELDS["coupling_strength"] / LSAM_FIELDS["sync_steps"]
        assert factor > 1
        torch.testing.assert_close(distance, torch.full_like(distance, 1.0 - share))
        assert lsam.log()["lsam/worker_learning_rate"] == pytest.approx(0.01 * factor)


def test_the_totals_of_a_run_are_there_while_it_goes_on_and_after():
    model = network()
    lsam = in_a_loop(model)
    with pytest.raises(RuntimeError, match="has not joined a run yet"):
        lsam.worker_summary()
    with lsam:
        for x, labels in batches(6):
            step(lsam, model, x, labels)
        under_way = lsam.worker_summary()
    assert under_way["steps"] == 6
    assert under_way["pushes"] == 1
    assert under_way["drift"] > 0
    after = lsam.worker_summary()
    assert after["pushes"] == 2  # what was left was handed in
    assert after["drift"] == under_way["drift"]  # not that of the anchor from itself


def test_totals_take_nothing_away_from_the_next_log_point():
    x = nn.Parameter(torch.zeros(3))
    link = InProcessLink(ServerCore(torch.zeros(3), ServerSettings(2)))
    metrics = WorkerMetrics(Worker([("x", x)], link, WorkerSettings(2)))
    for staleness in (1, 3):
        link._status = link.status.after_answer(True, 0, staleness)
    assert metrics.of_run()["staleness_mean"] == 2
    assert metrics.since_last_log()["lsam/staleness"] == 2
    link._status = link.status.after_answer(True, 0, 8)
    assert metrics.since_last_log()["lsam/staleness"] == 8
    assert metrics.of_run()["staleness_mean"] == 4
    assert metrics.of_run()["staleness_max"] == 8


def test_a_momentum_that_is_the_anchors_and_changes_is_an_error():
    weight = nn.Parameter(torch.zeros(2))
    worker = Worker([("w", weight)], InProcessLink(ServerCore(torch.zeros(2), ServerSettings(2)), 0), WorkerSettings(2))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)  # which moves the momentum too
    hooks = StepHooks(optimizer, worker, shared_momentum=optimizer.param_groups[0]["momentum"])
    weight.grad = torch.ones(2)
    hooks.before_step()
    optimizer.step()
    hooks.after_step()
    scheduler.step()
    with pytest.raises(
        ValueError, match=r"momentum was 0.95 when the run began and is 0\.\d+ now.*cycle_momentum=False"
    ):
        hooks.before_step()
    assert optimizer.param_groups[0]["momentum"] < 0.95  # as it was left


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_loss_that_a_leader_is_chosen_by_is_that_of_a_step_however_many_batches_make_it(accumulation):
    model = network().eval()  # without dropout
    fields = {"sync_steps": 2, "algorithm": "lsgd", "coupling_strength": 0.1, "sam_rho": 0.0}
    lsam = in_a_loop(model, learning_rate=0.0, gradient_accumulation_steps=accumulation, **fields)
    with lsam:
        reported, push = [], lsam.worker.link.push
        lsam.worker.link.push = lambda total, steps, version, loss: (
            reported.append(loss) or push(total, steps, version, loss)
        )
        ((x, labels),) = batches(1)
        loss = nn.functional.cross_entropy(model(x), labels).item()
        for _ in range(2 * accumulation):
            step(lsam, model, x, labels)
    assert reported == pytest.approx([loss])
