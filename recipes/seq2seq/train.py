"""T5 on pairs of texts, through Seq2SeqTrainer.

    accelerate launch --config_file recipes/accelerate.yaml recipes/seq2seq/train.py \\
        --config recipes/seq2seq/lsam.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments`, `LSAMArguments` and `Seq2SeqTrainingArguments`. With
`predict_with_generate` the model (with LSAM, the anchor) generates at every evaluation, and `metric` scores the output;
without it, only the loss is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sacrebleu
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_lsam import LSAMArguments, LSAMTrainerMixin
from recipes.common.arguments import ModelArguments, pick
from recipes.common.methods import SAMMixin, build_trainer
from recipes.common.models import load_model, load_tokenizer, token_fields, with_adapter
from recipes.common.records import RecordArguments, load_records
from recipes.common.run import begin, main, measured_run

IGNORED = -100  # the label of padding, for the loss


@dataclass
class LSAMSeq2SeqConfig(LSAMArguments, Seq2SeqTrainingArguments):
    """Every field of `Seq2SeqTrainingArguments`, and LSAM's own."""


class LSAMSeq2SeqTrainer(LSAMTrainerMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with LSAM."""


class SAMSeq2SeqTrainer(SAMMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with data-parallel SAM."""


TRAINERS = {
    "lsam": (LSAMSeq2SeqTrainer, LSAMSeq2SeqConfig),
    "ddp_sam": (SAMSeq2SeqTrainer, Seq2SeqTrainingArguments),
    "ddp": (Seq2SeqTrainer, Seq2SeqTrainingArguments),
}


def exact_match(texts: list[str], references: list[str]) -> float:
    """The share of texts that equal their reference, apart from surrounding whitespace."""
    return float(np.mean([text.strip() == wanted.strip() for text, wanted in zip(texts, references, strict=True)]))


METRICS = {
    "exact_match": exact_match,
    "bleu": lambda texts, references: sacrebleu.corpus_bleu(texts, [references]).score,
    "chrf": lambda texts, references: sacrebleu.corpus_chrf(texts, [references]).score,
}


@dataclass
class DataArguments(RecordArguments):
    """Where the pairs of texts come from, and how generated texts are scored."""

    source_column: str = field(
        default="source", metadata={"help": "Column of the inputs, or `translation.en` for nested."}
    )
    target_column: str = field(default="target", metadata={"help": "Column of the outputs."})
    source_prefix: str = field(default="", metadata={"help": "In front of every input, as t5 wants it."})
    max_source_length: int = field(default=512, metadata={"help": "Tokens after which an input is cut off."})
    max_target_length: int = field(default=128, metadata={"help": "Tokens after which an output is cut off."})
    metric: str = field(default="chrf", metadata={"help": f"Of generated texts: {', '.join(METRICS)}."})


PIPELINE_TAG = None
KEYS = (ModelArguments, DataArguments, LSAMSeq2SeqConfig)


def tokenize(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Token ids of the inputs, and of the outputs as labels."""

    def encode(batch):
        sources = [args.source_prefix + text for text in batch[args.source_column]]
        encoded = tokenizer(sources, truncation=True, max_length=args.max_source_length)
        targets = tokenizer(text_target=batch[args.target_column], truncation=True, max_length=args.max_target_length)
        return {**encoded, "labels": targets["input_ids"]}

    return pairs.map(encode, batched=True, remove_columns=pairs.column_names, desc="Tokenizing")


def generation_metric(tokenizer: PreTrainedTokenizerBase, name: str):
    """`compute_metrics` for generated token ids."""

    def texts(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return {name: METRICS[name](texts(prediction.predictions), texts(prediction.label_ids))}

    return compute


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.

    Raises:
        ValueError: for an unknown metric, or for data or a model that cannot be what was meant.
    """
    data_args = pick(DataArguments, values)
    if data_args.metric not in METRICS:
        raise ValueError(f"`metric` must be one of {', '.join(METRICS)}, got {data_args.metric!r}.")
    args = begin(values, TRAINERS)
    columns = {"source_column": data_args.source_column, "target_column": data_args.target_column}
    train, held_out = load_records(data_args, columns)
    tokenizer = load_tokenizer(values)
    fields = token_fields(values, tokenizer)
    if fields:
        fields["decoder_start_token_id"] = tokenizer.pad_token_id
    model = load_model(values, AutoModelForSeq2SeqLM, **fields)
    # The model's loss is a mean over the micro-batch, whatever `num_items_in_batch` says.
    model.accepts_loss_kwargs = False
    if values["use_lora"]:
        model = with_adapter(model, pick(ModelArguments, values), TaskType.SEQ_2_SEQ_LM)
    generates = args.predict_with_generate
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=tokenize(train, tokenizer, data_args),
        eval_dataset=tokenize(held_out, tokenizer, data_args),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        compute_metrics=generation_metric(tokenizer, data_args.metric) if generates else None,
    )
    facts = {"train_examples": len(train), "eval_examples": len(held_out)}
    return measured_run(trainer, timer, values, data_args.metric if generates else "loss", **facts)


if __name__ == "__main__":
    main(KEYS, run)
