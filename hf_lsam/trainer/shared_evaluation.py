"""Evaluation after training: the workers of a launch share it, and each gets the results of a single process.

Each worker takes batches of the data loader that a single process would go through, in its order, runs
`prediction_step` on them and puts the results into the launch's store. Once no batch is left, it gets the other results
from there. Then Trainer's own evaluation loop goes over all of them, in order: whatever is concatenated, computed and
called back is Trainer's work.

    in the store                          worker 0                  worker 1
    how many batches of part 0 are taken  0, 2, 4, ...              after its own: those that worker 0 has not reached
    how many batches of part 1 are taken  after its own: likewise   1, 3, 5, ...
    the result of each batch              puts its own, gets others'

A worker waits only for those that have taken a batch: one that evaluates alone takes them all, and a latecomer gets
what is there. A worker that fails announces it for the batches that it has taken, and one that is silent for
`worker_timeout` is no longer waited for: each of the others evaluates what is missing by itself. Workers share an
evaluation only if they have the same digest of model, data and settings.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from accelerate.data_loader import DataLoaderStateMixin
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput

from ..data import in_batches
from .base import TrainerPart
from .evaluation_exchange import Exchange, digest_of, fingerprint
from .trl import EvalCounts, add_eval_counts, eval_counts

logger = logging.getLogger(__name__)

_Settings = tuple[str, bool | None, list[str] | None, str]  # arguments of `evaluation_loop` after the data loader

_PROBES = 8  # rows that distinguish a data set from another one of the same length
_times_evaluated: Counter[str] = Counter()  # by the digest


class SharedEvaluation(TrainerPart):
    """The part of `LSAMTrainerMixin` that shares evaluations."""

    _exchanges: Sequence[Exchange] = ()  # those of which the launch's store still holds results

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        loop, settings = super().evaluation_loop, (description, prediction_loss_only, ignore_keys, metric_key_prefix)
        shared = self.args.identity.meets_others and self.session.finished and not self._showing_local
        if not shared or self.args.batch_eval_metrics:  # which is for predictions that are too large to keep
            return loop(dataloader, *settings)
        with closing(self._recorded(dataloader, settings)) as recorded:
            passes_for_one: Any = Recorded(dataloader, recorded)
            return loop(passes_for_one, *settings)

    def _recorded(self, loader: DataLoader[Any], settings: _Settings) -> Generator[RecordedBatch, None, None]:
        """Begins when Trainer's loop does, with the model already in evaluation mode; yields that loop's batches."""
        evaluated, batches = self._evaluating(*settings[1:3]), Batches(loader)
        asked = *settings, vars(self).get("_gen_kwargs"), self.args.include_for_metrics
        digest = digest_of(asked, batches.probe(), fingerprint(self.model))
        _times_evaluated[digest] += 1
        results = self._results(batches, evaluated, f"evaluation/{digest}/{_times_evaluated[digest]}")
        with self._steps_recorded():
            for number in range(batches.count):
                with batches.at(number):
                    yield RecordedBatch(*results.pop(number))

    def _evaluating(self, loss_only: bool | None, ignore_keys: list[str] | None) -> Callable[[Any], list[Any]]:
        """A function that does what Trainer's loop does with a batch before gathering; its results are on the CPU."""
        step, args = self.prediction_step, self.args
        preprocess: Callable[[Any, Any], Any] | None = self.preprocess_logits_for_metrics  # there may be no labels
        loss_only = args.prediction_loss_only if loss_only is None else loss_only
        shown = [getattr(self.model, "main_input_name", "input_ids")] if "inputs" in args.include_for_metrics else []

        def evaluated(inputs: Any) -> list[Any]:
            rows = find_batch_size(inputs)
            with eval_counts(self) as counts:
                loss, logits, labels = step(self.model, inputs, loss_only, ignore_keys=ignore_keys)
            if logits is not None and preprocess is not None:
                logits = preprocess(logits, labels)
            result = [rows, {name: inputs[name] for name in shown}, loss, logits, labels, counts]
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), result)

        return evaluated

    def _results(self, batches: Batches, evaluated: Callable[[Any], list[Any]], key: str) -> dict[int, list[Any]]:
        """The results of all batches by their numbers, evaluated here or by other workers."""
        args, results = self.args, dict[int, list[Any]]()
        silent = args.disable_tqdm or args.identity.rank != 0
        bar = tqdm(desc="This worker's part", unit="batch", disable=silent, leave=False, delay=2)  # seconds
        with bar, Exchange(self.session.run.store, key, args.worker_timeout) as exchange:
            parts = 1 if batches.is_stream else args.identity.num_workers
            for number, inputs in batches.numbered(exchange.taken(parts, args.identity.rank % parts, batches.end)):
                results[number] = evaluated(inputs)
                exchange.put(number, results[number])
                bar.update()
            logger.info("%d of %d batches were evaluated in this worker", len(results), batches.count)
            others = {number: exchange.get(number) for number in range(batches.count) if number not in results}
        results |= {number: result for number, result in others.items() if result is not None}
        missing = [number for number in range(batches.count) if number not in results]
        for number, inputs in batches.numbered(iter(missing)) if missing else ():
            results[number] = evaluated(inputs)
        if len(results) < batches.count:
            raise RuntimeError(
                f"{len(missing)} batches of this evaluation were lost with the worker that was evaluating them, "
                "and the data set cannot be iterated a second time, so there are no metrics. Evaluate again with "
                "a data set that can be iterated more than once."
            )
        self._exchanges = [each for each in self._exchanges if not each.take_back()] + [exchange]
        return results

    @contextmanager
    def _steps_recorded(self) -> Iterator[None]:
        """Makes the steps of Trainer's loop return what was recorded, inside the `with` block."""

        def recorded(
            model: nn.Module, inputs: RecordedBatch, prediction_loss_only: bool, ignore_keys: Any = None
        ) -> tuple[Any, Any, Any]:
            add_eval_counts(self, inputs.counts)
            return inputs.loss, inputs.logits, inputs.labels

        steps = {"prediction_step": recorded, "preprocess_logits_for_metrics": None}
        before = {name: vars(self)[name] for name in steps if name in vars(self)}
        vars(self).update(steps)  # on the instance, where they take precedence over those of any class
        try:
            yield
        finally:
            for name in steps:
                del vars(self)[name]
            vars(self).update(before)


class RecordedBatch(dict[str, Any]):
    """Stands in for the inputs of an evaluated batch: has as many rows, and the inputs that metrics are shown."""

    def __init__(
        self, rows: int | None, shown: dict[str, Any], loss: Any, logits: Any, labels: Any, counts: EvalCounts
    ):
        super().__init__({} if rows is None else {"rows": torch.empty(rows, 0)}, **shown)
        self.loss, self.logits, self.labels, self.counts = loss, logits, labels, counts


class Recorded:
    """A data loader in all respects but its batches, which are the recorded ones."""

    def __init__(self, loader: DataLoader[Any], batches: Iterator[RecordedBatch]):
        self._loader, self._batches = loader, batches

    def __iter__(self) -> Iterator[RecordedBatch]:
        return self._batches

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Batches:
    """The batches of a data loader, numbered in order.

    Attributes:
        is_stream: whether batches cannot be loaded by number, but only in order, and perhaps only once.
        count: how many there are; for a stream, how many have come so far.
        end: the number at which they end; infinite for a stream.
    """

    def __init__(self, loader: DataLoader[Any]):
        self._loader = loader
        stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
        sampler: Any = getattr(loader, "batch_sampler", None)
        self.is_stream = stream or sampler is None
        self._indices: list[list[int]] = [] if self.is_stream else list(sampler)
        self.count, self.end = len(self._indices), math.inf if self.is_stream else len(self._indices)
        self._coming: Iterable[Any] = iter(loader) if self.is_stream else iter(())
        self._first = list(itertools.islice(self._coming, 1))

    def probe(self) -> list[Any]:
        """What distinguishes these batches from others."""
        if self.is_stream:
            return self._first
        some = self._indices[:: -(-self.count // _PROBES) or 1]
        return [repr(self._indices), [self._loader.dataset[indices[0]] for indices in some]]

    def numbered(self, numbers: Iterator[int]) -> Iterator[tuple[int, Any]]:
        """Yields each batch of `numbers` with its number, and asks for the next number as late as possible.

        For a stream, the numbers must ascend. Of a map-style data set, no other batches are loaded.
        """
        if not self.is_stream:
            loading: deque[int] = deque()

            def indices() -> Iterator[list[Any]]:
                for number in numbers:
                    loading.append(number)
                    yield self._indices[number]

            for inputs in in_batches(self._loader, indices()):
                number = loading.popleft()
                with self.at(number):
                    yield number, inputs
            return
        coming, self._first, self._coming = itertools.chain(self._first, self._coming), [], self._loader
        wanted = next(numbers, None)
        for number, inputs in enumerate(coming):
            self.count = max(self.count, number + 1)
            if number == wanted:
                yield number, inputs
                wanted = next(numbers, None)

    @contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Tells Accelerate, inside the `with` block, which batch this is: it drops the padding rows of the last one."""
        prepared = self._loader if isinstance(self._loader, DataLoaderStateMixin) else None
        if prepared is not None:
            prepared.begin()
            prepared.end_of_dataloader = number == self.count - 1
        try:
            yield
        finally:
            if prepared is not None:
                prepared.end()
