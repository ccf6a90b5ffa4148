"""What trl's trainers count inside the loss, where LSAM computes the loss more often than they think."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import Trainer

_COUNTERS = ("_metrics", "_total_train_tokens")


@contextmanager
def uncounted(trainer: Trainer, active: bool = True) -> Iterator[None]:
    """trl counts tokens and averages metrics inside the loss; one pass of the two is to count, the other not."""
    kept = {}
    if active:
        kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _COUNTERS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)
