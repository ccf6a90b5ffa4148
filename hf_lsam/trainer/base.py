"""The base class of the parts of `LSAMTrainerMixin`: to a type checker, the Trainer that they are mixed into."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import Trainer

    from ..session import Session
    from ..worker import Worker
    from .config import LSAMConfig

    class _Trainer(Trainer):
        """A Trainer, with what the parts share."""

        args: LSAMConfig
        lr_scheduler: Any  # if steps are shared a RunSchedule, which stands in for a scheduler but is not one
        model: nn.Module
        optimizer: Optimizer
        session: Session
        _own: Tensor | None
        _showing_local: bool

        @property
        def worker(self) -> Worker | None: ...
        @property
        def _data_seed(self) -> int: ...
        def anchor(self) -> AbstractContextManager[None]: ...
        def _first_batches(self, count: int, rows: int | None = None) -> Iterator[Any]: ...
        def gather_from_workers(self, key: str, value: Any) -> list[Any] | None: ...

else:
    _Trainer = object


class TrainerPart(_Trainer):
    """A part of `LSAMTrainerMixin`."""

    @property
    def _output_folder(self) -> Path:
        assert self.args.output_dir is not None  # TrainingArguments has put its default there
        return Path(self.args.output_dir)
