"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.example_data import write_lines
from recipes.common.recipe import FEW_STEPS
from recipes.seq2seq.example_data import records


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    model = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    file = write_lines(folder / "pairs.jsonl", records(), 36)
    short = {"train_file": file, "eval_size": 4, "generation_max_length": 16, "model_config": model}
    return {**FEW_STEPS, **short}
