"""Tiny models and data sets that tests train on in a fraction of a second; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

FEATURES, HIDDEN, CLASSES = 8, 16, 3
VOCABULARY = 40


class Rows(Dataset):
    """A list of rows, each a dict of tensors."""

    def __init__(self, rows: list[dict[str, Tensor]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


class Stream(IterableDataset):
    """The same rows without a length."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows.rows)


def blobs(rows: int = 64, seed: int = 0) -> Rows:
    """Points of three overlapping clusters in R^8, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    points = centres[labels] + torch.randn(rows, FEATURES, generator=generator)
    return Rows([{"x": x, "labels": label} for x, label in zip(points, labels, strict=True)])


def sentences(rows: int = 32, length: int = 12, seed: int = 0) -> Rows:
    """Random tokens whose label is the parity of the first; the lengths differ by padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    mask = (torch.arange(length) < torch.randint(4, length + 1, (rows, 1), generator=generator)).long()
    return Rows([{"input_ids": i * m, "attention_mask": m, "labels": i[0] % 2} for i, m in zip(ids, mask, strict=True)])


class Net(nn.Module):
    """Two linear layers, with BatchNorm and dropout between them where asked for."""

    def __init__(self, batchnorm: bool = False, dropout: float = 0.0):
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.norm = nn.BatchNorm1d(HIDDEN) if batchnorm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.float(), labels), "logits": logits}


def net(seed: int = 0, batchnorm: bool = False, dropout: float = 0.0) -> Net:
    """A `Net` with the weights that `seed` gives."""
    torch.manual_seed(seed)
    return Net(batchnorm, dropout)


def tiny_bert(seed: int = 0, dropout: float = 0.0):
    """A BERT classifier of two layers, 16 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=32,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def tiny_gpt2(seed: int = 0):
    """A GPT-2 of two layers, 16 wide, whose output layer is its embedding; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def texts(rows: int = 64, length: int = 8, seed: int = 0) -> Rows:
    """Random tokens, each text its own labels."""
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return Rows([{"input_ids": row, "labels": row} for row in ids])


BASES = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    # As for FSDP: what looks like a bfloat16 weight is packed 4-bit numbers.
    "4 bits in bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "8 bits": {"load_in_8bit": True},
}


def saved_llama(folder: Path) -> str:
    """Saves a Llama of one layer, 64 wide, to `folder`, and returns that."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def adapter():
    """LoRA on two layers of the Llama: 512 values."""
    from peft import LoraConfig, TaskType

    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)


def quantised(folder: Path | str, base: str):
    """The model in `folder` as one of `BASES`, with the adapter."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**BASES[base]))
    torch.manual_seed(1)
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, adapter())


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The bytes of all parameters and buffers that training must not change."""
    tensors = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    return {name: tensor.detach().clone().flatten().view(torch.uint8) for name, tensor in tensors.items()}


def arguments(kind: type, output_dir: Path, **fields: Any):
    """A config of class `kind` for a short, quiet CPU run whose batches come in the order of the rows."""
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "seed": 7,
    }
    return kind(output_dir=str(output_dir), **{**defaults, **fields})


def vector(model: nn.Module) -> Tensor:
    """A copy of the trainable parameters as one flat vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
