"""The order of the data: the same in every worker, whatever its generators have drawn before.

Accelerate shards an epoch by letting every worker iterate over all of it and take its part, which is only correct if
all of them see the same order. torch's samplers do if they have a generator; one that draws from the process's own
generators does not.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import send_to_device
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

_States = tuple[Any, Any, torch.Tensor]  # of Python's, NumPy's and torch's generators, in their own formats


class Generators:
    """The states of Python's, NumPy's and torch's (CPU) generators, identical wherever the seed is the same.

    Args:
        seed: >= 0.
    """

    def __init__(self, seed: int):
        self._states = (
            random.Random(seed).getstate(),
            np.random.RandomState(seed % 2**32).get_state(),
            torch.Generator().manual_seed(seed).get_state(),
        )

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the process draws from these generators; afterwards from its own again, which have not advanced."""
        own = self._exchange(self._states)
        try:
            yield
        finally:
            self._states = self._exchange(own)

    @staticmethod
    def _exchange(states: _States) -> _States:
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        return before


class AgreedBatches:
    """The batches of a batch sampler, drawn from generators that are reseeded each epoch, identically in every worker.

    Args:
        batches: the batch sampler.
        seed: the same in every worker.
    """

    def __init__(self, batches: Iterable[list[int]], seed: int):
        self.batch_sampler = batches
        self._seed = seed
        self._epoch = 0
        self.batch_size = getattr(batches, "batch_size", None)

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]  # one without a length raises TypeError, as it should

    def __iter__(self) -> Iterator[list[int]]:
        generators = Generators(self._seed + self._epoch)
        batches = iter(self.batch_sampler)
        while True:
            with generators.in_place():
                batch = next(batches, None)
            if batch is None:
                break
            yield batch
        self.set_epoch(self._epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Sets which epoch is next: called by Trainer, and after each complete epoch."""
        self._epoch = epoch
        for part in (self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            if part is not None and hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


class BatchesInTurn:
    """Batches whose sizes are those of the workers in turn: of each n batches, Accelerate gives every worker its own.

    Args:
        sampler: yields the indices of rows.
        sizes: each worker's batch size, in rows.
        drop_last: drop the last rows if they do not fill a batch for each worker; otherwise the first rows of the epoch
            fill them up.
    """

    batch_size = None  # no single size holds for all

    def __init__(self, sampler: Iterable[int], sizes: Sequence[int], drop_last: bool):
        self.sampler, self.drop_last = sampler, drop_last
        self._sizes = sizes

    def __len__(self) -> int:
        rows, in_all = len(self.sampler), sum(self._sizes)  # type: ignore[arg-type]  # as above
        return len(self._sizes) * (rows // in_all if self.drop_last else -(-rows // in_all))

    def __iter__(self) -> Iterator[list[int]]:
        rows, first = iter(self.sampler), None
        while taken := list(itertools.islice(rows, sum(self._sizes))):
            first = first or taken
            missing = sum(self._sizes) - len(taken)
            if missing and self.drop_last:
                return
            taken = [*taken, *itertools.islice(itertools.cycle(first), missing)]
            for size in self._sizes:
                yield taken[:size]
                taken = taken[size:]


def share_unevenly(loader: DataLoader[Any], sizes: Sequence[int]) -> None:
    """Changes a loader that Accelerate has prepared so that the workers' batches may differ in size.

    Args:
        sizes: each worker's batch size.

    Raises:
        ValueError: if the loader does not batch rows by their index.
    """
    shard = loader.batch_sampler
    if not (isinstance(shard, BatchSamplerShard) and isinstance(shard.batch_sampler, BatchSampler)):
        raise ValueError(
            f"The workers' batches have {list(sizes)} rows. Workers share a stream, or the batches of a custom "
            "batch sampler, only if all use the same batch size; otherwise rows would be seen twice or never. "
            "Use the same batch size in every worker, a data set with a length, or "
            "data_distribution='independent'."
        )
    shard.batch_sampler = BatchesInTurn(shard.batch_sampler.sampler, sizes, shard.batch_sampler.drop_last)
    shard.batch_size, shard.even_batches = None, False  # every round of n batches is complete already


def agree_on_order(loader: DataLoader[Any], seed: int) -> DataLoader[Any]:
    """Makes all workers' shards of a loader that Accelerate has prepared follow one order; returns the loader.

    Args:
        seed: the same in every worker.
    """
    for shard in (loader.sampler, loader.batch_sampler):
        if isinstance(shard, BatchSamplerShard):
            # Accelerate sets the epoch on `sampler`, even where it skips batches.
            shard.batch_sampler = shard.sampler = AgreedBatches(shard.batch_sampler, seed)
    return loader


def from_the_start(loader: DataLoader[Any]) -> Iterable[Any]:
    """The batches of the whole data set of `loader`, from its first epoch on, even if `loader` is one worker's shard;
    the position of `loader` does not change.

    Its samplers draw from the process's generators, so inside `Generators.in_place` they draw the same in every worker.
    A stream is returned as it is.
    """
    batches: Any = loader.batch_sampler  # torch's, Accelerate's or the user's own
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return loader
    while isinstance(batches, (BatchSamplerShard, AgreedBatches)):
        batches = batches.batch_sampler
    batches = copy.copy(batches)
    if hasattr(batches, "sampler"):
        batches.sampler = copy.copy(batches.sampler)
    for part in (batches, getattr(batches, "sampler", None)):
        if part is not None and hasattr(part, "generator"):
            part.generator = None
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(0)
    return in_batches(loader, batches)


def in_batches(loader: DataLoader[Any], batches: Iterable[list[int]]) -> Iterable[Any]:
    """The rows of a map-style data set, loaded, collated and placed as `loader` would, but in other batches.

    Args:
        batches: the row indices of each batch.
    """
    rows = batched_anew(loader, batches)
    device = getattr(loader, "device", None)  # set if Accelerate has prepared the loader
    return rows if device is None else (send_to_device(batch, device) for batch in rows)


def batched_anew(loader: DataLoader[Any], batches: Iterable[list[int]]) -> DataLoader[Any]:
    """Like `in_batches`, but the batches stay on the host."""
    same = ("num_workers", "collate_fn", "pin_memory", "worker_init_fn", "multiprocessing_context", "prefetch_factor")
    return DataLoader(loader.dataset, batch_sampler=batches, **{name: getattr(loader, name) for name in same})
