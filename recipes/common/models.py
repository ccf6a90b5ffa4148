"""The model to train and its tokenizer, pretrained or from scratch, and its adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from recipes.common.arguments import LoraArguments
from recipes.common.configuration import fetching, resolve


def load_model(values: dict[str, Any], auto_class: type, **changes) -> PreTrainedModel:
    """A pretrained model, or one with random weights (`model_config`), with its weights in float32.

    Args:
        values: the value of every key.
        auto_class: for example `AutoModelForCausalLM`.
        changes: fields of the configuration that follow from the data, such as id2label. A `model_config` takes
            precedence over them.

    Raises:
        ValueError: if there is no model or more than one, for an adapter on random weights, or for a `model_config`
            with a field that this type of model does not have.
    """
    name, config = values["model_name_or_path"], values["model_config"]
    if (name is None) == (config is None):
        raise ValueError(
            "Give one of `model_name_or_path` (a model on the Hub or a folder) and `model_config` (a model from "
            f"scratch), got {'neither' if name is None else 'both'}."
        )
    if name is not None:
        # transformers would keep the dtype of the checkpoint, often bfloat16, in which small steps are lost.
        with fetching("model_name_or_path", name):
            return auto_class.from_pretrained(resolve(name), dtype=torch.float32, **changes)
    if values.get("use_lora"):
        raise ValueError(
            "use_lora saves the adapter alone, and the random weights of a `model_config` under it would be gone. "
            "Train all parameters (use_lora false), or name a pretrained model."
        )
    model = auto_class.from_config(model_configuration(config, changes))
    if model.config.model_type == "timm_wrapper":
        model.timm_model.init_weights()  # the wrapper has redrawn all weights as if each were a classification head's
    return model


def model_configuration(config: dict | str, changes: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model from scratch.

    Args:
        config: `model_type` and fields of that type's configuration, as a mapping or as JSON.
        changes: further fields; `config` takes precedence.

    Raises:
        ValueError: if `config` has no `model_type`, or a field that this type does not have.
    """
    fields_given = json.loads(config) if isinstance(config, str) else dict(config)
    model_type = fields_given.pop("model_type", None)
    if model_type is None:
        raise ValueError("`model_config` does not say which model it is for. Add model_type, for example gpt2.")
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map, "num_labels", "id2label", "label2id"}
    unknown = [key for key in fields_given if key not in known]
    if unknown:
        raise ValueError(
            f"`model_config` has the unknown field `{unknown[0]}`: a {model_type} would not use it. Correct its "
            f"spelling or take it out; there are {', '.join(sorted(known))}."
        )
    return AutoConfig.for_model(model_type, **{**changes, **fields_given})


# Marks the assistant's turns, so that trl can train on them alone (assistant_only_loss).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes: it needs no file and can encode any text."""
    special = ["<pad>", "</s>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(values: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer called `tokenizer_name`, or else the model's; for a model from scratch, one of bytes."""
    key = "tokenizer_name" if values["tokenizer_name"] else "model_name_or_path"
    if values[key] is None:
        return byte_tokenizer()
    with fetching(key, values[key]):
        return AutoTokenizer.from_pretrained(resolve(values[key]))


def token_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The configuration fields that a model from scratch takes from its tokenizer; empty for a pretrained model."""
    if values["model_config"] is None:
        return {}
    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer), **special}


def lora_config(args: LoraArguments, task_type: str) -> LoraConfig:
    """peft's configuration.

    Args:
        args: the keys of the adapter.
        task_type: a `peft.TaskType`; a classifier's head is trained in full.
    """
    targets = args.lora_target_modules
    return LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        # peft excludes the head of a sequence classifier from "all-linear", but not that of a token classifier.
        exclude_modules=["classifier", "score"] if task_type == TaskType.TOKEN_CLS else None,
    )


def with_adapter(model: PreTrainedModel, args: LoraArguments, task_type: str) -> PeftModel:
    """The model with the adapter of `lora_config`."""
    with adding_adapter():
        return get_peft_model(model, lora_config(args, task_type))


@contextmanager
def adding_adapter() -> Iterator[None]:
    """Wraps code that adds an adapter, to suppress a warning."""
    # peft reads an attribute that transformers 5 has renamed and warns about; no argument avoids this.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
