"""Gives each worker its share of the training data, by Accelerate's own sharding, in an order that all agree on."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.data_loader import DataLoaderShard
from torch.utils.data import DataLoader

from ..data import agree_on_order, from_the_start, share_unevenly
from ..identity import data_sharding
from .base import TrainerPart

logger = logging.getLogger(__name__)


def _shared(make: Callable[..., DataLoader[Any]]) -> Callable[..., DataLoader[Any]]:
    """A `get_train_dataloader` that gives this worker its share of what `make` would load."""

    @functools.wraps(make)
    def get_train_dataloader(trainer: TrainingData) -> DataLoader[Any]:
        identity, seed = trainer.args.identity, trainer._data_seed
        if identity.num_workers == 1 or trainer._is_sharding:
            return make(trainer)
        if trainer.args.data_distribution == "sharded":
            return trainer._train_dataloader(identity.num_workers, seed)
        # Seeds far apart, because epoch e of the seedable sampler uses its seed + e.
        return trainer._train_dataloader(1, seed + 1_000_003 * identity.rank)

    get_train_dataloader.is_shared = True  # type: ignore[attr-defined]
    return get_train_dataloader


class TrainingData(TrainerPart):
    """The part of `LSAMTrainerMixin` that loads training data.

    A subclass may override `get_train_dataloader` as in any Trainer: what it prepares with `self.accelerator` is shared
    among the workers, as it would be under DDP.
    """

    _batch_sizes: list[int]  # of each worker, during and after training
    _whole: dict[int, DataLoader[Any]]  # during and after training, loaders of all of the data, by rows per batch
    _is_sharding = False  # whether this worker's shard is being made, by Accelerate

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        found = cls.get_train_dataloader  # its own, or that of a class that it names before the mixin
        if not getattr(found, "is_shared", False):
            cls.get_train_dataloader = _shared(found)  # type: ignore[method-assign]

    @_shared
    def get_train_dataloader(self) -> DataLoader[Any]:
        return super().get_train_dataloader()

    @property
    def _data_seed(self) -> int:
        """The seed of the data's order: the same in every worker, whatever the state of its generators."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _train_dataloader(self, num_shards: int, seed: int) -> DataLoader[Any]:
        config = self.accelerator.dataloader_config
        before, config.data_seed = config.data_seed, seed
        self._is_sharding = True
        try:
            with data_sharding(num_shards):
                loader = self.get_train_dataloader()
        finally:
            config.data_seed, self._is_sharding = before, False
        if num_shards > 1 and not isinstance(loader, DataLoaderShard):
            logger.warning(
                "%s.get_train_dataloader returns a %s that Accelerate has not prepared: each of %d workers would go "
                "through all of the data. Return self.accelerator.prepare(loader) to share it, or set "
                "data_distribution='independent' if that is meant.",
                type(self).__name__,
                type(loader).__name__,
                num_shards,
            )
        if num_shards > 1 and len(set(self._batch_sizes)) > 1:
            share_unevenly(loader, self._batch_sizes)
        return agree_on_order(loader, seed)

    def _first_batches(self, count: int, rows: int | None = None) -> Iterator[Any]:
        """The first training batches of the run, the same in every worker.

        Args:
            rows: rows per batch; None for this worker's own batch size.
        """
        rows = rows or self._train_batch_size
        if rows not in self._whole:  # once a run, because Accelerate keeps every loader that it prepares
            before = self._train_batch_size, self.args.dataloader_persistent_workers
            self._train_batch_size = rows
            self.args.dataloader_persistent_workers = False  # they would live as long as the loader
            try:
                self._whole[rows] = self._train_dataloader(1, self._data_seed)
            finally:
                self._train_batch_size, self.args.dataloader_persistent_workers = before
        loader = self._whole[rows]
        if hasattr(loader, "set_epoch"):  # Accelerate's, which tells a stream how often it has gone through it
            loader.set_epoch(0)
        return itertools.islice(from_the_start(loader), count)
