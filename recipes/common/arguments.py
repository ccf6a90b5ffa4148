"""Keys that recipes share: the method, the model, a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class MethodArguments:
    """The method, and the model to start from."""

    method: str = field(
        default="lsam", metadata={"help": "'lsam', 'ddp_sam' (data-parallel SAM) or 'ddp' (without SAM)."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model on the Hub, a folder, or package://PACKAGE/PATH."}
    )
    nesterov: bool = field(default=False, metadata={"help": "Train with hf_lsam.NesterovAdamW, whatever `optim` says."})


@dataclass
class ScratchArguments:
    """A model from scratch, in place of `model_name_or_path`."""

    model_config: dict | str | None = field(
        default=None, metadata={"help": "A configuration for a model with random weights: model_type and its fields."}
    )


@dataclass
class TokenizerArguments:
    """The tokenizer, if it is not the model's."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer on the Hub or a folder; default: the model's, or bytes for a model_config."},
    )


@dataclass
class LoraArguments:
    """A LoRA adapter."""

    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all parameters."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=16, metadata={"help": "Its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "'all-linear', or module names separated by commas."}
    )


def pick(kind: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `kind`, from the values of its fields."""
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.init})


@dataclass
class ModelArguments(LoraArguments, TokenizerArguments, ScratchArguments, MethodArguments):
    """Which language model is trained, and how."""
