"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.example_data import write_lines
from recipes.common.recipe import FEW_STEPS
from recipes.sft.example_data import records


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    model = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    file = write_lines(folder / "chats.jsonl", records(), 40)
    return {**FEW_STEPS, "train_file": file, "max_length": 256, "model_config": model}
