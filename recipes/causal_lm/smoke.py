"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.recipe import FEW_STEPS


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    model = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    file = folder / "text.txt"
    file.write_text("the cat sat on the mat and looked at the moon.\n" * 40)
    return {**FEW_STEPS, "train_file": file, "block_size": 32, "model_config": model}
