"""Pairs of texts to try the recipe with: a number in words, and in digits.

python recipes/seq2seq/example_data.py [FILE.jsonl] [--count N]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from recipes.common.example_data import main

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


def records() -> Iterator[dict[str, Any]]:
    for number in random.Random(0).sample(range(100_000), 100_000):
        yield {"source": in_words(number), "target": str(number)}


if __name__ == "__main__":
    main("pairs.jsonl", records(), __doc__.splitlines()[0])
