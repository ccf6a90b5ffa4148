"""Records from a file or from the Hub for the training scripts: checked, with a part held out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset

from recipes.common.configuration import fetching, resolve


@dataclass
class RecordArguments:
    """Where the records come from. Give `train_file` or `dataset_name`."""

    train_file: str | None = field(
        default=None,
        metadata={"help": "CSV, TSV, JSON, JSON-lines or parquet file; package://PACKAGE/PATH names one of a package."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "File of held-out examples, as train_file."})
    file_encoding: str = field(default="utf-8-sig", metadata={"help": "Character encoding of the files."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, as `sst2` of `glue`."})
    train_split: str = field(default="train", metadata={"help": "Split of dataset_name to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split of dataset_name to hold out; where there is none: eval_size."}
    )
    eval_size: float = field(
        default=0.1, metadata={"help": "Held out where there is no validation data: a share, or a number from 1 up."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of that split; the run's own seed leaves it alone."})
    tuning: bool = field(
        default=False,
        metadata={"help": "Hold out a part of what is trained on instead: choose settings, validation data unseen."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many only."})


# --- one file ---


def _read_text(name: str, encoding: str) -> tuple[Path, str]:
    """The path of a file and its text.

    Raises:
        ValueError: if there is no such file, or if it cannot be decoded.
    """
    path = Path(resolve(name))
    if not path.is_file():
        raise ValueError(f"There is no data file {path}. Name a .csv, .tsv, .json or .jsonl file.")
    try:
        return path, path.read_bytes().decode(encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(
            f"{path} cannot be read as {encoding}: {error}. Set file_encoding to its encoding, for example latin-1."
        ) from error


def _parse_rows(path: Path, text: str) -> tuple[list[dict], list[str]]:
    """The rows of a CSV, TSV, JSON or JSON-lines file, and its columns.

    Raises:
        ValueError: if it is malformed, or some other kind of file.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            delimiter = "\t" if suffix == ".tsv" else ","
            csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long text is no error
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


def _read_file(name: str, args: RecordArguments) -> Dataset:
    if Path(name).suffix.lower() == ".parquet" and Path(resolve(name)).is_file():
        return Dataset(pyarrow.parquet.read_table(resolve(name)))
    path, text = _read_text(name, args.file_encoding)
    if path.suffix.lower() == ".txt":
        return Dataset.from_dict({"text": [text] if text.strip() else []})
    rows, columns = _parse_rows(path, text)
    try:
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns})
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} has a column with values of several kinds: {error}. Give each column one kind, for example "
            "strings, also where they are numbers."
        ) from error


# --- training and held-out records ---


def _load_splits(args: RecordArguments) -> tuple[Dataset, Dataset | None]:
    """The training split and the held-out split of `dataset_name`; the latter is None if there is none.

    Raises:
        ValueError: if a requested split does not exist, or `dataset_name` is not set.
    """
    if args.validation_file or not args.dataset_name:
        raise ValueError(
            "There is no training data. Give train_file (a CSV or JSON file) or dataset_name (a data set on the Hub); "
            "validation_file goes with train_file."
        )
    with fetching("dataset_name", args.dataset_name):
        splits = load_dataset(args.dataset_name, args.dataset_config_name)
    assert isinstance(splits, DatasetDict)
    if args.train_split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split `{args.train_split}`, only {', '.join(splits)}. Set train_split."
        )
    held_out = splits.get(args.validation_split)
    if held_out is None and args.validation_split != RecordArguments.validation_split:
        raise ValueError(
            f"{args.dataset_name} has no split `{args.validation_split}`, only {', '.join(splits)}. Set "
            "validation_split, or leave it out to hold out a part of the training split."
        )
    return splits[args.train_split], held_out


def sources_of(args: RecordArguments) -> tuple[str, str]:
    """Where the training records and the held-out ones come from, for messages."""
    if args.train_file:
        return args.train_file, args.validation_file or ""
    return f"{args.dataset_name} (split {args.train_split})", f"{args.dataset_name} (split {args.validation_split})"


def read_records(
    args: RecordArguments, columns: Mapping[str, str], may_be_empty: bool = False
) -> tuple[Dataset, Dataset | None]:
    """Training and held-out records with only the requested columns; the latter are None if none are given.

    Args:
        columns: maps each key that names a column to that column; `translation.en` is the field `en` of objects.
        may_be_empty: allow rows in which a column is empty.

    Raises:
        ValueError: if there is no data, or a column is missing or empty somewhere; the message names the file and the
            remedy.
    """
    if args.train_file:
        if args.dataset_name:
            raise ValueError("Both train_file and dataset_name are given, and only one can be trained on. Drop one.")
        train = _read_file(args.train_file, args)
        held_out = _read_file(args.validation_file, args) if args.validation_file else None
    else:
        train, held_out = _load_splits(args)
    train_source, held_out_source = sources_of(args)
    train = _checked(train, train_source, columns, may_be_empty)
    return train, None if held_out is None else _checked(held_out, held_out_source, columns, may_be_empty)


def _checked(records: Dataset, source: str, columns: Mapping[str, str], may_be_empty: bool) -> Dataset:
    if not len(records):
        raise ValueError(f"{source} is empty. It needs the columns {', '.join(map(repr, columns.values()))}.")
    if any("." in column for column in columns.values()):
        records = records.flatten()
    for key, column in columns.items():
        if column not in records.column_names:
            raise ValueError(
                f"{source} has no column `{column}`; its columns are {', '.join(map(repr, records.column_names))}. Set "
                f"{key} to one of them."
            )
        named = isinstance(records.features[column], ClassLabel)
        missing = [n for n, value in enumerate(records[column], 1) if _is_nothing(value) or (named and value < 0)]
        if missing and not may_be_empty:
            raise ValueError(
                f"{source}: {len(missing)} of {len(records)} rows have nothing in column `{column}`, the first is row "
                f"{missing[0]}. Fill them in or take them out."
            )
    return records.select_columns(list(columns.values()))


def _is_nothing(value: Any) -> bool:
    """Whether there is nothing in a cell; 0 and False are something."""
    return not value.strip() if isinstance(value, str) else value is None or value in ([], {})


def held_out_size(args: RecordArguments, available: int, what: str) -> int:
    """How many of `available` records, or blocks of tokens, `eval_size` holds out.

    Raises:
        ValueError: if that leaves nothing on one side.
    """
    size = round(args.eval_size * available) if args.eval_size < 1 else int(args.eval_size)
    if not 1 <= size < available:
        raise ValueError(
            f"eval_size={args.eval_size:g} would hold out {size} of {available} {what}, which leaves one side empty. "
            "Give more data, another eval_size, or validation_file."
        )
    return size


def load_records(args: RecordArguments, columns: Mapping[str, str]) -> tuple[Dataset, Dataset]:
    """Like `read_records`, but holds out a random part of the training records if there are no others; with `tuning`, a
    part of what would be trained on is held out instead."""
    train, held_out = read_records(args, columns)
    for _ in range((held_out is None) + args.tuning):
        parts = train.train_test_split(held_out_size(args, len(train), "records"), seed=args.split_seed)
        train, held_out = parts["train"], parts["test"]
    return first(train, args.max_train_samples), first(held_out, args.max_eval_samples)


def first(records: Dataset, limit: int | None) -> Dataset:
    """The first `limit` records; all of them if it is None."""
    return records if limit is None else records.select(range(min(limit, len(records))))
