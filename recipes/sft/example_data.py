"""Chats to try the recipe with: a tweet, and what an assistant says about its mood.

python recipes/sft/example_data.py [FILE.jsonl] [--count N]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes.common.example_data import main, tweets

SAID = {"negative": "They are not happy.", "positive": "They are happy.", "neutral": "They do not say."}


def records() -> Iterator[dict[str, Any]]:
    for text, mood in tweets():
        asked = {"role": "user", "content": f"How do they feel? {text}"}
        yield {"messages": [asked, {"role": "assistant", "content": SAID[mood]}]}


if __name__ == "__main__":
    main("chats.jsonl", records(), __doc__.splitlines()[0])
