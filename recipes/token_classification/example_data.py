"""Tagged words to try the recipe with: the words of tweets, with handles and hashtags tagged.

python recipes/token_classification/example_data.py [FILE.jsonl] [--count N]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from recipes.common.example_data import main, tweets

SIGNS = {"@": "B-HANDLE", "#": "B-HASHTAG"}


def records() -> Iterator[dict[str, Any]]:
    """Removes the signs that mark handles and hashtags, so that they have to be recognised from the words around."""
    for text, _ in tweets():
        tokens, tags = [], []
        for word in text.split():
            bare = word.lstrip("@#")
            if bare:
                tokens.append(bare)
                tags.append(SIGNS.get(word[0], "O"))
        if any(tag != "O" for tag in tags):
            yield {"tokens": tokens, "tags": tags}


if __name__ == "__main__":
    main("entities.jsonl", records(), __doc__.splitlines()[0])
