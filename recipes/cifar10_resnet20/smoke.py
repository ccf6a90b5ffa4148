"""A run of the recipe that takes seconds, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes.common.image_data import write_example_images


def smoke(folder: Path) -> dict[str, Any]:
    """Keys to add to those of a YAML file; writes the data that they name into `folder`."""
    data = {"dataset": "folder", "data_dir": write_example_images(folder / "images", 16), "use_cpu": True}
    return {**data, "model_width": 4, "batch_size": 4, "epochs": 2, "log_steps": 2, "eval_points": 2}
