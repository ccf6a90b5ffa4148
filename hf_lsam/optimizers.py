"""Optimizers that train at one point and are evaluated at another, such as schedule-free ones, beside an anchor.

Their `eval` takes the parameters to the point of evaluation, and `train` takes them back. Both are about the worker's
own x, never about the anchor; what is pulled and pushed is x as it trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer

from .worker import Worker


def switch(optimizer: torch.optim.Optimizer | AcceleratedOptimizer | None, mode: Literal["train", "eval"]) -> None:
    """Takes the parameters to where `optimizer` trains or is evaluated, if it knows the difference."""
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


@contextmanager
def showing_anchor(worker: Worker, optimizer: torch.optim.Optimizer | AcceleratedOptimizer) -> Iterator[None]:
    """The model holds y inside and x again after, as it trains; may be nested.

    Inside, the optimizer is in its mode for evaluation already: what switches it there moves nothing.
    """
    if worker.shows_anchor:
        yield
        return
    switch(optimizer, "eval")
    try:
        with worker.showing_anchor():
            try:
                yield
            finally:
                switch(optimizer, "eval")  # who has switched it to training inside has moved y, and x has yet to follow
    finally:
        switch(optimizer, "train")
