"""Copies between a worker's device and shared memory, alongside the training stream.

On CUDA the shared pages are registered as pinned memory, and copies run on a stream of their own: the training thread
starts a copy and later asks, without waiting, whether it has ended. On CPU a copy has ended when the call returns.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import torch
from torch import Tensor

from ..coupling import blocks

logger = logging.getLogger(__name__)


class Copier:
    """Runs one copy at a time.

    Attributes:
        pinned: the shared tensors that are pinned.

    Args:
        device: where the worker's vectors live.
        shared: mapped tensors that will take part in copies; registered as pinned memory on CUDA.
        was_finite: what `is_finite` returns before the first checked copy.

    Blocking: `start`, on CPU for the length of the copy, on CUDA never; `wait` and `close`, until the copy has ended.
    """

    def __init__(self, device: torch.device, shared: list[Tensor], was_finite: bool = True):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None
        self._squared_norm = torch.tensor(0.0 if was_finite else torch.inf, pin_memory=self._stream is not None)
        self.pinned: list[Tensor] = []
        if self._stream is not None:
            for tensor in shared:
                status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
                if int(status) != 0:
                    logger.warning(
                        "could not pin %d shared bytes (%s): exchange copies will block", tensor.nbytes, status
                    )
                    with suppress(RuntimeError):  # clears the error, which the next kernel would raise otherwise
                        torch.zeros(1, device=device)
                    break
                self.pinned.append(tensor)

    def start(self, target: Tensor, source: Tensor, check: bool = False) -> None:
        """Begins target <- source, both float32 [d]. Neither may be written before `finished`.

        Args:
            check: whether `is_finite` is to report on this copy.
        """
        if self._stream is None:
            if check:
                self._copy_and_check(target, source)
            else:
                target.copy_(source)
            return
        # Work of the training stream on either tensor comes first.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            if check:
                self._squared_norm.copy_(torch.linalg.vector_norm(source).square(), non_blocking=True)
            self._event = self._stream.record_event()

    def _copy_and_check(self, target: Tensor, source: Tensor) -> None:
        """Copies in blocks that fit into the cache; a separate pass for the check would cost half as much again."""
        self._squared_norm.zero_()
        for written, read in blocks([target], [source]):
            for into, part in zip(written, read, strict=True):
                self._squared_norm += torch.dot(part, part).to("cpu")
                into.copy_(part)

    @property
    def is_finite(self) -> bool:
        """Whether the source of the last checked copy was finite, in the sense of `coupling.is_finite`. Valid once the
        copy has `finished`."""
        return bool(self._squared_norm.isfinite())

    def finished(self) -> bool:
        """Whether the last copy has ended; does not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Blocks until the last copy has ended."""
        if self._event is not None:
            self._event.synchronize()

    def close(self) -> None:
        """Waits for a copy that is under way, and unpins the shared memory."""
        self.wait()
        for tensor in self.pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self.pinned.clear()
