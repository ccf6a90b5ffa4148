"""Finds the recipes. A recipe is a folder in recipes/ with

    README.md
    train.py     its docstring: the first line describes it in lists of recipes, the next paragraph is its launch
                 KEYS             the dataclasses whose fields are its keys
                 run(values)      trains with these values of the keys; returns results at worker 0, None at the others
                 PIPELINE_TAG     the Hub's name of the task, or None
    smoke.py     smoke(folder)    keys of a run that takes seconds, on data that it writes into the folder
    lsam.yaml    its settings for this method; ddp_sam.yaml, ddp.yaml and others likewise

Lists, tables, model cards, comparisons and tests find everything here, so a new recipe is just a new folder.
"""

from __future__ import annotations

import ast
from importlib import import_module
from types import ModuleType

from recipes.common.results import REPOSITORY

RECIPES = REPOSITORY / "recipes"
# For the smoke.py of a recipe that trains through Trainer.
FEW_STEPS = {
    "max_steps": 4,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}


def names() -> list[str]:
    """The recipes, in alphabetical order."""
    return sorted(path.parent.name for path in RECIPES.glob("*/train.py"))


def load(name: str, part: str = "train") -> ModuleType:
    """The train.py of a recipe as a module, or its smoke.py."""
    return import_module(f"recipes.{name}.{part}")


def described(name: str) -> tuple[str, str]:
    """How a recipe describes itself, without importing it: what it trains, and the command that launches it.

    Raises:
        ValueError: if the docstring of its train.py has no such command.
    """
    path = RECIPES / name / "train.py"
    summary, *rest = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    launch = " ".join(line.strip().rstrip("\\").strip() for line in rest if line.startswith("    "))
    launch, _, _ = launch.partition(" [--key")
    if not launch.startswith("accelerate launch"):
        raise ValueError(f"The docstring of {path} shows no launch. Its second paragraph is the command, indented.")
    return summary.rstrip("."), launch
