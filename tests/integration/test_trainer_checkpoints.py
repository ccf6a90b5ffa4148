"""What is saved and taken up again: half precision, resuming, optimizers that average."""

from __future__ import annotations

import os
import shutil
import signal

import peft
import pytest
import torch
from models import arguments, blobs, net, texts, tiny_gpt2, vector
from reference import LSAM, assert_same_run, batches_of, mean_loss, reference, sgd, train, train_plain
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.checkpoint import SERVER_STATE, WORKER_STATE, is_sealed
from hf_lsam.transport.base import ServerGone

# --- checkpoints in half precision ---


def stored_in(dtype: torch.dtype, folder, seed: int = 0) -> str:
    """A folder with `tiny_gpt2` as most of the Hub keeps it: in half precision."""
    tiny_gpt2(seed).to(dtype).save_pretrained(folder)
    return str(folder)


def dtypes_in(folder) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_checkpoint_in_half_precision_is_trained_in_float32_and_saved_as_it_was(tmp_path, caplog, dtype, autocast):
    folder = stored_in(dtype, tmp_path / "hub")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    numel = sum(p.numel() for p in model.parameters())
    fields = {"max_steps": 10, "bf16": autocast, "optim": "adamw_torch", "learning_rate": 0.01}
    trainer = train(tmp_path / "half", model, texts(), **fields)
    told = [r.getMessage() for r in caplog.records if "cast to float32" in r.getMessage()]
    assert len(told) == 1
    assert f"takes {2 * numel:,} bytes more" in told[0]
    same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = train(tmp_path / "single", same, texts(), **fields)
    for ours, theirs in zip(trainer.recorder.x, expected.recorder.x, strict=True):
        assert torch.equal(ours, theirs)
    anchor = vector(model)
    assert anchor.dtype == torch.float32
    assert torch.equal(anchor, vector(same))
    assert not torch.equal(anchor, anchor.to(dtype).float())  # there is something that saving must not round away
    assert model.lm_head.weight is model.transformer.wte.weight
    trainer.save_model(tmp_path / "saved")
    assert torch.equal(vector(model), anchor)
    assert dtypes_in(tmp_path / "saved") == {dtype}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert torch.equal(vector(loaded), anchor.to(dtype))
    assert (anchor - vector(AutoModelForCausalLM.from_pretrained(folder)).float()).norm() > 0.1


def test_a_run_from_half_precision_resumes_bit_for_bit(tmp_path):
    folder = stored_in(torch.bfloat16, tmp_path / "hub")
    other = stored_in(torch.bfloat16, tmp_path / "other", seed=9)
    fields = {"max_steps": 10, "optim": "adamw_torch", "learning_rate": 0.01, "save_strategy": "steps", "save_steps": 6}
    through = train(tmp_path / "run", AutoModelForCausalLM.from_pretrained(folder), texts(), **fields)
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert dtypes_in(checkpoint) == {torch.bfloat16}
    at_6 = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(vector(at_6), through.recorder.y[5].bfloat16())
    model = AutoModelForCausalLM.from_pretrained(other)
    resumed = train(tmp_path / "run", model, texts(), resume=str(checkpoint), **fields)
    assert len(resumed.recorder.x) == 4
    for ours, theirs in zip(resumed.recorder.x, through.recorder.x[6:], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed.recorder.y, through.recorder.y[6:], strict=True):
        assert torch.equal(ours, theirs)
    # A worker without a state of its own begins at the server's anchor, which is float32, not at the saved weights.
    (checkpoint / WORKER_STATE).unlink()
    starts = []

    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **keywords):
            starts.append(vector(model))

    model = AutoModelForCausalLM.from_pretrained(other)
    train(tmp_path / "run", model, texts(), resume=str(checkpoint), callbacks=[Start()], **fields)
    server = load_file(checkpoint / SERVER_STATE)
    assert any(torch.equal(starts[0], t) for t in server.values() if t.shape == starts[0].shape)
    assert not torch.equal(starts[0], starts[0].bfloat16().float())


def test_the_best_of_a_run_from_half_precision_is_what_was_saved_of_it(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(stored_in(torch.bfloat16, tmp_path / "hub"))
    fields = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = train(
        tmp_path / "run",
        model,
        texts(),
        max_steps=9,
        learning_rate=0.5,
        load_best_model_at_end=True,
        eval_dataset=texts(16, seed=1),
        **fields,
    )
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert best.dtype == torch.bfloat16
    assert vector(model).dtype == torch.float32
    assert torch.equal(vector(model), vector(best).float())


def test_model_init_that_loads_half_precision(tmp_path, caplog):
    folder = stored_in(torch.bfloat16, tmp_path / "hub")
    trainer = LSAMTrainer(
        model_init=lambda: AutoModelForCausalLM.from_pretrained(folder),
        args=arguments(LSAMConfig, tmp_path / "run", max_steps=6, **LSAM),
        train_dataset=texts(),
    )
    expected = train(
        tmp_path / "single", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), texts(), max_steps=6
    )
    for _ in range(2):  # with an optimizer that has a state, the second time
        trainer.train()
        assert torch.equal(vector(trainer.model), vector(expected.model))
    trainer.save_model(tmp_path / "saved")
    assert dtypes_in(tmp_path / "saved") == {torch.bfloat16}


def test_an_optimizer_made_before_goes_on_and_one_that_has_made_steps_is_refused(tmp_path):
    model, same = net().bfloat16(), net().bfloat16().float()
    ours = train(tmp_path / "a", model, optimizers=(sgd(momentum=0.9)(model.parameters()), None), max_steps=6)
    theirs = train(tmp_path / "b", same, optimizers=(sgd(momentum=0.9)(same.parameters()), None), max_steps=6)
    assert torch.equal(vector(ours.model), vector(theirs.model))
    model = net().bfloat16()
    optimizer = sgd(momentum=0.9)(model.parameters())
    mean_loss(
        model, {name: t.bfloat16() if name == "x" else t for name, t in batches_of(blobs())[0].items()}
    ).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"state for half-precision parameters.*float32.*not stepped"):
        train(tmp_path / "c", model, optimizers=(optimizer, None), max_steps=6)


def test_a_frozen_layer_in_half_precision_is_cast_with_those_that_train(tmp_path):
    model = net().bfloat16()
    model.first.requires_grad_(False)
    trainer = train(tmp_path, model, max_steps=8)
    same = net().bfloat16().float()
    same.first.requires_grad_(False)
    assert_same_run(trainer, reference(same, [[b] for b in batches_of(blobs())], sgd()))
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert torch.equal(saved["first.weight"], net().first.weight.bfloat16())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_in_half_precision_is_cast_and_its_base_is_not(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(stored_in(torch.bfloat16, tmp_path / "hub"))
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type=peft.TaskType.CAUSAL_LM, fan_in_fan_out=True)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    trainer = train(tmp_path / "run", model, texts(), max_steps=4, bf16=True)
    by_training = {p.requires_grad: set() for p in model.parameters()}
    for p in model.parameters():
        by_training[p.requires_grad].add(p.dtype)
    assert by_training == {True: {torch.float32}, False: {torch.bfloat16}}
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


# --- resume ---


@pytest.mark.parametrize(
    ("stop", "fields"),
    [
        (6, {}),
        (8, {"gradient_accumulation_steps": 2}),  # an epoch of 4 steps: at its end
        (5, {"anchor_optimizer": "nesterov", "anchor_lr": 0.2, "anchor_momentum": 0.6}),
        (7, {"anchor_optimizer": "adam", "anchor_lr": 0.01, "anchor_momentum_correction": 0.9}),
        (9, {"langevin_temperature": 1e-4, "sam_interval": 2}),
        (6, {"optim": "schedule_free_adamw"}),
    ],
)
def test_resume_continues_bit_for_bit(tmp_path, stop, fields):
    fields = {
        "max_steps": 14,
        "train_sampling_strategy": "random",
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": stop,
        **fields,
    }
    model = {"batchnorm": True, "dropout": 0.2}
    through = train(tmp_path, net(**model), **fields)
    checkpoint = tmp_path / f"checkpoint-{stop}"
    resumed = train(tmp_path, net(seed=99, **model), resume=str(checkpoint), **fields)
    assert len(resumed.recorder.x) == 14 - stop
    for ours, theirs in zip(resumed.recorder.x, through.recorder.x[stop:], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(resumed.recorder.y, through.recorder.y[stop:], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(vector(resumed.model), vector(through.model))
    assert resumed.worker.version == through.worker.version > stop // 4
    totals = [{n: v for n, v in t.worker_summary().items() if n != "bytes_pulled"} for t in (resumed, through)]
    assert totals[0] == totals[1]  # but for the anchor that a worker begins with, in both parts of the run
    entries = [[e for e in t.state.log_history if "loss" in e] for t in (resumed, through)]
    assert entries[0] == entries[1]
    # What the checkpoint shows as the model is the anchor of that step.
    saved = load_file(checkpoint / "model.safetensors")
    y = torch.cat([saved[name].flatten() for name, _ in through.model.named_parameters()])
    assert torch.equal(y, through.recorder.y[stop - 1])


def test_resume_from_the_last_checkpoint(tmp_path):
    fields = {"max_steps": 10, "save_strategy": "steps", "save_steps": 3}
    through = train(tmp_path, net(), **fields)
    shutil.rmtree(tmp_path / "checkpoint-10")  # Trainer saves at the end as well
    resumed = train(tmp_path, net(seed=99), resume=True, **fields)
    assert len(resumed.recorder.x) == 1
    assert torch.equal(vector(resumed.model), vector(through.model))


class Ends(TrainerCallback):
    """Sends this process SIGTERM in step 4, the last of an epoch, and notes what Trainer then does."""

    def __init__(self):
        self.saved, self.evaluated = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)


def test_a_signal_in_the_last_step_of_an_epoch_is_answered_by_one_checkpoint(tmp_path):
    ends = Ends()
    fields = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    args = arguments(LSAMConfig, tmp_path, per_device_train_batch_size=16, sync_steps=2, **fields)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(8, 1), callbacks=[ends])
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (ends.saved, ends.evaluated) == ([4], [])
    assert is_sealed(tmp_path / "checkpoint-4")


def test_a_run_that_ends_over_a_sealed_checkpoint_leaves_it_alone(tmp_path, monkeypatch):
    def gone(*_):
        raise ServerGone("the server is gone")

    sealed = []
    monkeypatch.setattr("hf_lsam.trainer.checkpoints.seal", sealed.append)
    args = arguments(LSAMConfig, tmp_path, max_steps=2, sync_steps=2, save_strategy="steps", save_steps=2)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs())
    monkeypatch.setattr(trainer.session, "finish", gone)
    with pytest.raises(ServerGone):
        trainer.train()
    assert sealed == [tmp_path / "checkpoint-2"]


def test_resume_from_a_plain_trainers_checkpoint_starts_a_new_anchor_there(tmp_path, caplog):
    train_plain(tmp_path, net(), max_steps=4, save_strategy="steps", save_steps=4)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    trainer = train(tmp_path, net(seed=99), max_steps=8, resume=str(tmp_path / "checkpoint-4"))
    assert any("has no anchor" in record.getMessage() for record in caplog.records)
    model = net()
    model.load_state_dict(saved)
    assert_same_run(trainer, reference(model, [[b] for b in batches_of(blobs())[4:]], sgd()))


# --- optimizers that train at one point and are evaluated at another ---


class Averaged(torch.optim.SGD):
    """SGD that is evaluated at the mean of its points, which changes places with the parameters."""

    evaluates, steps = False, 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.detach(), 1 / self.steps)

    def _change_places(self, evaluates: bool):
        for p in self.param_groups[0]["params"] if self.evaluates != evaluates else ():
            if "mean" in self.state[p]:
                shown = p.detach().clone()
                p.data.copy_(self.state[p]["mean"])
                self.state[p]["mean"].copy_(shown)
        self.evaluates = evaluates

    def eval(self):
        self._change_places(True)

    def train(self):
        self._change_places(False)


MODES = {
    "schedule_free_adamw": lambda model: {"optim": "schedule_free_adamw"},
    "schedule_free_sgd": lambda model: {"optim": "schedule_free_sgd"},
    "averaged": lambda model: {"optimizers": (Averaged(model.parameters(), lr=0.05), None)},
}


@pytest.mark.parametrize("name", MODES)
def test_evaluations_and_checkpoints_leave_what_the_optimizer_trains_alone(tmp_path, name):
    """Without SAM and coupling a worker is the plain Trainer, evaluated as often, and evaluates to the same."""
    fields = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    model, held_out = net(), blobs(24, seed=5)
    optimizer = MODES[name](model)
    plain = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path / "plain", optim=optimizer.get("optim", "sgd"), **fields),
        train_dataset=blobs(),
        eval_dataset=held_out,
        optimizers=optimizer.get("optimizers", (None, None)),
    )
    points = []

    class Points(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            points.append(vector(model))

    plain.add_callback(Points())
    plain.train()
    model = net()
    fields |= {"sam_rho": 0.0, "coupling_strength": 0.0, "eval_dataset": held_out}
    worker = train(tmp_path / "lsam", model, **fields, **MODES[name](model))
    for ours, theirs in zip(worker.recorder.x, points, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    anchor = vector(model)
    metrics = worker.evaluate()
    assert torch.equal(vector(model), anchor)
    expected = mean_loss(model, batches_of(held_out, 24)[0]).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    expected = plain.evaluate()["eval_loss"]
    with worker.local():
        assert worker.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert torch.equal(vector(model), anchor)


def test_a_second_train_of_such_an_optimizer_goes_on_from_the_anchor(tmp_path):
    trainer = train(tmp_path, net(), max_steps=8, optim="schedule_free_adamw", sam_rho=0.0)
    anchor = vector(trainer.model)

    class Start(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **keywords):
            if state.global_step == 0:
                trainer.optimizer.train()  # as the step is about to
                assert torch.equal(vector(model), anchor)

    trainer.add_callback(Start())
    trainer.train()
    assert not torch.equal(vector(trainer.model), anchor)
