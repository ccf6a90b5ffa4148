"""Copies between a worker's device and shared memory, beside the training stream.

On CUDA the shared pages are registered as pinned memory, and copies run on a stream of their own: the training thread
starts one and later asks, without waiting, whether it has ended. On CPU a copy is a copy and has ended when it returns.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Copier:
    """One copy under way at a time.

    Args:
        device: where the worker's vectors live.
        shared: mapped tensors that will take part in copies; registered as pinned memory on CUDA.

    Blocking: on CPU for the length of the copy; on CUDA never.
    """

    def __init__(self, device: torch.device, shared: list[Tensor]):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event: torch.cuda.Event | None = None
        self._pinned: list[Tensor] = []
        if self._stream is not None:
            for tensor in shared:
                status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
                if int(status) != 0:
                    logger.warning(
                        "could not pin %d shared bytes (%s): exchange copies will block", tensor.nbytes, status
                    )
                    with suppress(RuntimeError):  # takes the error away, which the next kernel would raise
                        torch.zeros(1, device=device)
                    break
                self._pinned.append(tensor)

    def start(self, target: Tensor, source: Tensor) -> None:
        """Begins target <- source. Neither may be written before `finished`."""
        if self._stream is None:
            target.copy_(source)
            return
        # Whatever the training stream still does with either tensor comes first.
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._event = self._stream.record_event()

    def finished(self) -> bool:
        """Whether the last copy has ended; does not wait."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Blocks until the last copy has ended."""
        if self._event is not None:
            self._event.synchronize()

    def close(self) -> None:
        """Ends copies under way and unpins the shared memory."""
        self.wait()
        for tensor in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._pinned.clear()
