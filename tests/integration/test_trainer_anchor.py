"""When a user sees the anchor and when x: evaluation, callbacks, logs, adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from models import arguments, blobs, net, sentences, tiny_bert, vector
from reference import LSAM, Recorder, assert_same_run, batches_of, logged, mean_loss, reference, sgd, train
from safetensors.torch import load_file
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.failure_signatures import FailureSignatures

# --- evaluation, callbacks, stopping, the best model ---


class Shown(TrainerCallback):
    """The parameters that callbacks find in the model."""

    def __init__(self):
        self.at_step_end, self.at_evaluation, self.at_save = {}, {}, {}

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.at_step_end[state.global_step] = vector(model)

    def on_evaluate(self, args, state, control, model=None, **keywords):
        self.at_evaluation[state.global_step] = vector(model)

    def on_save(self, args, state, control, model=None, **keywords):
        self.at_save[state.global_step] = vector(model)


def scripted(scores: list[float]) -> Callable:
    """compute_metrics that gives one score after the other."""
    left = iter(scores)
    return lambda prediction: {"score": next(left)}


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "score", "greater_is_better": True}


def test_callbacks_find_the_anchor_in_evaluations_and_x_in_steps(tmp_path):
    shown, held_out = Shown(), blobs(24, seed=5)
    trainer = train(
        tmp_path,
        net(),
        max_steps=10,
        eval_dataset=held_out,
        callbacks=[shown],
        **{**EVALUATION, "eval_steps": 5, "metric_for_best_model": None},
    )
    expected = reference(net(), [[b] for b in (batches_of(blobs()) * 2)[:10]], sgd())
    for step, x in shown.at_step_end.items():
        torch.testing.assert_close(x, expected.x[step - 1], rtol=1e-5, atol=2e-6)
    losses = logged(trainer, "eval_loss")
    assert list(shown.at_evaluation) == [5, 10]
    for step, loss in zip((5, 10), losses, strict=True):
        y = expected.y[step - 1]
        torch.testing.assert_close(shown.at_evaluation[step], y, rtol=1e-5, atol=2e-6)
        model = net()
        nn.utils.vector_to_parameters(y, model.parameters())
        with torch.no_grad():
            assert loss == pytest.approx(mean_loss(model, batches_of(held_out, 24)[0]).item(), rel=1e-4)
    assert (shown.at_evaluation[5] - shown.at_step_end[5]).abs().max() > 1e-3


def test_predict_is_the_anchors_while_training_and_after(tmp_path):
    class Predict(TrainerCallback):
        """Predicts after every step, from x as well."""

        def __init__(self):
            self.trainer, self.predictions = None, []

        def on_step_end(self, args, state, control, **keywords):
            x = vector(self.trainer.model)
            self.predictions.append(torch.from_numpy(self.trainer.predict(held_out).predictions))
            assert torch.equal(vector(self.trainer.model), x)

    held_out, predict = blobs(16, seed=3), Predict()
    args = arguments(LSAMConfig, tmp_path, max_steps=10, **LSAM)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[predict])
    predict.trainer = trainer
    trainer.train()
    predict.predictions.append(torch.from_numpy(trainer.predict(held_out).predictions))
    expected = reference(net(), [[b] for b in (batches_of(blobs()) * 2)[:10]], sgd())
    model = net()
    for ours, y in zip(predict.predictions, [*expected.y, expected.final_anchor], strict=True):
        nn.utils.vector_to_parameters(y, model.parameters())
        with torch.no_grad():
            torch.testing.assert_close(ours, model(batches_of(held_out, 16)[0]["x"])["logits"], rtol=1e-4, atol=1e-5)


def test_early_stopping(tmp_path):
    trainer = train(
        tmp_path,
        net(),
        max_steps=40,
        eval_dataset=blobs(8),
        compute_metrics=scripted([0.5, 0.6, 0.6, 0.4, 0.9]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
        **EVALUATION,
    )
    assert trainer.state.global_step == 8  # the best at 4, then two that are not better
    assert trainer.worker.local_steps == 8
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert torch.equal(trainer.model.first.weight, best["first.weight"])
    assert torch.equal(vector(trainer.model), trainer.recorder.y[3])


def test_load_best_model_at_end_loads_the_best_anchor(tmp_path):
    trainer = train(
        tmp_path,
        net(),
        max_steps=10,
        eval_dataset=blobs(8),
        compute_metrics=scripted([0.1, 0.2, 0.9, 0.3, 0.4, 0.5]),
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
        **EVALUATION,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")
    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, best[name]), name
    assert torch.equal(vector(trainer.model), trainer.recorder.y[5])
    assert not torch.equal(vector(trainer.model), trainer.recorder.y[-1])
    with trainer.local():
        assert torch.equal(vector(trainer.model), trainer.recorder.x[-1])
    assert torch.equal(vector(trainer.model), trainer.recorder.y[5])


# --- the anchor in the model and out of it ---


def test_anchor_puts_y_in_and_x_back_bit_for_bit(tmp_path):
    class Swap(TrainerCallback):
        def __init__(self):
            self.trainer, self.checked = None, 0

        def on_step_end(self, args, state, control, model=None, **keywords):
            x, y = vector(model), self.trainer.worker.anchor.clone()
            with self.trainer.anchor():
                assert torch.equal(vector(model), y)
                with self.trainer.anchor():
                    assert torch.equal(vector(model), y)
                assert torch.equal(vector(model), y)
            assert torch.equal(vector(model), x)
            with pytest.raises(KeyError), self.trainer.anchor():
                raise KeyError("an error inside")
            assert torch.equal(vector(model), x)
            assert not torch.equal(x, y)
            self.checked += 1

    swap = Swap()
    args = arguments(LSAMConfig, tmp_path, max_steps=9, **LSAM)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), callbacks=[swap])
    swap.trainer = trainer
    with pytest.raises(RuntimeError, match="once `train"), trainer.local():
        pass
    trainer.train()
    assert swap.checked == 9
    expected = reference(net(), [[b] for b in (batches_of(blobs()) * 2)[:9]], sgd())
    with trainer.anchor():  # the model holds it already
        torch.testing.assert_close(vector(trainer.model), expected.final_anchor, rtol=1e-5, atol=2e-6)
    with trainer.local():
        torch.testing.assert_close(vector(trainer.model), expected.x[-1], rtol=1e-5, atol=2e-6)
        local = trainer.evaluate(blobs(24, seed=5))["eval_loss"]
        with trainer.anchor():
            torch.testing.assert_close(vector(trainer.model), expected.x[-1], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(vector(trainer.model), expected.final_anchor, rtol=1e-5, atol=2e-6)
    model = net()
    nn.utils.vector_to_parameters(expected.x[-1], model.parameters())
    with torch.no_grad():
        assert local == pytest.approx(mean_loss(model, batches_of(blobs(24, seed=5), 24)[0]).item(), rel=1e-4)


def test_a_second_train_goes_on_from_the_anchor(tmp_path):
    args = arguments(LSAMConfig, tmp_path, max_steps=6, **LSAM)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs())
    trainer.train()
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.recorder = recorder
    trainer.optimizer = None
    middle = copy.deepcopy(trainer.model)
    trainer.train()
    assert_same_run(trainer, reference(middle, [[b] for b in batches_of(blobs())[:6]], sgd()))


# --- logging ---


def test_log_history_has_lsams_own_metrics(tmp_path):
    trainer = train(tmp_path, net(), max_steps=11, logging_steps=3)
    expected = reference(net(), [[b] for b in (batches_of(blobs()) * 2)[:11]], sgd())
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [3, 6, 9]
    for entry in entries:
        step = entry["step"]
        window = slice(step - 3, step)
        assert entry["loss"] == pytest.approx(sum(expected.loss[window]) / 3, rel=1e-4)
        assert entry["lsam/sharpness"] == pytest.approx(sum(expected.sharpness[window]) / 3, rel=1e-3)
        assert entry["lsam/drift"] == pytest.approx(expected.drift[step - 1], rel=1e-3)
        assert entry["lsam/anchor_version"] == step // 4
        # One worker hands its sums over within its process, at once.
        names = (
            "staleness",
            "skipped_pushes",
            "refused_pushes",
            "bytes_pushed",
            "bytes_pulled",
            "bytes_between_machines",
        )
        assert [entry[f"lsam/{name}"] for name in names] == [0] * len(names)
    assert trainer.worker_summary() == pytest.approx(
        {
            "steps": 11,
            "pushes": 3,
            "refused_pushes": 0,
            "skipped_pushes": 0,
            "bytes_pushed": 0,
            "bytes_pulled": 0,
            "bytes_between_machines": 0,
            "anchor_version": 3,
            "drift": expected.drift[-1],
            "staleness_mean": 0,
            "staleness_max": 0,
            "trainable_parameters": vector(net()).numel(),
        },
        rel=1e-3,
    )


def test_what_a_loss_of_your_own_logs_is_logged_as_it_is_and_takes_no_metrics_away(tmp_path):
    class Chatty(LSAMTrainer):
        def compute_loss(self, model, inputs, *positional, **keywords):
            loss = super().compute_loss(model, inputs, *positional, **keywords)
            if model.training:
                self.log({"loss": -1.0, "part": loss.item()})
            return loss

    quiet = train(tmp_path / "quiet", net(), max_steps=8, logging_steps=4)
    chatty = train(tmp_path / "chatty", net(), max_steps=8, logging_steps=4, kind=Chatty)
    own = [entry for entry in chatty.state.log_history if "part" in entry]
    assert len(own) == 16  # both passes of 8 steps
    assert all(set(entry) == {"loss", "part", "epoch", "step"} for entry in own)
    measured = [[e for e in t.state.log_history if "lsam/sharpness" in e] for t in (quiet, chatty)]
    assert measured[0] == measured[1]
    assert len(measured[0]) == 2
    records = [(tmp_path / name / "lsam" / "worker-0.jsonl").read_text().splitlines() for name in ("quiet", "chatty")]
    assert len(records[0]) == len(records[1])


def test_trackers_get_lsams_metrics(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = train(tmp_path, net(), max_steps=6, report_to="tensorboard", logging_steps=2)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("drift", "staleness", "anchor_version", "sharpness", "skipped_pushes", "bytes_pushed", "bytes_pulled"):
        scalars = events.Scalars(f"train/lsam/{name}")
        assert [scalar.step for scalar in scalars] == [2, 4, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx(logged(trainer, f"lsam/{name}"))
    assert events.Scalars("train/lsam/drift")[0].value > 0


# --- failure signatures ---


def test_growing_drift_is_reported_once():
    signatures = FailureSignatures(num_workers=2)
    warnings = [signatures.observe(0.01 * 1.3**k, 0.0, k, 0.1) for k in range(12)]
    assert [len(w) for w in warnings] == [0] * 6 + [1] + [0] * 5  # six log points after the first anchor has moved
    assert "raise coupling_strength if it is below 1" in warnings[6][0]


@pytest.mark.parametrize(
    "points",
    [
        [(0.01 * (1 - 0.5**k), k, 0.1) for k in range(1, 30)],  # rises to its level and stays
        [(0.01 + 0.002 * (k % 2), k, 0.1) for k in range(30)],
        [(0.01 * k, 0, 0.1) for k in range(30)],  # the first anchor, before any update
        [(0.01 * (1 + k % 16), k // 16, 0.1) for k in range(99)],  # from one anchor's arrival to the next one's
        [(0.01 * k, k, 0.001 * k) for k in range(1, 30)],  # warm-up
        [(0.01 * 0.9**k, k, 0.1 * 0.5**k) for k in range(30)],  # decay
        [(0.01 * 1.01**k, k, 0.1) for k in range(30)],  # with the weights
    ],
)
def test_healthy_drift_is_not_reported(points):
    signatures = FailureSignatures(num_workers=2)
    assert [signatures.observe(drift, 2.0, version, rate) for drift, version, rate in points] == [[]] * len(points)


def test_drift_that_grows_slowly_without_end_is_reported():
    signatures = FailureSignatures(num_workers=2)
    warned = [bool(signatures.observe(0.3 * 1.04**k, 0.0, k, 0.1)) for k in range(1, 15)]
    assert warned == [k == 12 for k in range(1, 15)]  # 1.04^11 = 1.54


def test_drift_that_is_not_finite_is_reported_at_once():
    assert len(FailureSignatures(num_workers=1).observe(float("nan"), 0.0, 0, 0.1)) == 1


def test_staleness_far_above_the_number_of_workers_is_reported_once():
    signatures = FailureSignatures(num_workers=4)
    assert signatures.observe(0.01, 16.0, 1, 0.1) == []
    (warning,) = signatures.observe(0.01, 16.5, 2, 0.1)
    assert "16.5 anchor versions" in warning
    assert "raise sync_steps" in warning
    assert signatures.observe(0.01, 40.0, 3, 0.1) == []


def test_a_link_that_takes_twice_sync_steps_is_reported_once():
    signatures = FailureSignatures(num_workers=4)
    assert [signatures.slow_link(steps, 4) for steps in (0, 4, 7)] == [None] * 3
    assert "with sync_steps=8." in signatures.slow_link(8, 4)
    assert signatures.slow_link(80, 4) is None


def test_a_run_that_falls_apart_is_warned_of_once(tmp_path, caplog):
    fields = {"learning_rate": 0.5, "sync_steps": 1, "coupling_strength": 0.0, "anchor_lr": 0.02}
    train(tmp_path, net(), max_steps=20, **fields)
    warnings = [record.getMessage() for record in caplog.records if "distance to the anchor" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("LSAM, worker 0: ")


def test_a_healthy_run_warns_of_nothing(tmp_path, caplog):
    train(tmp_path, net(), max_steps=96, sync_steps=16, lr_scheduler_type="cosine", warmup_steps=40)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("hf_lsam")] == []


# --- adapters ---


# peft asks the model by the old name of the property.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_trains_exchanges_and_saves_the_adapter_alone(tmp_path):
    def adapted():
        model = tiny_bert()
        torch.manual_seed(1)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=["query", "value"], task_type=peft.TaskType.SEQ_CLS)
        )

    model = adapted()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    trainer = train(tmp_path, model, sentences(), max_steps=10, learning_rate=0.3)

    def loss(model, batch):
        return model(**batch).loss

    steps = [[b] for b in (batches_of(sentences()) * 3)[:10]]
    expected = reference(adapted(), steps, sgd(0.3), loss_of=loss)
    assert_same_run(trainer, expected, rtol=1e-4, atol=1e-5)
    assert trainer.worker.anchor.numel() == sum(p.numel() for n, p in model.named_parameters() if n in trainable)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name]), name

    trainer.save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shown = peft.get_peft_model_state_dict(model)
    assert saved.keys() == shown.keys()
    assert len(saved) == len(trainable)
    for name in saved:
        assert torch.equal(saved[name], shown[name]), name
    assert (vector(model) - vector(adapted())).norm() > 0.05
