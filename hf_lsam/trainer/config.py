"""`LSAMConfig`, apart from `LSAMArguments` so that a loop of one's own need not import transformers."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments

from ..arguments import LSAMArguments


@dataclass
class LSAMConfig(LSAMArguments, TrainingArguments):
    """Every field of `TrainingArguments`, and LSAM's own (see `LSAMArguments`)."""
