"""Labelled sentences from a CSV or JSON file or from the Hub, checked before any time is spent on them."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from configuration import resolve
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset


@dataclass
class DataArguments:
    """Where the sentences come from. Give `train_file` or `dataset_name`."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "CSV, TSV, JSON or JSON-lines file; package://PACKAGE/PATH names one of a package."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File of held-out examples, as train_file."})
    file_encoding: str = field(default="utf-8-sig", metadata={"help": "Character encoding of the files."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, as `sst2` of `glue`."})
    train_split: str = field(default="train", metadata={"help": "Split of dataset_name to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split of dataset_name to hold out; where there is none: eval_size."}
    )
    text_column: str = field(default="text", metadata={"help": "Column of the sentences."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels: strings or integers."})
    keep_labels: list[str] | None = field(
        default=None, metadata={"help": "Keep only examples with these labels, numbered in this order."}
    )
    eval_size: float = field(
        default=0.1,
        metadata={"help": "Held out, stratified, where there is no validation data: a share, or a number from 1 up."},
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of that split; the run's own seed leaves it alone."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many only."})
    max_length: int = field(default=128, metadata={"help": "Tokens after which a sentence is cut off."})


@dataclass
class Examples:
    """Sentences and their labels, both as strings.

    Args:
        source: the file or split, for messages.
        columns: the columns there are.
    """

    source: str
    columns: list[str]
    texts: list[str]
    labels: list[str]


def load_examples(args: DataArguments) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out examples with columns `text` (string) and `labels` (`ClassLabel`), and the label names.

    Raises:
        ValueError: if the data cannot be what was meant; it names the file, the column, what there is, the remedy.
    """
    train, held_out = _read_files(args) if args.train_file else _read_dataset(args)
    train = _keep(train, args)
    names = args.keep_labels or sorted(set(train.labels), key=_natural)
    if len(names) < 2:
        raise ValueError(
            f"{train.source} has one label only in column `{args.label_column}`, {names[0]!r}: there is nothing to "
            "learn. Give examples of at least two labels."
        )
    if held_out is None:
        training, evaluation = _split(_dataset(train, names), train.source, args)
    else:
        held_out = _keep(held_out, args)
        unseen = sorted(set(held_out.labels) - set(names), key=_natural)
        if unseen:
            raise ValueError(
                f"{held_out.source} has labels in column `{args.label_column}` that {train.source} never has: "
                f"{', '.join(map(repr, unseen))} (there: {', '.join(map(repr, names))}). No model could predict them. "
                "Take them out, add training examples, or name the labels to keep (keep_labels)."
            )
        training, evaluation = _dataset(train, names), _dataset(held_out, names)
    if args.max_train_samples is not None:
        training = training.select(range(min(args.max_train_samples, len(training))))
    if args.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(args.max_eval_samples, len(evaluation))))
    return training, evaluation, names


def _read_files(args: DataArguments) -> tuple[Examples, Examples | None]:
    if args.dataset_name:
        raise ValueError("Both train_file and dataset_name are given, and only one can be trained on. Drop one.")
    train = _read_file(args.train_file, args)
    return train, _read_file(args.validation_file, args) if args.validation_file else None


def _read_file(name: str, args: DataArguments) -> Examples:
    path = Path(resolve(name))
    if not path.is_file():
        raise ValueError(f"There is no data file {path}. Name a .csv, .tsv, .json or .jsonl file.")
    try:
        text = path.read_bytes().decode(args.file_encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(
            f"{path} cannot be read as {args.file_encoding}: {error}. Set file_encoding to its encoding, for example "
            "latin-1."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty. It needs the columns `{args.text_column}` and `{args.label_column}`.")
    rows, columns = _parse(path, text)
    _require_columns(str(path), columns, args)
    if not rows:
        raise ValueError(f"{path} has a header ({', '.join(columns)}) and no row. Add examples.")
    texts, labels = ([row.get(column) for row in rows] for column in (args.text_column, args.label_column))
    return _examples(str(path), columns, texts, labels, args)


def _parse(path: Path, text: str) -> tuple[list[dict], list[str]]:
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
            rows = list(reader)
            wide = next((number for number, row in enumerate(rows, 1) if None in row), None)
            if wide is not None:
                raise ValueError(f"row {wide} has more fields than the header (quote texts that hold a {delimiter!r})")
            return rows, list(reader.fieldnames or [])
        if suffix in (".json", ".jsonl"):
            lines = not text.lstrip().startswith("[")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("it must be a list of objects, or one object a line")
            return rows, list(dict.fromkeys(key for row in rows for key in row))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path} is not a valid {suffix} file: {error}.") from error
    raise ValueError(f"{path}: unknown kind of file {suffix!r}. Use .csv, .tsv, .json or .jsonl.")


def _read_dataset(args: DataArguments) -> tuple[Examples, Examples | None]:
    if args.validation_file or not args.dataset_name:
        raise ValueError(
            "There is no training data. Give train_file (a CSV or JSON file) or dataset_name (a data set on the Hub); "
            "validation_file goes with train_file."
        )
    splits = load_dataset(args.dataset_name, args.dataset_config_name)
    assert isinstance(splits, DatasetDict)
    if args.train_split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split `{args.train_split}`, only {', '.join(splits)}. Set train_split."
        )
    held_out = splits.get(args.validation_split)
    if held_out is None and args.validation_split != DataArguments.validation_split:
        raise ValueError(
            f"{args.dataset_name} has no split `{args.validation_split}`, only {', '.join(splits)}. Set "
            "validation_split, or leave it out to hold out a part of the training split."
        )
    train = _of_split(splits[args.train_split], args.train_split, args)
    return train, None if held_out is None else _of_split(held_out, args.validation_split, args)


def _of_split(split: Dataset, name: str, args: DataArguments) -> Examples:
    source = f"{args.dataset_name} (split {name})"
    _require_columns(source, split.column_names, args)
    labels = list(split[args.label_column])
    feature = split.features[args.label_column]
    if isinstance(feature, ClassLabel):
        labels = [None if label is None or label < 0 else feature.int2str(label) for label in labels]
    return _examples(source, split.column_names, list(split[args.text_column]), labels, args)


def _require_columns(source: str, columns: Sequence[str], args: DataArguments) -> None:
    for key in ("text_column", "label_column"):
        if getattr(args, key) not in columns:
            raise ValueError(
                f"{source} has no column `{getattr(args, key)}`; its columns are {', '.join(map(repr, columns))}. Set "
                f"{key} to one of them."
            )


def _examples(source: str, columns: list[str], texts: list, labels: list, args: DataArguments) -> Examples:
    for column, values in ((args.text_column, texts), (args.label_column, labels)):
        missing = [number for number, value in enumerate(values, 1) if value is None or not str(value).strip()]
        if missing:
            raise ValueError(
                f"{source}: {len(missing)} of {len(values)} rows have nothing in column `{column}`, the first is row "
                f"{missing[0]}. Fill them in or take them out."
            )
        if any(isinstance(value, (list, dict)) for value in values):
            raise ValueError(f"{source}: column `{column}` holds lists or objects. It must hold one value a row.")
    return Examples(source, list(columns), [str(text) for text in texts], [str(label).strip() for label in labels])


def _keep(examples: Examples, args: DataArguments) -> Examples:
    if args.keep_labels is None:
        return examples
    present = Counter(examples.labels)
    absent = [label for label in args.keep_labels if label not in present]
    if absent:
        raise ValueError(
            f"{examples.source} has no example labelled {absent[0]!r} in column `{args.label_column}`; its labels are "
            f"{', '.join(map(repr, sorted(present, key=_natural)))}. Correct keep_labels."
        )
    kept = [(t, label) for t, label in zip(examples.texts, examples.labels, strict=True) if label in args.keep_labels]
    return Examples(examples.source, examples.columns, [text for text, _ in kept], [label for _, label in kept])


def _dataset(examples: Examples, names: list[str]) -> Dataset:
    numbers = {name: number for number, name in enumerate(names)}
    columns = {"text": examples.texts, "labels": [numbers[label] for label in examples.labels]}
    return Dataset.from_dict(columns, features=Features({"text": Value("string"), "labels": ClassLabel(names=names)}))


def _split(dataset: Dataset, source: str, args: DataArguments) -> tuple[Dataset, Dataset]:
    """A stratified split; a sentence that is held out is not trained on, however often it stands in the data."""
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


def _natural(label: str) -> tuple[bool, int, str]:
    """Sorts "2" before "10"."""
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)
