"""MiniLM on tagged words.

    accelerate launch --config_file recipes/accelerate.yaml recipes/token_classification/train.py \\
        --config recipes/token_classification/lsam.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments` and `LSAMConfig`, which includes `TrainingArguments`. A
record has the words of a sentence and a tag for each word; tags B-X and I-X form entities, over which `f1` is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from peft import TaskType
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from hf_lsam import LSAMConfig
from recipes.common.arguments import ModelArguments, pick
from recipes.common.methods import TRAINERS, build_trainer
from recipes.common.models import load_model, load_tokenizer, token_fields, with_adapter
from recipes.common.records import RecordArguments, load_records
from recipes.common.run import begin, main, measured_run

IGNORED = -100  # the label, ignored by the loss, of tokens that do not begin a word


@dataclass
class DataArguments(RecordArguments):
    """Where the tagged sentences come from."""

    tokens_column: str = field(default="tokens", metadata={"help": "Column of the words: a list a sentence."})
    tags_column: str = field(default="tags", metadata={"help": "Column of their tags: as many strings or numbers."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a sentence is cut off."})


PIPELINE_TAG = "token-classification"
KEYS = (ModelArguments, DataArguments, LSAMConfig)


def load_sentences(args: DataArguments) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out sentences with tags as strings, and the list of tags: those that the data set declares, or
    else those of the training sentences in alphabetical order.

    Raises:
        ValueError: if words and tags differ in number, or if a held-out tag is not among the tags.
    """
    parts = load_records(args, {"tokens_column": args.tokens_column, "tags_column": args.tags_column})
    feature = getattr(parts[0].features[args.tags_column], "feature", None)
    declared = feature.names if isinstance(feature, ClassLabel) else None
    named = []
    for part in parts:
        for column in (args.tokens_column, args.tags_column):
            for number, cell in enumerate(part[column], 1):
                if not isinstance(cell, list) or None in cell:
                    raise ValueError(
                        f"Sentence {number} has {cell!r} in column `{column}`, which is no list of words or tags (a "
                        "CSV holds none). Give JSON lines with a list a sentence, as in the recipe's README."
                    )
        if declared is None and any(isinstance(tag, int) for sentence in part[args.tags_column] for tag in sentence):
            raise ValueError(
                f"Column `{args.tags_column}` holds numbers, and nothing says what they mean: even the words outside "
                "of all entities would count as entities. Give names, such as O and B-PER."
            )
        tags = [[declared[tag] if declared else str(tag) for tag in sentence] for sentence in part[args.tags_column]]
        for number, (words, own) in enumerate(zip(part[args.tokens_column], tags, strict=True), 1):
            if len(words) != len(own):
                raise ValueError(
                    f"Sentence {number} has {len(words)} words in column `{args.tokens_column}` and {len(own)} tags in "
                    f"column `{args.tags_column}`. Give each word a tag; {' '.join(map(str, words[:8]))!r} is its "
                    "beginning."
                )
        named.append(Dataset.from_dict({"words": part[args.tokens_column], "tags": tags}))
    train, held_out = named
    tags = declared or sorted({tag for sentence in train["tags"] for tag in sentence})
    unseen = sorted({tag for sentence in held_out["tags"] for tag in sentence} - set(tags))
    if unseen:
        raise ValueError(
            f"There are held-out tags that no training sentence has: {', '.join(map(repr, unseen))} (there: "
            f"{', '.join(map(repr, tags))}). No model could predict them. Add training sentences, or take them out."
        )
    return train, held_out, tags


def tokenize(sentences: Dataset, tokenizer: PreTrainedTokenizerBase, tags: list[str], max_length: int) -> Dataset:
    """Token ids and labels: a word's tag at its first token, `IGNORED` at all others."""
    numbers = {tag: number for number, tag in enumerate(tags)}

    def encode(batch):
        encoded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=max_length)
        labels = []
        for row, own in enumerate(batch["tags"]):
            words = encoded.word_ids(row)
            begins = [word is not None and word != before for before, word in zip([None, *words], words, strict=False)]
            labels.append([numbers[own[w]] if begin else IGNORED for w, begin in zip(words, begins, strict=True)])
        return {**encoded, "labels": labels}

    return sentences.map(encode, batched=True, remove_columns=sentences.column_names, desc="Tokenizing")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, index of the first word, index after the last word) of each entity.

    As in conlleval, a tag I-X that does not continue an entity begins one. Any tag other than B-X, I-X and O is an
    entity of a single word.
    """
    found, kind, begin = set(), None, 0
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-") if tag[:2] in ("B-", "I-") else ("B", "", tag)
        if kind is not None and not (prefix == "I" and name == kind):
            found.add((kind, begin, at))
            kind = None
        if kind is None and tag != "O":
            kind, begin = name, at
    return found


def entity_scores(predicted: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities in all sentences, and the accuracy of the tags."""
    pairs = [(entities(a), entities(b)) for a, b in zip(predicted, wanted, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    said, there = sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)
    same = [x == y for a, b in zip(predicted, wanted, strict=True) for x, y in zip(a, b, strict=True)]
    return {
        "f1": 2 * right / max(1, said + there),
        "precision": right / max(1, said),
        "recall": right / max(1, there),
        "accuracy": float(np.mean(same)),
    }


def entity_metric(tags: list[str]):
    """Makes `compute_metrics` from `entity_scores`."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels, best = prediction.label_ids, prediction.predictions.argmax(-1)
        kept = labels != IGNORED
        named = [[[tags[n] for n in row[mask]] for row, mask in zip(ids, kept, strict=True)] for ids in (best, labels)]
        return entity_scores(*named)

    return compute


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.
    """
    data_args = pick(DataArguments, values)
    args = begin(values, TRAINERS)
    train, held_out, tags = load_sentences(data_args)
    tokenizer = load_tokenizer(values)
    names = dict(enumerate(tags))
    model = load_model(
        values,
        AutoModelForTokenClassification,
        id2label=names,
        label2id={tag: number for number, tag in names.items()},
        **token_fields(values, tokenizer),
    )
    # The model's loss is a mean over the micro-batch, whatever `num_items_in_batch` says.
    model.accepts_loss_kwargs = False
    if values["use_lora"]:
        model = with_adapter(model, pick(ModelArguments, values), TaskType.TOKEN_CLS)
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=tokenize(train, tokenizer, tags, data_args.max_length),
        eval_dataset=tokenize(held_out, tokenizer, tags, data_args.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        compute_metrics=entity_metric(tags),
    )
    facts = {"train_examples": len(train), "eval_examples": len(held_out), "labels": tags}
    return measured_run(trainer, timer, values, "f1", **facts)


if __name__ == "__main__":
    main(KEYS, run)
