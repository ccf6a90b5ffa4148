"""LSAMTrainer with every feature of Trainer, in numbers.

Most tests compare a run with a loop written here from the paper's equations in plain PyTorch, which shares no code with
the package; the others with plain Trainer, where the two must coincide.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import trl
from models import (
    HIDDEN,
    VOCABULARY,
    Net,
    Rows,
    Stream,
    arguments,
    blobs,
    net,
    sentences,
    texts,
    tiny_bert,
    tiny_gpt2,
    vector,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer, LSAMTrainerMixin
from hf_lsam.batchnorm import STATISTICS
from hf_lsam.checkpoint import SERVER_STATE, WORKER_STATE
from hf_lsam.failure_signatures import FailureSignatures
from hf_lsam.parameters import trainable_parameters
from hf_lsam.trainer.trl import makes_its_batches

# The paper's Algorithm 1 with every part of it at work.
LSAM = {
    "sam_rho": 0.1,
    "sync_steps": 4,
    "coupling": "decoupled",
    "coupling_strength": 0.5,
    "compensate_coupling": False,
    "anchor_lr": 0.8,
    "anchor_momentum_correction": 0.3,
}


def batches_of(rows: Rows, size: int = 8) -> list[dict[str, Tensor]]:
    """The rows in order, as batches."""
    chunks = [rows.rows[i : i + size] for i in range(0, len(rows), size)]
    return [{name: torch.stack([row[name] for row in chunk]) for name in chunk[0]} for chunk in chunks]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"])["logits"].float(), batch["labels"])


def reference(
    model: nn.Module,
    steps: list[list[dict[str, Tensor]]],
    make_optimizer: Callable,
    rho: float = 0.1,
    tau: int = 4,
    lambda0: float = 0.5,
    anchor_lr: float = 0.8,
    beta: float = 0.3,
    eps: float = 1e-12,
    clip: float | None = None,
    make_scheduler: Callable | None = None,
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] = mean_loss,
    loss_weight: Callable[[list], float] = lambda micro: 1 / len(micro),
    perturbs: Callable[[int], bool] = lambda step: True,
    ascent_rows: int | None = None,
    ascent_weight: float = 1.0,
    adaptive: bool = False,
    context: Callable = contextlib.nullcontext,
    coupling: str = "decoupled",
    direction: str = "gradient",
) -> SimpleNamespace:
    """LSAM with one worker: Algorithm 1 with SAM on each micro-batch, in plain PyTorch.

    Args:
        steps: the micro-batches of each optimizer step.
        loss_weight: what `loss_of` a micro-batch is multiplied with; in pass 1 also with `ascent_weight`.

    Returns:
        by step: loss, sharpness, gradient norm, drift, x and y; and the final anchor with its version.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    def put(values: Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(values, parameters)

    def gradient(batch: dict[str, Tensor], weight: float) -> tuple[list[Tensor], float]:
        with context():
            loss = loss_of(model, batch) * weight
        return list(torch.autograd.grad(loss, parameters)), loss.item()

    optimizer = make_optimizer(parameters)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    handed_in, came = flat(), None
    y, total, in_total, previous, version = flat(), torch.zeros_like(flat()), 0, None, 0
    seen = SimpleNamespace(loss=[], sharpness=[], norm=[], drift=[], x=[], y=[])
    model.train()
    for number, micro in enumerate(steps):
        weight = loss_weight(micro)
        accumulated = [torch.zeros_like(p) for p in parameters]
        loss, sharpness = 0.0, 0.0
        for batch in micro:
            x = [p.detach().clone() for p in parameters]
            if rho and direction != "gradient":
                if direction == "momentum":  # MSAM: against the momentum
                    known = [optimizer.state[p].get("momentum_buffer") for p in parameters]
                    known = None if known[0] is None else [-v for v in known]
                else:  # FedLESAM: the way the anchor came
                    known = None if came is None else came.split([p.numel() for p in parameters])
                if known is not None:
                    norm = torch.cat([u.flatten() for u in known]).norm()
                    with torch.no_grad():
                        for p, u in zip(parameters, known, strict=True):
                            p.add_(rho * u.view_as(p) / (norm + eps))
                second, loss_1 = gradient(batch, weight)
                with torch.no_grad():
                    for p, kept in zip(parameters, x, strict=True):
                        p.copy_(kept)
                loss += loss_1
            elif rho and perturbs(number):
                part = batch if ascent_rows is None else {k: v[:ascent_rows] for k, v in batch.items()}
                rng = torch.get_rng_state()
                first, loss_1 = gradient(part, weight * ascent_weight)
                torch.set_rng_state(rng)
                units = [p.abs() + 0.01 if adaptive else torch.ones_like(p) for p in x]
                scaled = [u * g for u, g in zip(units, first, strict=True)]
                norm = torch.cat([g.flatten() for g in scaled]).norm()
                with torch.no_grad():
                    for p, u, g in zip(parameters, units, scaled, strict=True):
                        p.add_(rho * u * g / (norm + eps))
                second, loss_2 = gradient(batch, weight)
                with torch.no_grad():
                    for p, kept in zip(parameters, x, strict=True):
                        p.copy_(kept)
                sharpness += loss_2 - loss_1
                loss += loss_1 if ascent_rows is None else loss_2
            else:
                second, loss_1 = gradient(batch, weight)
                loss += loss_1
            accumulated = [a + g for a, g in zip(accumulated, second, strict=True)]
        norm = torch.cat([g.flatten() for g in accumulated]).norm().item()
        if clip is not None and norm > clip:
            accumulated = [g * (clip / (norm + 1e-6)) for g in accumulated]
        if coupling == "score":
            strength = lambda0 / (optimizer.param_groups[0]["lr"] * tau)
            away = (flat() - y).split([p.numel() for p in parameters])
            accumulated = [g + strength * a.view_as(g) for g, a in zip(accumulated, away, strict=True)]
        for p, g in zip(parameters, accumulated, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if coupling == "decoupled":
            put(flat() - lambda0 / tau * (flat() - y))
        total, in_total = total + (flat() - y), in_total + 1
        if in_total == tau:
            mean = handed_in - flat() if coupling == "merge" else -total / tau
            before, y = y, y - anchor_lr * (mean if previous is None else mean + beta * (mean - previous))
            came = before - y
            if coupling == "merge":
                put(flat() + lambda0 * (y - flat()))
                handed_in = flat()
            total, in_total, previous, version = torch.zeros_like(y), 0, mean, version + 1
        seen.loss.append(loss)
        seen.sharpness.append(sharpness)
        seen.norm.append(norm)
        seen.drift.append(((flat() - y).norm() / y.norm()).item())
        seen.x.append(flat())
        seen.y.append(y)
    if in_total:
        mean = handed_in - flat() if coupling == "merge" else -total / tau
        y, version = y - anchor_lr * (mean if previous is None else mean + beta * (mean - previous)), version + 1
    seen.final_anchor, seen.version = y, version
    return seen


def sgd(lr: float = 0.05, **keywords) -> Callable:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **keywords)


class Recorder(TrainerCallback):
    """Keeps x and y after every step."""

    def __init__(self):
        self.x, self.y, self.trainer = [], [], None  # the trainer is set by who builds it

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.x.append(vector(model))
        self.y.append(self.trainer.worker.anchor.clone())


def train(output_dir, model, rows=None, kind=LSAMTrainer, resume=None, **fields) -> LSAMTrainer:
    """A finished run of `LSAMTrainer` with `LSAM` and `fields`; its steps are in `trainer.recorder`."""
    trainer_fields = {
        name: fields.pop(name)
        for name in ("eval_dataset", "compute_metrics", "callbacks", "compute_loss_func", "optimizers")
        if name in fields
    }
    args = arguments(LSAMConfig, output_dir, **{**LSAM, **fields})
    trainer = kind(model=model, args=args, train_dataset=blobs() if rows is None else rows, **trainer_fields)
    trainer.recorder = Recorder()
    trainer.recorder.trainer = trainer
    trainer.add_callback(trainer.recorder)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_plain(output_dir, model, rows=None, kind=Trainer, **fields) -> Trainer:
    args = arguments(TrainingArguments, output_dir, **fields)
    trainer = kind(model=model, args=args, train_dataset=blobs() if rows is None else rows)
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_run(trainer: LSAMTrainer, expected: SimpleNamespace, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Every step's x and y, and the final ones, are the reference's."""
    assert len(trainer.recorder.x) == len(expected.x)
    for ours, theirs in zip(trainer.recorder.x, expected.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for ours, theirs in zip(trainer.recorder.y, expected.y, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    torch.testing.assert_close(vector(trainer.model), expected.final_anchor, rtol=rtol, atol=atol)
    with trainer.local():
        torch.testing.assert_close(vector(trainer.model), expected.x[-1], rtol=rtol, atol=atol)
    assert trainer.worker_summary()["anchor_version"] == expected.version


# --- steps, accumulation, clipping, schedules ---


def test_full_fine_tuning_is_algorithm_1(tmp_path):
    trainer = train(tmp_path, net(), num_train_epochs=2)
    expected = reference(net(), [[b] for b in batches_of(blobs()) * 2], sgd())
    assert_same_run(trainer, expected)
    assert (expected.x[-1] - vector(net())).norm() > 0.1  # far beyond the tolerance


@pytest.mark.parametrize("wrong", [{"in_norm": 2}, {"perturbed": 2}])
def test_tied_embeddings_count_once_in_the_norm_and_are_perturbed_once(tmp_path, wrong):
    """In float64, against SAM written out with the embeddings' two uses; a reference that is `wrong` is told apart."""
    rho, lr = 0.1, 0.05

    def sam(in_norm: int = 1, perturbed: int = 1) -> Tensor:
        """x after four steps, where the tied parameter counts so often in the norm and is perturbed so often."""
        model = tiny_gpt2().double()
        assert model.lm_head.weight is model.transformer.wte.weight
        named = dict(model.named_parameters())
        tied = "transformer.wte.weight"

        def gradient(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = model(**batch, num_items_in_batch=batch["labels"].numel()).loss  # as Trainer counts them
            return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

        for batch in batches_of(texts())[:4]:
            first = gradient(batch)
            square = sum(g.square().sum() * (in_norm if name == tied else 1) for name, g in first.items())
            moves = {name: rho * g / square.sqrt() * (perturbed if name == tied else 1) for name, g in first.items()}
            with torch.no_grad():
                for name, p in named.items():
                    p += moves[name]
            second = gradient(batch)
            with torch.no_grad():
                for name, p in named.items():
                    p -= moves[name] + lr * second[name]
        return vector(model)

    model = tiny_gpt2().double()
    trainer = train(tmp_path, model, texts(), sam_rho=rho, learning_rate=lr, coupling_strength=0.0, max_steps=4)
    ours, right = trainer.recorder.x[-1], sam()
    assert ours.dtype == torch.float64
    assert model.lm_head.weight is model.transformer.wte.weight
    assert trainer.worker.anchor.numel() == len(right) == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(ours, right, rtol=0, atol=1e-12)
    assert (right - vector(tiny_gpt2().double())).abs().max() > 0.01
    assert (right - sam(**wrong)).abs().max() > 1e-5


def test_gradient_accumulation_perturbs_each_micro_batch(tmp_path):
    # 9 batches an epoch in steps of 4: the last step of the epoch has one.
    rows = blobs(72)
    trainer = train(tmp_path, net(), rows, num_train_epochs=2, gradient_accumulation_steps=4)
    batches = batches_of(rows)
    epoch = [batches[0:4], batches[4:8], batches[8:9]]
    expected = reference(net(), epoch * 2, sgd())
    assert_same_run(trainer, expected)
    assert logged(trainer, "loss") == pytest.approx(expected.loss, rel=1e-4)
    assert logged(trainer, "lsam/sharpness") == pytest.approx(expected.sharpness, rel=1e-3, abs=1e-6)


def test_gradient_clipping_acts_on_the_gradient_of_pass_2(tmp_path):
    trainer = train(tmp_path, net(), num_train_epochs=2, max_grad_norm=0.2)
    expected = reference(net(), [[b] for b in batches_of(blobs()) * 2], sgd(), clip=0.2)
    assert_same_run(trainer, expected)
    assert logged(trainer, "grad_norm") == pytest.approx(expected.norm, rel=1e-4)
    assert min(expected.norm) > 0.2  # every step was clipped


def test_adamw_with_weight_decay_and_a_warmed_up_schedule(tmp_path):
    trainer = train(
        tmp_path,
        net(),
        num_train_epochs=2,
        optim="adamw_torch",
        learning_rate=0.01,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        warmup_steps=3,
    )

    def adamw(parameters):
        weights, biases = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() == 1]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01)

    def linear(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 3 if k < 3 else (16 - k) / 13)

    expected = reference(net(), [[b] for b in batches_of(blobs()) * 2], adamw, make_scheduler=linear)
    # Adam divides by the root of small numbers: rounding differences grow.
    assert_same_run(trainer, expected, rtol=1e-4, atol=2e-5)


def test_max_steps_and_num_train_epochs_count_optimizer_steps(tmp_path):
    by_steps = train(tmp_path, net(), max_steps=11)
    by_epochs = train(tmp_path, net(), num_train_epochs=3, gradient_accumulation_steps=3)
    assert (by_steps.state.global_step, by_steps.worker.local_steps) == (11, 11)
    assert by_steps.worker_summary()["pushes"] == 3  # two periods of 4 and the 3 steps left
    assert (by_epochs.state.global_step, by_epochs.worker.local_steps) == (9, 9)
    assert_same_run(by_steps, reference(net(), [[b] for b in (batches_of(blobs()) * 2)[:11]], sgd()))


# --- precision ---


def test_bf16_autocast(tmp_path):
    trainer = train(tmp_path, net(), max_steps=8, bf16=True)
    steps = [[b] for b in batches_of(blobs())]

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    expected = reference(net(), steps, sgd(), context=autocast)
    assert_same_run(trainer, expected)
    in_float32 = reference(net(), steps, sgd())
    assert (expected.x[-1] - in_float32.x[-1]).abs().max() > 5e-5  # autocast was on
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert trainer.worker.anchor.dtype == torch.float32


class ScaledTrainer(LSAMTrainer):
    """fp16 as on a GPU: Accelerate refuses it on CPU, so the scaler that it would make there is put in its place."""

    INIT_SCALE = 2.0**10

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.INIT_SCALE, growth_interval=10**6)
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"


class OverflowingTrainer(ScaledTrainer):
    INIT_SCALE = 2.0**24  # float16 ends at 2**16: the first gradients are infinite, until the scaler has halved enough


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fp16_with_a_scaler_perturbs_and_clips_as_without(tmp_path, accumulation):
    fields = {"max_steps": 6, "max_grad_norm": 0.5, "gradient_accumulation_steps": accumulation, "sam_eps": 0.1}
    trainer = train(tmp_path, net(), kind=ScaledTrainer, **fields)

    def autocast():
        return torch.autocast("cpu", dtype=torch.float16)

    # A stabiliser of the size of the norm would show a scale that was not taken out.
    batches = batches_of(blobs()) * 2
    epoch = [batches[i : i + accumulation] for i in range(0, 8, accumulation)]
    expected = reference(net(), (epoch * 2)[:6], sgd(), clip=0.5, eps=0.1, context=autocast)
    assert_same_run(trainer, expected, rtol=0, atol=1e-4)
    assert logged(trainer, "grad_norm") == pytest.approx(expected.norm, rel=1e-2)
    assert trainer.worker.local_steps == 6


def test_fp16_overflow_skips_the_step_and_leaves_everything_as_it_was(tmp_path):
    start = vector(net())
    trainer = train(tmp_path, net(), kind=OverflowingTrainer, max_steps=40, num_train_epochs=5)
    skipped = next(i for i, x in enumerate(trainer.recorder.x) if not torch.equal(x, start))
    assert 1 <= skipped < 30
    for x, y in zip(trainer.recorder.x[:skipped], trainer.recorder.y[:skipped], strict=True):
        assert torch.equal(x, start)
        assert torch.equal(y, start)
    assert trainer.worker.local_steps == 40 - skipped
    assert all(torch.isfinite(x).all() for x in trainer.recorder.x + trainer.recorder.y)
    assert all(torch.isfinite(torch.tensor(logged(trainer, "lsam/sharpness"))))
    # The steps that count are those of a run that begins where the scale first fits.
    steps = [[b] for b in (batches_of(blobs()) * 5)[skipped:]]
    expected = reference(net(), steps, sgd(), context=lambda: torch.autocast("cpu", dtype=torch.float16))
    torch.testing.assert_close(vector(trainer.model), expected.final_anchor, rtol=0, atol=2e-3)


# --- memory and speed features of the model ---


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    fields = {"rows": sentences(), "max_steps": 6, "optim": "adamw_torch", "learning_rate": 5e-3}
    plain = train(tmp_path, tiny_bert(dropout=0.1), **fields)
    name = (
        "activation_checkpointing"
        if hasattr(TrainingArguments, "activation_checkpointing")
        else "gradient_checkpointing"
    )
    switched_on = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    checkpointed = train(tmp_path, tiny_bert(dropout=0.1), **switched_on, **fields)
    modules = checkpointed.model.modules()
    assert sum(getattr(module, "gradient_checkpointing", False) is True for module in modules) >= 2
    for ours, theirs in zip(checkpointed.recorder.x, plain.recorder.x, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(vector(checkpointed.model), vector(plain.model))


def test_torch_compile(tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):  # what TrainingArguments sets is taken away after the test
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "default")
    eager = train(tmp_path, net(batchnorm=True), max_steps=6)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    compiled = train(tmp_path, net(batchnorm=True), max_steps=6, torch_compile=True, torch_compile_backend="aot_eager")
    assert frames["ok"] > 0
    for ours, theirs in zip(compiled.recorder.x, eager.recorder.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vector(compiled.model), vector(eager.model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled.model.norm.running_var, eager.model.norm.running_var, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


# --- randomness ---


class RandomState(TrainerCallback):
    """The state of the generator before the first step and after the last."""

    def on_step_begin(self, args, state, control, **keywords):
        if state.global_step == 0:
            self.first = torch.get_rng_state()

    def on_step_end(self, args, state, control, **keywords):
        self.last = torch.get_rng_state()


def test_dropout_masks_are_the_same_in_both_passes(tmp_path):
    # A radius below the rounding step moves nothing: only other masks could make the gradient another.
    uncoupled = {"coupling_strength": 0.0, "anchor_momentum_correction": 0.0}
    lsam = train(tmp_path, net(dropout=0.5), max_steps=10, sam_rho=1e-12, **uncoupled)
    plain = train_plain(tmp_path, net(dropout=0.5), max_steps=10)
    assert torch.equal(lsam.recorder.x[-1], vector(plain.model))


def test_a_step_draws_as_many_random_numbers_as_a_plain_one(tmp_path):
    states = []
    for lsam in (True, False):
        state = RandomState()
        args = arguments(
            LSAMConfig if lsam else TrainingArguments,
            tmp_path,
            max_steps=10,
            train_sampling_strategy="random",
            **(LSAM if lsam else {}),
        )
        kind = LSAMTrainer if lsam else Trainer
        kind(model=net(dropout=0.5), args=args, train_dataset=blobs(), callbacks=[state]).train()
        states.append(state)
    assert torch.equal(states[0].first, states[1].first)
    assert torch.equal(states[0].last, states[1].last)
    assert not torch.equal(states[0].first, states[0].last)


def test_dropout_as_in_the_reference(tmp_path):
    state = RandomState()
    trainer = train(tmp_path, net(dropout=0.5), max_steps=8, callbacks=[state])
    torch.manual_seed(0)
    model = Net(dropout=0.5)
    torch.set_rng_state(state.first)
    assert_same_run(trainer, reference(model, [[b] for b in batches_of(blobs())], sgd()))


# --- losses ---


def test_label_smoothing(tmp_path):
    def smoothed(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"], label_smoothing=0.2)

    trainer = train(tmp_path, tiny_bert(), sentences(), max_steps=8, label_smoothing_factor=0.2)
    expected = reference(tiny_bert(), [[b] for b in batches_of(sentences()) * 2], sgd(), loss_of=smoothed)
    assert_same_run(trainer, expected)
    assert logged(trainer, "loss") == pytest.approx(expected.loss, rel=1e-4)


def test_compute_loss_func_is_normalised_over_the_accumulated_batch(tmp_path):
    rows = blobs()
    for i in range(0, 64, 3):  # ignored labels make the micro-batches count differently
        rows.rows[i]["labels"] = torch.tensor(-100)

    def total(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        return (
            3.0 * nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_items_in_batch
        )

    def summed(model, batch):
        logits = model(batch["x"])["logits"]
        return 3.0 * nn.functional.cross_entropy(logits, batch["labels"], ignore_index=-100, reduction="sum")

    trainer = train(tmp_path, net(), rows, max_steps=8, gradient_accumulation_steps=2, compute_loss_func=total)
    batches = batches_of(rows)
    steps = [batches[i : i + 2] for i in range(0, 8, 2)] * 2
    expected = reference(
        net(),
        steps,
        sgd(),
        loss_of=summed,
        loss_weight=lambda micro: 1 / sum((b["labels"] != -100).sum().item() for b in micro),
    )
    assert_same_run(trainer, expected)
    assert logged(trainer, "loss") == pytest.approx(expected.loss, rel=1e-4)


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


# --- BatchNorm ---


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


# --- data ---


@pytest.mark.parametrize("library", ["torch", "datasets"])
def test_iterable_datasets_give_the_steps_of_a_map_style_one(tmp_path, library):
    rows = blobs()
    stream = Stream(rows)
    if library == "datasets":
        columns = {"x": [row["x"].tolist() for row in rows.rows], "labels": [int(row["labels"]) for row in rows.rows]}
        stream = datasets.Dataset.from_dict(columns).to_iterable_dataset()
    mapped = train(tmp_path, net(), rows, max_steps=12)
    streamed = train(tmp_path, net(), stream, max_steps=12)
    assert len(streamed.recorder.x) == 12  # beyond one epoch of 8
    for ours, theirs in zip(streamed.recorder.x, mapped.recorder.x, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(vector(streamed.model), vector(mapped.model))


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
    with pytest.raises(RuntimeError, match="before `train"), trainer.local():
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
    assert "Raise coupling_strength" in warnings[6][0]


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
    with pytest.raises(ValueError, match=r"state of parameters in half precision.*rounded.*no step"):
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


def test_resume_from_a_plain_trainers_checkpoint_starts_a_new_anchor_there(tmp_path, caplog):
    train_plain(tmp_path, net(), max_steps=4, save_strategy="steps", save_steps=4)
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    trainer = train(tmp_path, net(seed=99), max_steps=8, resume=str(tmp_path / "checkpoint-4"))
    assert any("holds no anchor" in record.getMessage() for record in caplog.records)
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


# --- what is refused at construction ---


def refuse(tmp_path, match: str, model=None, kind=LSAMTrainer, error=ValueError, **fields):
    with pytest.raises(error, match=match):
        kind(model=model or net(), args=arguments(LSAMConfig, tmp_path, **LSAM, **fields), train_dataset=blobs())


def test_fsdp_is_refused(tmp_path, monkeypatch):
    refuse(tmp_path, r"cannot be combined with fsdp.*whole parameters.*Launch without it", fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse(tmp_path, r"cannot be combined with FSDP.*whole parameters.*LoRA adapter")


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    refuse(tmp_path, r"cannot be combined with deepspeed.*whole parameters.*Launch without it", deepspeed={"a": 1})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refuse(tmp_path, r"cannot be combined with DeepSpeed.*whole parameters.*LoRA adapter")


def test_tensor_parallel_parameters_are_refused(tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = net()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.first.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.first.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"`first.weight` is sharded \(DTensor.*without a device mesh"):
            trainable_parameters(model)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_pass_are_refused(tmp_path, optim):
    refuse(tmp_path, rf"optim='{optim}' steps inside the backward pass.*optim='adamw_torch'", optim=optim)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_evaluations_are_refused(tmp_path, schedule):
    fields = {"lr_scheduler_type": schedule, "eval_strategy": "steps"}
    refuse(tmp_path, rf"{schedule}.*only worker 0.*'linear'", **fields)


def test_complex_parameters_are_refused(tmp_path):
    model = net()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"`phase` is complex \(torch\.complex64\).*torch\.view_as_complex"):
        train(tmp_path, model)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    refuse(tmp_path, r"no trainable parameter.*nothing to perturb.*Unfreeze", model=net().requires_grad_(False))


@pytest.mark.parametrize(
    ("begins_frozen", "logging_strategy", "what"),
    [(True, "steps", "has become trainable"), (False, "no", "has been frozen")],
)
def test_a_layer_that_is_unfrozen_or_frozen_while_training_is_refused(tmp_path, begins_frozen, logging_strategy, what):
    """At the next log point; without any, before the run counts as finished."""

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 3:
                model.first.requires_grad_(begins_frozen)

    model = net()
    model.first.requires_grad_(not begins_frozen)
    with pytest.raises(ValueError, match=rf"`first\.weight` {what}.*end this run there and train again"):
        train(tmp_path, model, max_steps=8, logging_strategy=logging_strategy, callbacks=[Change()])
    model.first.requires_grad_(True)
    train(tmp_path, model, max_steps=2)  # as the message says


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("logging_strategy", ["steps", "no"])
def test_embeddings_that_are_resized_while_training_are_refused(tmp_path, logging_strategy, optim):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 3:
                model.resize_token_embeddings(VOCABULARY + 8)

    fields = {"max_steps": 8, "logging_strategy": logging_strategy, "optim": optim}
    words = rf"word_embeddings\.weight` was \[{VOCABULARY}, 16\] .* is \[{VOCABULARY + 8}, 16\] now.*before training"
    model = tiny_bert()
    with pytest.raises(ValueError, match=words):
        train(tmp_path, model, sentences(), callbacks=[Change()], **fields)
    train(tmp_path, model, sentences(), **fields)  # resized before: as the message says


def test_easgd_without_a_single_exchange_is_an_error(tmp_path):
    fields = {"algorithm": "easgd", "coupling_strength": 0.1, "sam_rho": 0.0, "max_steps": 3}
    with pytest.raises(ValueError, match=r"makes 3 steps and would exchange after 8 .*Set sync_steps to 1, or"):
        train(tmp_path, net(), sync_steps=8, **fields)
    train(tmp_path, net(), sync_steps=3, **fields)


@pytest.mark.parametrize(
    ("device_map", "lies_on"),
    [({"first": 0, "last": 1}, r"several devices \(0, 1\)"), ({"": "meta"}, "device meta")],
)
def test_a_model_on_other_devices_than_the_workers_is_refused(tmp_path, device_map, lies_on):
    model = net()
    model.hf_device_map = device_map
    refuse(tmp_path, rf"lies on {lies_on} .*worker's device is cpu.*LSAMConfig first.*without device_map", model=model)


def trainer_of_trl(name: str) -> type:
    """From `trl`, or else from the module of its name under `trl.experimental`."""
    if hasattr(trl, name):
        return getattr(trl, name)
    folder = {"OnlineDPOTrainer": "online_dpo", "IWOPDTrainer": "iw_opd", "AsyncGRPOTrainer": "async_grpo"}
    folder |= {f"{kind}DistillationTrainer": f"{kind.lower()}_distillation" for kind in ("Server", "Async")}
    return getattr(
        importlib.import_module(f"trl.experimental.{folder.get(name, name.removesuffix('Trainer').lower())}"), name
    )


GENERATING = [
    *("GRPOTrainer", "RLOOTrainer", "DistillationTrainer", "GKDTrainer", "GOLDTrainer", "OnlineDPOTrainer"),
    *("GMPOTrainer", "AsyncGRPOTrainer", "SDFTTrainer", "SDPOTrainer", "A2POTrainer", "IWOPDTrainer"),
    *("ServerDistillationTrainer", "AsyncDistillationTrainer"),
]
PLAIN = ["SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer", "TPOTrainer"]


@pytest.mark.filterwarnings("ignore::Warning")  # of trl, that its experimental trainers may change
@pytest.mark.parametrize("name", GENERATING)
def test_trainers_that_generate_inside_the_step_are_refused(tmp_path, name):
    kind = type("Mixed", (LSAMTrainerMixin, trainer_of_trl(name)), {})
    refuse(tmp_path, rf"cannot train with {name} yet.*generates.*second pass.*SFTTrainer", kind=kind)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("name", PLAIN)
def test_trainers_whose_step_takes_the_batch_as_it_is_are_not(name):
    assert makes_its_batches(type("Mixed", (LSAMTrainerMixin, trainer_of_trl(name)), {})) is None


def test_no_trainer_of_trl_is_left_out():
    """Each one that the installed trl defines is among those above: whether a new one generates is to be looked up."""
    files = Path(trl.__file__).parent.rglob("*_trainer.py")
    found = {name for file in files for name in re.findall(r"^class (\w+Trainer)\(", file.read_text(), re.MULTILINE)}
    assert {"SFTTrainer", "AsyncGRPOTrainer"} < found
    assert found - {"_BaseTrainer", *GENERATING, *PLAIN} == set()


def test_plain_training_arguments_are_refused(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    with pytest.raises(TypeError, match=r"needs the LSAM fields.*got TrainingArguments.*Pass an LSAMConfig"):
        LSAMTrainer(model=net(), args=args, train_dataset=blobs())
    with pytest.raises(TypeError, match="got NoneType"):
        LSAMTrainer(model=net(), train_dataset=blobs())


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "RewardTrainer"])
def test_part_of_a_batch_whose_rows_belong_together_is_refused(tmp_path, name):
    kind = type(f"My{name}", (LSAMTrainerMixin, getattr(trl, name)), {})
    args = arguments(LSAMConfig, tmp_path, sam_ascent_fraction=0.5)
    with pytest.raises(ValueError, match=rf"{name} makes its batches of rows that belong together.*Use sam_ascent"):
        kind(model=net(), args=args)
