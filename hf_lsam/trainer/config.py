"""`LSAMConfig`, separate from `LSAMArguments` so that a custom training loop need not import transformers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..arguments import LSAMArguments


@dataclass
class LSAMConfig(LSAMArguments, TrainingArguments):
    """All fields of `TrainingArguments`, and LSAM's own (see `LSAMArguments`)."""
