"""Fine-tunes a language model on chats through trl's SFTTrainer: with LSAM, with data-parallel SAM, or as it is.

    accelerate launch --multi_gpu --num_processes 2 scripts/train_sft.py \\
        --config recipes/sft/lsam.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments`, `LSAMArguments` and trl's `SFTConfig`. A record has
`messages`, or `prompt` and `completion`, or `text`, as trl takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from peft import TaskType
from records import RecordArguments, load_records
from reporting import write_report
from training import (
    ModelArguments,
    SAMMixin,
    build_trainer,
    load_model,
    load_tokenizer,
    lora_config,
    main,
    measured_run,
    pick,
    token_fields,
    training_arguments,
)
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMTrainerMixin


@dataclass
class LSAMSFTConfig(LSAMArguments, SFTConfig):
    """Every field of `SFTConfig`, and LSAM's own."""


class LSAMSFTTrainer(LSAMTrainerMixin, SFTTrainer):
    """trl's SFTTrainer with LSAM."""


class SAMSFTTrainer(SAMMixin, SFTTrainer):
    """trl's SFTTrainer with data-parallel SAM."""


TRAINERS = {
    "lsam": (LSAMSFTTrainer, LSAMSFTConfig),
    "sam": (SAMSFTTrainer, SFTConfig),
    "sgd": (SFTTrainer, SFTConfig),
}


@dataclass
class DataArguments(RecordArguments):
    """Where the chats come from."""

    columns: list[str] = field(
        default_factory=lambda: ["messages"],
        metadata={"help": "What is read of a record: messages, or prompt and completion, or text."},
    )


KEYS = (ModelArguments, DataArguments, LSAMSFTConfig)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates, saves; the results at worker 0, None at the others.

    Args:
        values: the value of every key, as `parse_configuration` gives them.
    """
    args = training_arguments(values, TRAINERS)
    set_seed(args.seed)
    if args.process_index > 0:
        disable_progress_bars()
    data_args = pick(DataArguments, values)
    train, held_out = load_records(data_args, {f"columns ({name})": name for name in data_args.columns})
    tokenizer = load_tokenizer(values)
    model = load_model(values, AutoModelForCausalLM, **token_fields(values, tokenizer))
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=lora_config(pick(ModelArguments, values), TaskType.CAUSAL_LM) if values["use_lora"] else None,
    )
    facts = {"train_examples": len(trainer.train_dataset), "eval_examples": len(trainer.eval_dataset)}
    results = measured_run(trainer, timer, values, "loss", **facts)
    if results is not None:
        results["eval_perplexity"] = math.exp(results["eval_loss"])
        write_report(Path(args.output_dir), results)
    return results


if __name__ == "__main__":
    main(KEYS, run)
