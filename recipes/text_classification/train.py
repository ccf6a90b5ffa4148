"""MiniLM on sentences, fully or with LoRA; the quickstart.

    accelerate launch --config_file recipes/accelerate.yaml recipes/text_classification/train.py \\
        --config recipes/text_classification/quickstart.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments` (sentences.py) and `LSAMConfig`, which includes
`TrainingArguments`; recipes/common/methods.py lists the values of `method`.

Afterwards `output_dir` holds the model or adapter, the tokenizer, results.json, a card (README.md) and curves.png.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
)

from hf_lsam import LSAMConfig
from recipes.common.arguments import LoraArguments, MethodArguments, pick
from recipes.common.configuration import fetching, resolve
from recipes.common.methods import TRAINERS, build_trainer
from recipes.common.models import with_adapter
from recipes.common.run import begin, main, measured_run
from recipes.text_classification.sentences import DataArguments, load_examples


@dataclass
class ModelArguments(LoraArguments, MethodArguments):
    """Which model is trained, and how."""

    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id that the model card names, where model_name_or_path is none."}
    )


PIPELINE_TAG = "text-classification"
KEYS = (ModelArguments, DataArguments, LSAMConfig)


def load_model(args: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, list[str]]:
    """The model with a head for `labels`, and the labels in the order of its outputs.

    A model that already has a classification head keeps it, with its own numbering of the labels.

    Raises:
        ValueError: if no model is named, or if its head is for other labels or a different number of them.
    """
    if not args.model_name_or_path:
        raise ValueError("`model_name_or_path` is not set. Name a model on the Hub or a folder.")
    path = resolve(args.model_name_or_path)
    with fetching("model_name_or_path", args.model_name_or_path):
        config = AutoConfig.from_pretrained(path)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        labels = _labels_of_head(args.model_name_or_path, config, labels)
    names = dict(enumerate(labels))
    # As it lies on disk it may be in half precision, in which Trainer would train it and LSAMTrainer would not.
    model = AutoModelForSequenceClassification.from_pretrained(
        path,
        dtype=torch.float32,
        num_labels=len(labels),
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    # The model's loss is a mean over the micro-batch, whatever `num_items_in_batch` says. If its forward accepts that
    # argument, Trainer assumes that the loss is divided by it, and would scale the gradient by the numbers of processes
    # and accumulation steps.
    model.accepts_loss_kwargs = False
    if args.use_lora:
        model = with_adapter(model, args, TaskType.SEQ_CLS)
    return model, labels


def _labels_of_head(name: str, config: PretrainedConfig, labels: list[str]) -> list[str]:
    remedy = (
        "Give data with its labels (keep_labels selects some), or start from a model without a classification head."
    )
    if config.num_labels != len(labels):
        raise ValueError(
            f"{name} classifies into {config.num_labels} labels, the data has {len(labels)}: "
            f"{', '.join(map(repr, labels))}. {remedy}"
        )
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if own == [f"LABEL_{number}" for number in range(config.num_labels)]:
        return labels  # the model does not know their names
    if set(own) != set(labels):
        raise ValueError(
            f"{name} classifies into {', '.join(map(repr, own))}, the data has {', '.join(map(repr, labels))}. {remedy}"
        )
    return own


def tokenize(examples: Dataset, tokenizer, names: list[str], max_length: int) -> Dataset:
    """Token ids and label numbers, numbered in the order of `names`."""
    numbers = [names.index(name) for name in examples.features["labels"].names]

    def encode(batch):
        return {
            **tokenizer(batch["text"], truncation=True, max_length=max_length),
            "label": [numbers[label] for label in batch["labels"]],
        }

    return examples.map(
        encode, batched=True, remove_columns=examples.column_names, keep_in_memory=True, desc="Tokenizing"
    )


def accuracy_metric(rank: int):
    """Makes `compute_metrics` from the metric next to this script, which needs no network."""
    metric = evaluate.load(
        str(Path(__file__).with_name("accuracy")), experiment_id=f"{os.getpid()}-{rank}", keep_in_memory=True
    )

    def compute(prediction):
        return metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)

    return compute


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.
    """

    data_args, model_args = pick(DataArguments, values), pick(ModelArguments, values)
    args = begin(values, TRAINERS)
    train, held_out, labels = load_examples(data_args)
    model, labels = load_model(model_args, labels)
    tokenizer = AutoTokenizer.from_pretrained(resolve(model_args.model_name_or_path))
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=tokenize(train, tokenizer, labels, data_args.max_length),
        eval_dataset=tokenize(held_out, tokenizer, labels, data_args.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy_metric(args.process_index),
    )
    facts = {"train_examples": len(train), "eval_examples": len(held_out), "labels": labels}
    return measured_run(trainer, timer, values, "accuracy", **facts)


if __name__ == "__main__":
    main(KEYS, run)
