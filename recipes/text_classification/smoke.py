"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.recipe import FEW_STEPS


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    file = folder / "train.csv"
    rows = (f"film {number} was {word},{word}\n" for number in range(12) for word in ("positive", "negative"))
    file.write_text("text,label\n" + "".join(rows))
    return {**FEW_STEPS, "train_file": file, "label_column": "label", "eval_size": 4}
