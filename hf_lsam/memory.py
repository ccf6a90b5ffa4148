"""What LSAM keeps in memory, beside the model, its gradients and its optimizer: bytes for each trained parameter.

All vectors are float32. On top come 4 bytes while a step is perturbed, for what SAM puts back, and 4 while the anchor
is evaluated or saved, for the worker's own parameters.
"""

from __future__ import annotations

from .algorithms import ALGORITHMS, ServerSettings, WorkerSettings

VECTOR = 4  # bytes of a value


def server_bytes(settings: ServerSettings) -> int:
    """Of a server's own: the anchor, what is pending, and what the anchor's step keeps."""
    return VECTOR * (1 + ALGORITHMS[settings.algorithm].server_half.vectors(settings))


def worker_bytes(settings: WorkerSettings, alone: ServerSettings | None = None, accelerator: bool = False) -> int:
    """Of a worker, on its device.

    Args:
        settings: of the worker.
        alone: of its server, if that is an object in the worker's process: the worker has no anchor of its own then.
        accelerator: whether vectors cross to the host beside training: the next anchor has a place of its own then, and
            so has the last push where the next is gathered step by step, unless the worker is alone.
    """
    half = ALGORITHMS[settings.algorithm].worker_half(settings.coupling)
    vectors = 1 + half.vectors + 2 * settings.keeps_anchor_move  # the first is what is to be pushed
    if alone is not None:
        return VECTOR * vectors + server_bytes(alone)
    return VECTOR * (vectors + 1 + accelerator * (1 + half.accumulates))


def shared_bytes(workers: int) -> int:
    """Of the exchange on one machine, in shared memory: a mailbox a worker, and two copies of the anchor."""
    return VECTOR * (workers + 2)
