"""How workers share an evaluation through the launch's store: who evaluates which batch, and the results.

Results travel as safetensors and JSON, and only between workers that evaluate the same model on the same data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributed import DistError
from torch.utils import _pytree as pytree

from ..identity import LaunchStore

logger = logging.getLogger(__name__)


class Exchange:
    """One shared evaluation. If the store is gone, a worker evaluates alone.

    A worker takes part inside the `with` block. On leaving it, with an error for example, it announces that there will
    be no results of the batches that it has taken and not finished.

    Args:
        store: the launch's store.
        key: of the evaluation.
        seconds: how long to wait for the next result of the workers that have taken batches; after that, for none.
    """

    def __init__(self, store: LaunchStore, key: str, seconds: float):
        self._store, self._key, self._seconds = store, key, seconds
        self._taken: set[int] = set()
        self._there: set[int] = set()
        self._alone = False

    def taken(self, parts: int, own: int, end: float) -> Iterator[int]:
        """Takes batches: yields the numbers of batches that no other worker has taken.

        Args:
            parts: number of parts into which the batches are dealt in turn; each part is taken in order.
            own: the part to begin with.
            end: the number at which the batches end.
        """
        for part in (*range(own, parts), *range(own)):
            while (times := self._ask(self._store.count, f"{self._key}/taken/{part}")) is not None:
                number = part + parts * (times - 1)
                if number >= end:
                    break
                self._taken.add(number)
                yield number

    def put(self, number: int, result: list[Any]) -> None:
        """Publishes a result. If it cannot be written without pickling, the others evaluate that batch themselves."""
        try:
            data = _packed(result)
        except (TypeError, ValueError, NotImplementedError):
            data = b""
        self._ask(self._store.put, f"{self._key}/{number}", data)
        self._there.add(number)

    def get(self, number: int) -> list[Any] | None:
        """Another worker's result, or None if the batch must be evaluated here."""
        data = self._ask(self._store.take, f"{self._key}/{number}", self._seconds)
        if data is None:
            self._seconds = 0.0  # from now on, takes only what is there already and waits for nothing
        return _unpacked(data) if data else None

    def take_back(self) -> bool:
        """Removes what was published, unless a worker that has begun this evaluation may still need it. Returns whether
        it was removed."""
        begun, ended = (self._ask(self._store.count, f"{self._key}/{what}", 0) for what in ("begun", "ended"))
        if begun != ended:
            return False
        for number in self._there:
            self._ask(self._store.take_back, f"{self._key}/{number}")
        return True

    def __enter__(self) -> Exchange:
        self._ask(self._store.count, f"{self._key}/begun")
        return self

    def __exit__(self, *error: object) -> None:
        for number in self._taken - self._there:
            self._ask(self._store.put, f"{self._key}/{number}", b"")
        self._ask(self._store.count, f"{self._key}/ended")

    def _ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        if self._alone:
            return None
        try:
            return method(*arguments)
        except DistError as error:
            logger.warning("The launcher's store is gone; this worker evaluates without the others: %s", error)
            self._alone = True
            return None


def _packed(result: list[Any]) -> bytes:
    leaves, structure = pytree.tree_flatten(result)
    tensors = {
        str(at): leaf.clone(memory_format=torch.contiguous_format)
        for at, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
    }
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    if not all(leaf is None or type(leaf) in (bool, int, float, str) for leaf in others):
        raise TypeError(f"JSON has no {[type(leaf) for leaf in others]}")
    about = json.dumps([pytree.treespec_dumps(structure), others]).encode()
    return save({**tensors, "about": torch.frombuffer(bytearray(about), dtype=torch.uint8)})


def _unpacked(data: bytes) -> list[Any]:
    tensors = load(data)
    structure, others = json.loads(tensors["about"].numpy().tobytes())
    leaves = [tensors.get(str(at), other) for at, other in enumerate(others)]
    return pytree.tree_unflatten(leaves, pytree.treespec_loads(structure))


def fingerprint(model: nn.Module) -> dict[str, int]:
    """A hash of each parameter and buffer by its name, computed on the model's device."""

    def hashed(tensor: Tensor) -> int:
        if not tensor.numel():
            return 0
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return int(torch.hash_tensor(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).item())

    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: hashed(tensor.detach()) for name, tensor in tensors}


def digest_of(*values: Any) -> str:
    """A digest of nested values, the same in every process. Of a value that is neither plain nor an array or tensor,
    only the type counts."""
    digest = hashlib.sha256()
    for leaf in _leaves(values):
        if isinstance(leaf, Tensor):
            digest.update(save({"": leaf.contiguous()}))
        elif isinstance(leaf, np.ndarray):
            digest.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
        else:
            plain = isinstance(leaf, (str, bytes, bool, int, float, type(None)))
            digest.update(repr(leaf if plain else type(leaf)).encode())
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (Mapping, list, tuple)):
        for part in itertools.chain(*value.items()) if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    else:
        yield value
