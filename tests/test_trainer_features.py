"""LSAMTrainer with every feature of Trainer, in numbers.

Most tests compare a run with a loop written here from the paper's equations in plain PyTorch, which shares no code with
the package; the others with plain Trainer, where the two must coincide.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from models import Net, Rows, Stream, arguments, blobs, net, sentences, tiny_bert, vector
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import set_seed

from hf_lsam import LSAMConfig, LSAMTrainer

# LSAM with every part of it at work.
LSAM = {
    "sam_rho": 0.1,
    "sync_steps": 4,
    "coupling_strength": 0.5,
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
    adaptive: bool = False,
    context: Callable = contextlib.nullcontext,
    score: bool = False,
) -> SimpleNamespace:
    """LSAM with one worker: Algorithm 1 with SAM on each micro-batch, in plain PyTorch.

    Args:
        steps: the micro-batches of each optimizer step.

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
    y, total, in_total, previous, version = flat(), torch.zeros_like(flat()), 0, None, 0
    seen = SimpleNamespace(loss=[], sharpness=[], norm=[], drift=[], x=[], y=[])
    model.train()
    for number, micro in enumerate(steps):
        weight = loss_weight(micro)
        accumulated = [torch.zeros_like(p) for p in parameters]
        loss, sharpness = 0.0, 0.0
        for batch in micro:
            x = [p.detach().clone() for p in parameters]
            if rho and perturbs(number):
                part = batch if ascent_rows is None else {k: v[:ascent_rows] for k, v in batch.items()}
                rng = torch.get_rng_state()
                first, loss_1 = gradient(part, weight)
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
        if score:
            strength = lambda0 / (optimizer.param_groups[0]["lr"] * tau)
            away = (flat() - y).split([p.numel() for p in parameters])
            accumulated = [g + strength * a.view_as(g) for g, a in zip(accumulated, away, strict=True)]
        for p, g in zip(parameters, accumulated, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if not score:
            put(flat() - lambda0 / tau * (flat() - y))
        total, in_total = total + (flat() - y), in_total + 1
        if in_total == tau:
            mean = -total / tau
            y = y - anchor_lr * (mean if previous is None else mean + beta * (mean - previous))
            total, in_total, previous, version = torch.zeros_like(y), 0, mean, version + 1
        seen.loss.append(loss)
        seen.sharpness.append(sharpness)
        seen.norm.append(norm)
        seen.drift.append(((flat() - y).norm() / y.norm()).item())
        seen.x.append(flat())
        seen.y.append(y)
    if in_total:
        mean = -total / tau
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
    name = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
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
    torch.testing.assert_close(
        compiled.model.norm.running_var, eager.model.norm.running_var, rtol=1e-5, atol=1e-6
    )
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
        return 3.0 * nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_items_in_batch

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


# --- coupling inside the score ---


def test_coupling_in_the_score_is_the_decoupled_one_at_the_learning_rate_the_pull_leaves(tmp_path):
    # Decoupled: x - (1 - c) eta s - c (x - y). In the score: x - eta s - c (x - y). c = lambda0 / tau = 0.125.
    decoupled = train(tmp_path, net(), max_steps=12, sam_rho=0.05, learning_rate=0.08)
    score = train(tmp_path, net(), max_steps=12, sam_rho=0.05, learning_rate=0.07, coupling="score")
    for ours, theirs in zip(score.recorder.x, decoupled.recorder.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    steps = [[b] for b in (batches_of(blobs()) * 2)[:12]]
    assert_same_run(score, reference(net(), steps, sgd(0.07), rho=0.05, score=True))


@pytest.mark.parametrize("fields", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_coupling_in_the_score_is_refused_with_other_optimizers(tmp_path, fields):
    with pytest.raises(ValueError, match=r"coupling='score'.*rescale or average.*coupling='decoupled'.*plain SGD"):
        train(tmp_path, net(), max_steps=2, coupling="score", **fields)
