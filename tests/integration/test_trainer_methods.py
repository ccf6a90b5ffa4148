"""What a step can be made of: SAM's variants, one pass, couplings and merging, in numbers."""

from __future__ import annotations

import pytest
import torch
from models import blobs, net
from reference import assert_same_run, batches_of, logged, reference, sgd, train
from torch import nn

# --- SAM's variants ---


def test_sam_interval_perturbs_every_kth_step(tmp_path):
    trainer = train(tmp_path, net(), max_steps=8, sam_interval=3)
    steps = [[b] for b in batches_of(blobs())]
    expected = reference(net(), steps, sgd(), perturbs=lambda step: step % 3 == 0)
    assert_same_run(trainer, expected)
    reported = {e["step"]: e["lsam/sharpness"] for e in trainer.state.log_history if "lsam/sharpness" in e}
    assert list(reported) == [1, 4, 7]
    assert list(reported.values()) == pytest.approx([expected.sharpness[i] for i in (0, 3, 6)], rel=1e-3)


def test_sam_ascent_fraction_uses_the_first_rows_in_pass_1(tmp_path):
    trainer = train(tmp_path, net(), max_steps=4, sam_ascent_fraction=0.25, gradient_accumulation_steps=2)
    batches = batches_of(blobs())
    expected = reference(net(), [batches[i : i + 2] for i in range(0, 8, 2)], sgd(), ascent_rows=2)
    assert_same_run(trainer, expected)
    assert logged(trainer, "loss") == pytest.approx(expected.loss, rel=1e-4)


def test_sam_ascent_fraction_normalises_a_summed_loss_by_its_share_of_the_items(tmp_path):
    def total(outputs, labels, num_items_in_batch=None):
        return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    def summed(model, batch):
        return nn.functional.cross_entropy(model(batch["x"])["logits"], batch["labels"], reduction="sum")

    trainer = train(tmp_path, net(), max_steps=8, sam_ascent_fraction=0.25, sam_eps=0.5, compute_loss_func=total)
    steps = [[b] for b in batches_of(blobs())]
    fields = {"loss_of": summed, "loss_weight": lambda micro: 1 / 8, "ascent_rows": 2, "ascent_weight": 4.0}
    expected = reference(net(), steps, sgd(), eps=0.5, **fields)
    assert_same_run(trainer, expected)
    assert logged(trainer, "lsam/sharpness") == pytest.approx(expected.sharpness, rel=1e-3, abs=1e-6)


def test_sam_adaptive_measures_the_radius_in_units_of_the_weights(tmp_path):
    trainer = train(tmp_path, net(), max_steps=8, sam_adaptive=True, sam_rho=2.0)
    expected = reference(net(), [[b] for b in batches_of(blobs())], sgd(), rho=2.0, adaptive=True)
    assert_same_run(trainer, expected)


def test_langevin_noise_has_variance_two_eta_t_in_each_parameter_group(tmp_path):
    class Flat(nn.Module):
        """A loss without slope: only the noise moves the weights."""

        def __init__(self):
            super().__init__()
            self.slow, self.fast = (nn.Parameter(torch.zeros(100, 200)) for _ in range(2))

        def forward(self, x, labels=None):
            return {"loss": 0.0 * (self.slow.sum() + self.fast.sum())}

    model = Flat()
    groups = [{"params": [model.slow], "lr": 0.01}, {"params": [model.fast], "lr": 0.3}]
    trainer = train(
        tmp_path,
        model,
        max_steps=3,
        sam_rho=0.0,
        coupling_strength=0.0,
        langevin_temperature=0.5,
        optimizers=(torch.optim.SGD(groups), None),
    )
    steps = torch.stack(trainer.recorder.x)
    noise = torch.cat([steps[:1], steps.diff(dim=0)]).view(3, 2, -1)  # [step, group, weight]
    expected = torch.tensor([[2 * 0.01 * 0.5, 2 * 0.3 * 0.5]]).expand(3, 2)
    # 20,000 samples: the variance's standard error is 1 %.
    torch.testing.assert_close(noise.var(dim=2), expected, rtol=0.05, atol=0)
    assert noise.mean(dim=2).abs().max() < 5 * (0.3 / 20_000) ** 0.5
    assert torch.corrcoef(noise[:, 1])[0, 1].abs() < 0.04


# --- one pass, along a direction that is known before the step ---


@pytest.mark.parametrize("direction", ["momentum", "anchor"])
@pytest.mark.parametrize("coupling", ["decoupled", "merge"])
def test_one_pass_along_the_momentum_or_the_way_of_the_anchor(tmp_path, direction, coupling):
    fields = {"optim": "sgd", "optim_args": "momentum=0.9", "max_steps": 12, "coupling": coupling}
    trainer = train(tmp_path, net(), sam_direction=direction, **fields)
    steps = [[b] for b in (batches_of(blobs()) * 2)[:12]]
    expected = reference(net(), steps, sgd(momentum=0.9), coupling=coupling, direction=direction)
    plain = reference(net(), steps, sgd(momentum=0.9), coupling=coupling, rho=0.0)
    for ours, theirs in zip(trainer.recorder.x, expected.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (expected.x[-1] - plain.x[-1]).norm() > 1e-2
    assert all("lsam/sharpness" not in entry for entry in trainer.state.log_history)


def test_a_pass_along_the_momentum_needs_an_optimizer_that_keeps_one(tmp_path):
    with pytest.raises(ValueError, match=r"SGD keeps none.*optim_args='momentum=0.9'"):
        train(tmp_path, net(), max_steps=3, sam_direction="momentum", optim="sgd")
    train(tmp_path, net(), max_steps=3, sam_direction="momentum", optim="adamw_torch")


# --- coupling inside the score ---


def test_coupling_in_the_score_is_the_decoupled_one_at_the_learning_rate_that_this_leaves(tmp_path):
    # Decoupled: x - (1 - c) eta s - c (x - y). In the score: x - eta s - c (x - y). c = lambda0 / tau = 0.125.
    decoupled = train(tmp_path, net(), max_steps=12, sam_rho=0.05, learning_rate=0.08)
    score = train(tmp_path, net(), max_steps=12, sam_rho=0.05, learning_rate=0.07, coupling="score")
    for ours, theirs in zip(score.recorder.x, decoupled.recorder.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    steps = [[b] for b in (batches_of(blobs()) * 2)[:12]]
    assert_same_run(score, reference(net(), steps, sgd(0.07), rho=0.05, coupling="score"))


def test_coupling_in_the_score_with_momentum(tmp_path):
    fields = {"optim": "sgd", "optim_args": "momentum=0.9", "coupling_strength": 0.1}
    trainer = train(tmp_path, net(), max_steps=12, coupling="score", **fields)
    steps = [[b] for b in (batches_of(blobs()) * 2)[:12]]
    assert_same_run(trainer, reference(net(), steps, sgd(momentum=0.9), lambda0=0.1, coupling="score"))


def test_coupling_in_the_score_is_refused_with_other_optimizers(tmp_path):
    with pytest.raises(ValueError, match=r"coupling='score'.*rescale it per coordinate.*coupling='merge'.*SGD"):
        train(tmp_path, net(), max_steps=2, coupling="score", optim="adamw_torch")


# --- merging, the default; and the learning rate of a coupling that brakes ---


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_worker_that_merges(tmp_path, optim):
    # 15 steps: the last period is cut short, and its movement counts whole.
    trainer = train(tmp_path, net(), max_steps=15, coupling="merge", optim=optim)
    steps = [[b] for b in (batches_of(blobs()) * 2)[:15]]
    make = sgd() if optim == "sgd" else lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    assert_same_run(trainer, reference(net(), steps, make, coupling="merge"))


@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_compensated_coupling_steps_with_a_higher_rate_and_logs_both(tmp_path, scheduler):
    fields = {"max_steps": 12, "lr_scheduler_type": scheduler}
    raised = train(tmp_path, net(), learning_rate=0.02, compensate_coupling=True, **fields)
    factor = 1 + 0.5 / (0.8 * (1 - 0.5 / 4))
    by_hand = train(tmp_path, net(), learning_rate=0.02 * factor, **fields)
    for ours, theirs in zip(raised.recorder.x, by_hand.recorder.x, strict=True):
        torch.testing.assert_close(ours, theirs)
    first, other = raised.state.log_history[0], by_hand.state.log_history[0]
    assert first["learning_rate"] == pytest.approx(other["learning_rate"] / factor)
    assert first["lsam/worker_learning_rate"] == pytest.approx(other["learning_rate"])
    assert "lsam/worker_learning_rate" not in other
    assert raised.optimizer.param_groups[0]["lr"] == pytest.approx(by_hand.optimizer.param_groups[0]["lr"] / factor)
