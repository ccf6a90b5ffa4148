"""A language model on chats, through trl's SFTTrainer.

    accelerate launch --config_file recipes/accelerate.yaml recipes/sft/train.py \\
        --config recipes/sft/lsam.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments`, `LSAMArguments` and trl's `SFTConfig`. A record has
`messages`, or `prompt` and `completion`, or `text`, in trl's format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import TaskType
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMTrainerMixin
from recipes.common.arguments import ModelArguments, pick
from recipes.common.methods import SAMMixin, build_trainer
from recipes.common.models import adding_adapter, load_model, load_tokenizer, lora_config, token_fields
from recipes.common.records import RecordArguments, load_records
from recipes.common.run import begin, main, measured_run


@dataclass
class LSAMSFTConfig(LSAMArguments, SFTConfig):
    """Every field of `SFTConfig`, and LSAM's own."""


class LSAMSFTTrainer(LSAMTrainerMixin, SFTTrainer):
    """trl's SFTTrainer with LSAM."""


class SAMSFTTrainer(SAMMixin, SFTTrainer):
    """trl's SFTTrainer with data-parallel SAM."""


TRAINERS = {
    "lsam": (LSAMSFTTrainer, LSAMSFTConfig),
    "ddp_sam": (SAMSFTTrainer, SFTConfig),
    "ddp": (SFTTrainer, SFTConfig),
}


@dataclass
class DataArguments(RecordArguments):
    """Where the chats come from."""

    columns: list[str] = field(
        default_factory=lambda: ["messages"],
        metadata={"help": "What is read of a record: messages, or prompt and completion, or text."},
    )


PIPELINE_TAG = "text-generation"
KEYS = (ModelArguments, DataArguments, LSAMSFTConfig)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.
    """
    args = begin(values, TRAINERS)
    data_args = pick(DataArguments, values)
    train, held_out = load_records(data_args, {f"columns ({name})": name for name in data_args.columns})
    tokenizer = load_tokenizer(values)
    model = load_model(values, AutoModelForCausalLM, **token_fields(values, tokenizer))
    adapter = lora_config(pick(ModelArguments, values), TaskType.CAUSAL_LM) if values["use_lora"] else None
    with adding_adapter():
        trainer, timer = build_trainer(
            values,
            args,
            TRAINERS,
            model=model,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=adapter,
        )
    facts = {"train_examples": len(trainer.train_dataset), "eval_examples": len(trainer.eval_dataset)}
    return measured_run(trainer, timer, values, "loss", **facts)


if __name__ == "__main__":
    main(KEYS, run)
