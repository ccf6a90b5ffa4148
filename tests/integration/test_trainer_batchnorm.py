"""BatchNorm under SAM and at the anchor."""

from __future__ import annotations

import copy
import gc
import json
import random

import psutil
import pytest
import torch
from models import HIDDEN, Net, Rows, Stream, arguments, blobs, net, vector
from reference import LSAM, assert_same_run, batches_of, mean_loss, reference, sgd, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.batchnorm import STATISTICS


def cumulative_statistics(model: Net, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean over the batches of each batch's mean and unbiased variance before the BatchNorm layer."""
    with torch.no_grad():
        hidden = [model.first(batch["x"]) for batch in batches]
    return torch.stack([h.mean(0) for h in hidden]).mean(0), torch.stack([h.var(0) for h in hidden]).mean(0)


def eval_loss(model: Net, parameters: Tensor, mean: Tensor, variance: Tensor, rows: Rows) -> float:
    """Cross entropy over the rows at given parameters and BatchNorm statistics, in evaluation mode."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        nn.utils.vector_to_parameters(parameters, model.parameters())
        model.norm.running_mean.copy_(mean)
        model.norm.running_var.copy_(variance)
        return mean_loss(model, batches_of(rows, len(rows))[0]).item()


def test_pass_2_leaves_batchnorm_statistics_alone(tmp_path):
    class Statistics(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model=None, **keywords):
            self.seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    runs = []
    for config, kind in ((LSAMConfig, LSAMTrainer), (TrainingArguments, Trainer)):
        statistics = Statistics()
        fields = {"learning_rate": 0.0, **({} if kind is Trainer else LSAM)}
        args = arguments(config, tmp_path, max_steps=3, gradient_accumulation_steps=2, **fields)
        kind(model=net(batchnorm=True), args=args, train_dataset=blobs(), callbacks=[statistics]).train()
        runs.append(statistics.seen)
    for ours, plain in zip(*runs, strict=True):
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert torch.equal(ours[name], plain[name]), name
    assert [seen["norm.num_batches_tracked"].item() for seen in runs[0]] == [2, 4, 6]


def test_pass_2_leaves_the_statistics_of_a_model_from_model_init_alone(tmp_path):
    """Trainer makes another model when training begins: the layers are that one's."""
    args = arguments(LSAMConfig, tmp_path, max_steps=6, batchnorm_statistics="worker", **LSAM)
    trainer = LSAMTrainer(model_init=lambda: net(batchnorm=True), args=args, train_dataset=blobs())
    trainer.session.signatures.batchnorm_not_reestimated()  # known here, and not what this test is about
    for _ in range(2):  # and another one when it begins again
        trainer.train()
        assert trainer.model.norm.num_batches_tracked == 6


class Frozen(Net):
    """Its BatchNorm stays in evaluation mode."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self


def frozen_net() -> Frozen:
    torch.manual_seed(0)
    model = Frozen(batchnorm=True)
    model.norm.running_mean.fill_(0.5)
    model.norm.running_var.fill_(2.0)
    return model


@pytest.mark.parametrize("statistics", STATISTICS)
def test_frozen_batchnorm_stays_as_it_was(tmp_path, statistics):
    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **keywords):
            assert_as_it_was(model)

    def assert_as_it_was(model):
        assert model.norm.running_mean.tolist() == [0.5] * HIDDEN
        assert model.norm.running_var.tolist() == [2.0] * HIDDEN
        assert model.norm.num_batches_tracked == 0

    fields = {"eval_strategy": "steps", "eval_steps": 3, "eval_dataset": blobs(8), "landscape_points": 5}
    trainer = train(tmp_path, frozen_net(), max_steps=8, batchnorm_statistics=statistics, callbacks=[Watch()], **fields)
    assert_as_it_was(trainer.model)
    trainer.evaluate()
    assert_as_it_was(trainer.model)
    anchor = net(batchnorm=True)
    anchor.load_state_dict(trainer.model.state_dict())
    anchor.eval()
    with torch.no_grad():
        expected = mean_loss(anchor, batches_of(blobs(), 32)[0]).item()
    landscape = json.loads((tmp_path / "lsam" / "landscape.json").read_text())
    assert landscape["lines"]["0"][landscape["fractions"].index(0.0)] == pytest.approx(expected, rel=1e-5)


def test_the_landscape_is_normalised_by_the_batch(tmp_path):
    trainer = train(tmp_path, net(batchnorm=True), max_steps=8, landscape_points=5)
    at_anchor = copy.deepcopy(dict(trainer.model.named_buffers()))
    with torch.no_grad():
        losses = [mean_loss(trainer.model.train(), batch).item() for batch in batches_of(blobs())[:4]]
    landscape = json.loads((tmp_path / "lsam" / "landscape.json").read_text())
    shown = landscape["lines"]["0"][landscape["fractions"].index(0.0)]
    assert shown == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert at_anchor["norm.num_batches_tracked"] == 8  # the scan's batches did not enter


def test_batchnorm_model_as_in_the_reference(tmp_path):
    trainer = train(tmp_path, net(batchnorm=True), max_steps=8)
    assert_same_run(trainer, reference(net(batchnorm=True), [[b] for b in batches_of(blobs())], sgd()))


def test_batchnorm_statistics_are_re_estimated_at_the_anchor(tmp_path):
    class Around(TrainerCallback):
        """The worker's buffers before and after an evaluation."""

        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 6:
                self.before = copy.deepcopy(dict(model.named_buffers()))

        def on_evaluate(self, args, state, control, model=None, metrics=None, **keywords):
            if state.global_step == 6:
                self.metrics, self.shown = metrics, vector(model)

        def on_step_begin(self, args, state, control, model=None, **keywords):
            if state.global_step == 6:
                self.after = copy.deepcopy(dict(model.named_buffers()))

    around, held_out = Around(), blobs(24, seed=5)
    trainer = train(
        tmp_path,
        net(batchnorm=True, dropout=0.3),
        max_steps=8,
        eval_strategy="steps",
        eval_steps=6,
        eval_dataset=held_out,
        batchnorm_batches=5,
        callbacks=[around],
    )
    template = net(batchnorm=True)
    y = trainer.recorder.y[5]
    assert torch.equal(around.shown, y)
    nn.utils.vector_to_parameters(y, template.parameters())
    mean, variance = cumulative_statistics(template, batches_of(blobs())[:5])
    assert around.metrics["eval_loss"] == pytest.approx(eval_loss(template, y, mean, variance, held_out), rel=1e-5)
    own = eval_loss(template, y, around.before["norm.running_mean"], around.before["norm.running_var"], held_out)
    assert abs(around.metrics["eval_loss"] - own) > 1e-3  # the worker's own statistics give another loss
    for name, buffer in around.before.items():
        assert torch.equal(buffer, around.after[name]), name
    assert around.after["norm.num_batches_tracked"] == 6

    # After training the model holds the last anchor with statistics to match, and that is what is saved.
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    nn.utils.vector_to_parameters(vector(trainer.model), template.parameters())
    mean, variance = cumulative_statistics(template, batches_of(blobs())[:5])
    torch.testing.assert_close(saved["norm.running_mean"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(saved["norm.running_var"], variance, rtol=1e-5, atol=1e-6)
    assert torch.equal(saved["first.weight"], trainer.model.first.weight)


def test_one_anchor_is_shown_with_the_same_statistics_each_time_whatever_the_sampler_draws_from(tmp_path):
    class Shuffled(torch.utils.data.Sampler):
        def __len__(self):
            return 64

        def __iter__(self):
            return iter(random.sample(range(64), 64))

    class Own(LSAMTrainer):
        def _get_train_sampler(self, *positional, **keywords):
            return Shuffled()

    class Watch(TrainerCallback):
        def __init__(self):
            self.means = []

        def on_evaluate(self, args, state, control, model=None, **keywords):
            self.means.append(model.norm.running_mean.clone())

    watch = Watch()
    fields = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": blobs(8), "batchnorm_batches": 3}
    train(tmp_path, net(batchnorm=True), kind=Own, max_steps=3, callbacks=[watch], **fields)  # before the first push
    assert len(watch.means) == 3
    assert all(torch.equal(mean, watch.means[0]) for mean in watch.means)


def test_local_evaluates_a_batchnorm_model_with_the_workers_own_statistics(tmp_path):
    class Last(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            self.buffers = copy.deepcopy(dict(model.named_buffers()))

    last, held_out = Last(), blobs(24, seed=5)
    trainer = train(tmp_path, net(batchnorm=True), max_steps=8, eval_dataset=held_out, callbacks=[last])
    at_anchor = copy.deepcopy(dict(trainer.model.named_buffers()))
    with trainer.local():
        for name, buffer in trainer.model.named_buffers():
            assert torch.equal(buffer, last.buffers[name]), name
        metrics = trainer.evaluate()
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, at_anchor[name]), name
    mean, variance = last.buffers["norm.running_mean"], last.buffers["norm.running_var"]
    expected = eval_loss(net(batchnorm=True), trainer.recorder.x[-1], mean, variance, held_out)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_batchnorm_that_is_never_re_estimated_is_warned_of_once(tmp_path, caplog):
    train(
        tmp_path,
        net(batchnorm=True),
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=blobs(8),
        batchnorm_statistics="worker",
    )
    warnings = [record.getMessage() for record in caplog.records if "batchnorm_statistics" in record.getMessage()]
    assert len(warnings) == 1
    assert "Use batchnorm_statistics='reestimate'" in warnings[0]


@pytest.mark.parametrize("rows", [blobs(), Stream(blobs())])
def test_evaluations_re_estimate_from_one_loader_and_the_same_batches(tmp_path, rows):
    """Accelerate keeps every loader that it prepares."""
    made, means = [], []

    class Own(LSAMTrainer):
        def get_train_dataloader(self):
            made.append(super().get_train_dataloader())
            return made[-1]

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, model=None, **keywords):
            means.append(model.norm.running_mean.clone())

    fields = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": blobs(8), "batchnorm_batches": 3}
    train(tmp_path, net(batchnorm=True), rows, kind=Own, max_steps=3, callbacks=[Watch()], **fields)
    assert len(made) == 2  # the other one is trained from
    assert len(means) == 3
    assert all(torch.equal(mean, means[0]) for mean in means)  # nothing is pushed before the last


def test_loader_processes_that_persist_do_not_grow_in_number_with_evaluations(tmp_path):
    """Of the training batches that each evaluation re-estimates from, none may stay."""

    class Children(TrainerCallback):
        def __init__(self):
            self.seen, self.before = [], set(psutil.Process().children())

        def on_evaluate(self, args, state, control, **keywords):
            self.seen.append(len(set(psutil.Process().children()) - self.before))

    children = Children()
    fields = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "batchnorm_batches": 2}
    args = arguments(LSAMConfig, tmp_path, max_steps=8, eval_strategy="steps", eval_steps=2, **fields, **LSAM)
    rows = blobs()
    trainer = LSAMTrainer(
        model=net(batchnorm=True), args=args, train_dataset=rows, eval_dataset=rows, callbacks=[children]
    )
    trainer.train()
    assert len(children.seen) == 4
    assert max(children.seen) <= 2  # one of the loader that is trained from, one of the loader that is evaluated on
    trainer.callback_handler.train_dataloader = trainer.callback_handler.eval_dataloader = None
    trainer._eval_dataloaders = {}
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
