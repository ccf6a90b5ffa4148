"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.image_data import write_example_images
from recipes.common.recipe import FEW_STEPS


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    model = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    data = {"data_dir": write_example_images(folder / "images", 8), "image_size": 8}
    return {**FEW_STEPS, **data, "model_config": model}
