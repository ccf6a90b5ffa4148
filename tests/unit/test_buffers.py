"""Buffers that training moves, other than BatchNorm's: what pass 2 and the anchor make of them."""

from __future__ import annotations

import pytest
import torch
from models import Net, arguments, blobs, net, vector
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.buffers import movable_buffers

MOVING = ["codes", "count", "norm.weight_u", "norm.weight_v"]


class Quantising(Net):
    """With a codebook that follows the hidden states, in place and by `.data`, a count, and spectral normalisation."""

    def __init__(self):
        super().__init__()
        width = self.first.out_features
        self.norm = nn.utils.spectral_norm(nn.Linear(width, width, bias=False))
        self.register_buffer("codes", torch.randn(4, width, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.arange(5))  # an index: it never moves
        self.register_buffer("derived", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.tanh(self.norm(self.first(x)))
        nearest = torch.cdist(hidden, self.codes).argmin(dim=1)
        if self.training:
            with torch.no_grad():
                for code in nearest.unique():
                    self.codes.data[code].lerp_(hidden[nearest == code].mean(0), 0.1)
                self.count = self.count + 1  # another tensor in its place
        logits = self.last(hidden + (self.codes[nearest] - hidden).detach())
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def quantising() -> Quantising:
    torch.manual_seed(0)
    return Quantising()


class Buffers(TrainerCallback):
    """The buffers after every step, and what an evaluation finds."""

    def __init__(self):
        self.after, self.evaluated = [], []

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.after.append({name: buffer.clone() for name, buffer in model.named_buffers()})

    def on_evaluate(self, args, state, control, model=None, **keywords):
        self.evaluated.append({name: buffer.clone() for name, buffer in model.named_buffers()})


def run(kind, config, folder, **fields):
    seen = Buffers()
    args = arguments(config, folder, max_steps=4, eval_strategy="steps", eval_steps=2, **fields)
    trainer = kind(
        model=quantising(), args=args, train_dataset=blobs(), eval_dataset=blobs(8, seed=3), callbacks=[seen]
    )
    trainer.train()
    return trainer, seen


def test_what_is_saved_and_is_a_number_or_a_count_may_move():
    assert sorted(name for _, _, name in movable_buffers(quantising())) == MOVING
    assert movable_buffers(net(batchnorm=True)) == []


def test_pass_2_leaves_them_alone(tmp_path):
    # Without a step of the optimizer both runs see the same weights, whatever pass 2 has seen.
    plain, expected = run(Trainer, TrainingArguments, tmp_path, learning_rate=0.0, gradient_accumulation_steps=2)
    lsam, seen = run(LSAMTrainer, LSAMConfig, tmp_path, learning_rate=0.0, gradient_accumulation_steps=2, sam_rho=0.5)
    for ours, theirs in zip(seen.after, expected.after, strict=True):
        for name in MOVING:
            assert torch.equal(ours[name], theirs[name]), name
    assert [buffers["count"].item() for buffers in seen.after] == [2, 4, 6, 8]
    assert not torch.equal(seen.after[0]["codes"], seen.after[-1]["codes"])
    assert vector(lsam.model).tolist() == pytest.approx(vector(plain.model).tolist())


def test_the_anchor_is_shown_and_saved_with_the_workers_own_and_a_log_says_so_once(tmp_path, caplog):
    trainer, seen = run(LSAMTrainer, LSAMConfig, tmp_path, sam_rho=0.1, sync_steps=2)
    for step, found in zip((2, 4), seen.evaluated, strict=True):
        for name in MOVING:
            assert torch.equal(found[name], seen.after[step - 1][name]), name
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], seen.after[-1][name]) for name in MOVING)
    told = [record.getMessage() for record in caplog.records if "moves the buffers" in record.getMessage()]
    assert len(told) == 1
    assert "`codes`, `count`, `norm.weight_u`, ..." in told[0]
    assert "pass training batches through the model in training mode" in told[0]
