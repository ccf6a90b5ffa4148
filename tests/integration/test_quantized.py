"""LoRA adapters on a base in 4 and 8 bits, and other tensors that nothing may perturb or exchange."""

from __future__ import annotations

import json
from dataclasses import dataclass

import datasets
import peft
import pytest
import torch
from launch import PATHS, accelerate_launch, write_script
from models import BASES, Rows, adapter, arguments, blobs, frozen, net, quantised, saved_llama, texts, vector
from safetensors.torch import load_file
from torch import nn
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAM, LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin

# bitsandbytes looks for faster kernels on the hub, and casts by itself; peft asks the model by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
]

FIELDS = {"sam_rho": 0.1, "sync_steps": 2, "max_steps": 6, "optim": "adamw_torch", "learning_rate": 0.01}


class DuringPasses(TrainerCallback):
    """How often the model was run, and whether everything frozen was as it is whenever it was."""

    def __init__(self, model: nn.Module):
        self.kept, self.passes = frozen(model), 0
        model.register_forward_pre_hook(self.compare)

    def compare(self, model, inputs):
        self.passes += model.training
        now = frozen(model)
        assert now.keys() == self.kept.keys()
        for name, tensor in self.kept.items():
            assert torch.equal(now[name], tensor), name


@pytest.mark.parametrize("base", BASES)
def test_qlora(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    folder = saved_llama(tmp_path / "hub")
    model = quantised(folder, base)
    stored = {p.dtype for p in model.parameters() if not p.requires_grad and type(p) is not nn.Parameter}
    assert stored == {{"4 bits": torch.uint8, "4 bits in bfloat16": torch.bfloat16, "8 bits": torch.int8}[base]}
    during, begin = DuringPasses(model), vector(model)
    args = arguments(LSAMConfig, tmp_path / "run", save_strategy="steps", save_steps=4, **FIELDS)
    trainer = LSAMTrainer(model=model, args=args, train_dataset=texts())
    trainer.train()
    assert during.passes == 12  # two a step
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trainable)
    assert trainer.worker.anchor.numel() == vector(model).numel() == 2 * (2 * 64 + 2 * 64)
    anchor = vector(model)
    assert (anchor - begin).abs().max() > 0.01
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.01
    assert all(entry["lsam/sharpness"] > 0 for entry in trainer.state.log_history if "loss" in entry)

    if base == "4 bits in bfloat16":
        return
    other = quantised(folder, base)
    again = LSAMTrainer(model=other, args=args, train_dataset=texts())
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert torch.equal(vector(other), anchor)


TWO_WORKERS = """
import hashlib, json, os, sys
from pathlib import Path

import torch
from models import arguments, frozen, quantised, texts, vector

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, RANK = Path(sys.argv[1]), os.environ["RANK"]


def digests(tensors):
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def loss(model):
    ids = torch.stack([row["input_ids"] for row in texts().rows])
    with torch.no_grad():  # on CPU bitsandbytes may pack what has no gradient anew, and it trains no more
        return model(input_ids=ids, labels=ids).loss.item()


begin = loss(quantised(OUT / "hub", "4 bits"))
model = quantised(OUT / "hub", "4 bits")
kept = frozen(model)
stored = {name: p.dtype for name, p in model.named_parameters() if type(p) is not torch.nn.Parameter}
args = arguments(
    LSAMConfig, OUT / "run", sam_rho=0.1, sync_steps=2, max_steps=15, optim="adamw_torch", learning_rate=0.03,
    per_device_train_batch_size=4,
)
trainer = LSAMTrainer(model=model, args=args, train_dataset=texts())
trainer.train()
assert trainer.model is model
with trainer.local():
    own = vector(model)
report = dict(
    kept=digests(kept),
    frozen=digests(frozen(model)),
    quantised={name: str(dtype) for name, dtype in stored.items()},
    exchanged=[name for name, _, _ in trainer.worker.layout.manifest],
    anchor=vector(model).tolist(),
    own=own.tolist(),
    losses=[begin, loss(model)],
    summary=trainer.worker_summary(),
)
(OUT / f"rank{RANK}.json").write_text(json.dumps(report))
"""


def test_qlora_with_two_workers(tmp_path):
    pytest.importorskip("bitsandbytes")
    saved_llama(tmp_path / "hub")
    script = write_script(tmp_path / "script.py", TWO_WORKERS)
    accelerate_launch(script, str(tmp_path), fork=True, PYTHONPATH=PATHS)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["anchor"] == second["anchor"]
    assert first["own"] != second["own"]  # each has made its last step on texts of its own
    for report in (first, second):
        # The seven linear layers of the one block, and beside them embeddings, norms, the output layer and a buffer.
        assert set(report["quantised"].values()) == {"torch.uint8"}
        assert len(report["quantised"]) == 7
        assert set(report["quantised"]) < set(report["kept"])
        assert report["frozen"] == report["kept"] == first["kept"]
        assert all("lora_" in name for name in report["exchanged"])
        summary = report["summary"]
        assert summary["trainable_parameters"] == len(report["anchor"]) == 512
        assert summary["steps"] == 15
        assert summary["pushes"] >= 1
        assert summary["bytes_pushed"] == summary["pushes"] * 512 * 4
        assert summary["bytes_pulled"] % (512 * 4) == 0
        before, after = report["losses"]
        assert after < before - 0.01
    assert first["losses"] == second["losses"]


@dataclass
class LSAMSFTConfig(LSAMArguments, SFTConfig):
    pass


class LSAMSFTTrainer(LSAMTrainerMixin, SFTTrainer):
    pass


@pytest.mark.parametrize("base", ["4 bits", "8 bits"])
def test_qlora_with_trl_whose_adapters_are_bfloat16(tmp_path, base):
    pytest.importorskip("bitsandbytes")
    from recipes.common.models import byte_tokenizer

    tokens = datasets.Dataset.from_dict({"input_ids": [row["input_ids"].tolist() for row in texts().rows]})
    trainer = LSAMSFTTrainer(
        model=saved_llama(tmp_path / "hub"),
        args=arguments(LSAMSFTConfig, tmp_path / "run", max_length=16, **FIELDS),
        train_dataset=tokens,
        processing_class=byte_tokenizer(),
        peft_config=adapter(),
        quantization_config=BitsAndBytesConfig(**BASES[base]),
    )
    model = trainer.model
    assert {dtype for _, dtype in trainer.session.cast} == {torch.bfloat16}
    during, begin = DuringPasses(model), vector(model)
    assert begin.dtype == torch.float32
    trainer.train()
    assert during.passes == 12
    assert (vector(model) - begin).abs().max() > 0.01
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    shown = peft.get_peft_model_state_dict(model)
    assert all(torch.equal(saved[name], shown[name].bfloat16()) for name in shown)


class OnIntegers(nn.Module):
    """Two linear layers, of which the first is frozen in 8 bits in a parameter, and in torch's own form in a buffer."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        full = net().first.weight.detach()
        packed = torch.quantize_per_tensor(full, scale=0.01, zero_point=0, dtype=torch.qint8)
        self.weight = nn.Parameter(packed.int_repr(), requires_grad=False)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", torch.tensor(0.01, dtype=dtype))
        self.last = net().last.to(dtype)

    def forward(self, x, labels=None):
        weight = 0.5 * (self.weight * self.scale.float() + self.packed.dequantize())
        logits = self.last(torch.tanh(x @ weight.T).to(self.last.weight.dtype))
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # which will go
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_integers_take_no_part(tmp_path, dtype):
    model = OnIntegers(dtype)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if "last" not in name}
    args = arguments(LSAMConfig, tmp_path, **FIELDS)
    trainer = LSAMTrainer(model=model, args=args, train_dataset=blobs())
    trainer.train()
    trained = net().last
    assert trainer.worker.anchor.numel() == sum(p.numel() for p in trained.parameters())
    assert (model.last.weight - trained.weight.to(dtype)).abs().max() > 0.01
    now = model.state_dict()
    assert torch.equal(now["weight"], kept["weight"])
    assert now["packed"].is_quantized
    assert torch.equal(now["packed"].int_repr(), kept["packed"].int_repr())
    assert now["scale"] == kept["scale"].float()


def test_a_frozen_tensor_of_a_class_of_its_own_stays_in_the_type_it_names():
    class Packed(nn.Parameter):
        """As quantised weights come: the numbers in it are no bfloat16."""

    model = net().bfloat16()
    model.first.weight = Packed(model.first.weight.detach(), requires_grad=False)
    bits = model.first.weight.view(torch.int16).clone()
    LSAM(model, torch.optim.SGD(model.last.parameters(), lr=0.1))
    assert model.first.bias.dtype == model.last.weight.dtype == torch.float32
    assert torch.equal(model.first.weight.view(torch.int16), bits)


def test_parameters_in_8_bits_that_train_are_refused(tmp_path):
    model = net()
    model.tiny = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"`tiny` is stored in torch\.float8_e4m3fn.*dtype=torch\.float32"):
        LSAMTrainer(model=model, args=arguments(LSAMConfig, tmp_path), train_dataset=Rows(blobs().rows))
