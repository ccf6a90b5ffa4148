"""LSAMTrainer's steps, in numbers: against a loop written from the paper's equations, or plain Trainer."""

from __future__ import annotations

import datasets
import pytest
import torch
from models import Net, Stream, arguments, blobs, net, sentences, texts, tiny_bert, tiny_gpt2, vector
from reference import LSAM, assert_same_run, batches_of, logged, reference, sgd, train, train_plain
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer

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


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_overflow_skips_the_step_and_leaves_everything_as_it_was(tmp_path, fused):
    start, model = vector(net()), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    fields = {"max_steps": 40, "num_train_epochs": 5, "optimizers": (optimizer, None)}
    trainer = train(tmp_path, model, kind=OverflowingTrainer, **fields)
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
