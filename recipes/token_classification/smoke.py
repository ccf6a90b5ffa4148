"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.example_data import write_lines
from recipes.common.recipe import FEW_STEPS
from recipes.token_classification.example_data import records


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    file = write_lines(folder / "entities.jsonl", records(), 40)
    return {**FEW_STEPS, "train_file": file}
