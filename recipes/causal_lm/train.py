"""A causal language model on text, fully or with LoRA.

    accelerate launch --config_file recipes/accelerate.yaml recipes/causal_lm/train.py \\
        --config recipes/causal_lm/lsam.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments` and `LSAMConfig`, which includes `TrainingArguments`. The
texts are concatenated, with an end-of-text token after each, and cut into blocks, as in transformers' run_clm.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from datasets import Dataset
from peft import TaskType
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, default_data_collator

from hf_lsam import LSAMConfig
from recipes.common.arguments import ModelArguments, pick
from recipes.common.methods import TRAINERS, build_trainer
from recipes.common.models import load_model, load_tokenizer, token_fields, with_adapter
from recipes.common.records import RecordArguments, first, held_out_size, read_records
from recipes.common.run import begin, main, measured_run


@dataclass
class DataArguments(RecordArguments):
    """Where the text comes from: a .txt file, a column of another kind of file, or a data set on the Hub.

    The limits on samples count blocks. Without validation data, the last blocks are held out.
    """

    text_column: str = field(default="text", metadata={"help": "Column of the texts; of a .txt file it is `text`."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a block."})


PIPELINE_TAG = "text-generation"
KEYS = (ModelArguments, DataArguments, LSAMConfig)


def to_blocks(texts: Dataset, column: str, tokenizer: PreTrainedTokenizerBase, size: int) -> Dataset:
    """Blocks of `size` tokens with columns `input_ids` and `labels`; tokens that do not fill a block are dropped.

    Args:
        texts: a data set with the texts in `column`.

    Raises:
        ValueError: if the texts do not fill one block.
    """

    def encode(batch):
        texts = [text for text in batch[column] if text]
        if not texts:
            return {"input_ids": []}
        rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in rows["input_ids"]]}

    def cut(batch):
        ids = list(chain.from_iterable(batch["input_ids"]))
        blocks = [ids[begin : begin + size] for begin in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    tokens = texts.map(encode, batched=True, remove_columns=texts.column_names, desc="Tokenizing")
    blocks = tokens.map(cut, batched=True, desc="Cutting into blocks")
    if not len(blocks):
        raise ValueError(
            f"{len(texts)} texts of column `{column}` do not fill one block of block_size={size} tokens. Give more "
            "text or a smaller block_size."
        )
    return blocks


def load_blocks(args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Dataset, Dataset]:
    """Training and held-out blocks (see `to_blocks`)."""
    train, held_out = read_records(args, {"text_column": args.text_column}, may_be_empty=True)
    train = to_blocks(train, args.text_column, tokenizer, args.block_size)
    if held_out is not None:
        held_out = to_blocks(held_out, args.text_column, tokenizer, args.block_size)
    for _ in range((held_out is None) + args.tuning):
        # Not at random, because a held-out block's neighbours in the same text would be trained on.
        begin = len(train) - held_out_size(args, len(train), "blocks")
        train, held_out = train.select(range(begin)), train.select(range(begin, len(train)))
    return first(train, args.max_train_samples), first(held_out, args.max_eval_samples)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.
    """
    args = begin(values, TRAINERS)
    tokenizer = load_tokenizer(values)
    train, held_out = load_blocks(pick(DataArguments, values), tokenizer)
    model = load_model(values, AutoModelForCausalLM, **token_fields(values, tokenizer))
    if values["use_lora"]:
        model = with_adapter(model, pick(ModelArguments, values), TaskType.CAUSAL_LM)
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    facts = {"train_examples": len(train), "eval_examples": len(held_out)}
    return measured_run(trainer, timer, values, "loss", **facts)


if __name__ == "__main__":
    main(KEYS, run)
