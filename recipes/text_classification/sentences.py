"""Labelled sentences from a CSV or JSON file or from the Hub, checked before any time is spent on training."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, Features, Value

from recipes.common.labels import natural_order
from recipes.common.records import RecordArguments, first, read_records, sources_of


@dataclass
class DataArguments(RecordArguments):
    """Where the sentences come from. Give `train_file` or `dataset_name`; held-out parts are stratified."""

    text_column: str = field(default="text", metadata={"help": "Column of the sentences."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: strings or integers."})
    keep_labels: list[str] | None = field(
        default=None, metadata={"help": "Keep only examples with these labels, numbered in this order."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens after which a sentence is cut off."})


@dataclass
class Examples:
    """Sentences and their labels, both as strings.

    Args:
        source: the file or split, for messages.
    """

    source: str
    texts: list[str]
    labels: list[str]


def load_examples(args: DataArguments) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out examples with columns `text` (string) and `labels` (`ClassLabel`), and the label names.

    Raises:
        ValueError: if the data cannot be what was meant; the message names the file, the column, what is there, and the
            remedy.
    """
    columns = {"text_column": args.text_column, "label_column": args.label_column}
    training, evaluation = read_records(args, columns)
    train_source, held_out_source = sources_of(args)
    train = _keep(_examples(training, train_source, args), args)
    names = args.keep_labels or sorted(set(train.labels), key=natural_order)
    if len(names) < 2:
        raise ValueError(
            f"{train.source} has one label only in column `{args.label_column}`, {names[0]!r}: there is nothing to "
            "learn. Give examples of at least two labels."
        )
    training = _dataset(train, names)
    if evaluation is not None:
        held_out = _keep(_examples(evaluation, held_out_source, args), args)
        unseen = sorted(set(held_out.labels) - set(names), key=natural_order)
        if unseen:
            raise ValueError(
                f"{held_out.source} has labels in column `{args.label_column}` that {train.source} never has: "
                f"{', '.join(map(repr, unseen))} (there: {', '.join(map(repr, names))}). No model could predict them. "
                "Take them out, add training examples, or name the labels to keep (keep_labels)."
            )
        evaluation = _dataset(held_out, names)
    for _ in range((evaluation is None) + args.tuning):
        training, evaluation = _split(training, train.source, args)
    return first(training, args.max_train_samples), first(evaluation, args.max_eval_samples), names


def _examples(records: Dataset, source: str, args: DataArguments) -> Examples:
    texts, labels = list(records[args.text_column]), list(records[args.label_column])
    for column, values in ((args.text_column, texts), (args.label_column, labels)):
        if any(isinstance(value, (list, dict)) for value in values):
            raise ValueError(f"{source}: column `{column}` holds lists or objects. It must hold one value a row.")
    feature = records.features[args.label_column]
    if isinstance(feature, ClassLabel):
        labels = feature.int2str(labels)
    return Examples(source, [str(text) for text in texts], [str(label).strip() for label in labels])


def _keep(examples: Examples, args: DataArguments) -> Examples:
    if args.keep_labels is None:
        return examples
    present = Counter(examples.labels)
    absent = [label for label in args.keep_labels if label not in present]
    if absent:
        raise ValueError(
            f"{examples.source} has no example labelled {absent[0]!r} in column `{args.label_column}`; its labels are "
            f"{', '.join(map(repr, sorted(present, key=natural_order)))}. Correct keep_labels."
        )
    kept = [(t, label) for t, label in zip(examples.texts, examples.labels, strict=True) if label in args.keep_labels]
    return Examples(examples.source, [text for text, _ in kept], [label for _, label in kept])


def _dataset(examples: Examples, names: list[str]) -> Dataset:
    numbers = {name: number for number, name in enumerate(names)}
    columns = {"text": examples.texts, "labels": [numbers[label] for label in examples.labels]}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "labels": ClassLabel(names=names)}))


def _split(dataset: Dataset, source: str, args: DataArguments) -> tuple[Dataset, Dataset]:
    """A stratified split. A sentence that is held out is not trained on, however often it occurs in the data."""
    size = args.eval_size if 0 < args.eval_size < 1 else int(args.eval_size)
    classes = dataset.features["labels"].num_classes
    held_out = size * len(dataset) if size < 1 else size
    if not classes <= held_out <= len(dataset) - classes:
        raise ValueError(
            f"eval_size={args.eval_size:g} would hold out {held_out:.0f} of {len(dataset)} examples of {source}, which "
            f"cannot hold each of {classes} labels on both sides. Use a share in (0, 1), or a number from {classes} to "
            f"{len(dataset) - classes}."
        )
    rarest, count = min(Counter(dataset["labels"]).items(), key=lambda item: item[1])
    if count < 2:
        raise ValueError(
            f"{source} has one example only of label {dataset.features['labels'].int2str(rarest)!r}: it cannot be both "
            "trained on and held out. Add examples, give validation_file, or leave it out with keep_labels."
        )
    parts = dataset.train_test_split(size, stratify_by_column="labels", seed=args.split_seed)
    seen = {_normal(text) for text in parts["test"]["text"]}
    fresh = [index for index, text in enumerate(parts["train"]["text"]) if _normal(text) not in seen]
    return parts["train"].select(fresh), parts["test"]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
