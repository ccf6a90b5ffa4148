"""What LSAM keeps in memory in addition to the model, its gradients and its optimizer, in bytes per trained parameter.

All vectors are float32. A further 4 bytes are needed while a step is perturbed, for x + eps (on CPU they are kept from
step to step), and 4 while the anchor is evaluated or saved, for the worker's own parameters.
"""

from __future__ import annotations

from .algorithms import ALGORITHMS, ServerSettings, WorkerSettings

VECTOR = 4  # bytes per value


def server_bytes(settings: ServerSettings) -> int:
    """Bytes that a server keeps for itself: the anchor, what is pending, and what the anchor's optimizer keeps."""
    return VECTOR * (1 + ALGORITHMS[settings.algorithm].server_half.vectors(settings))


def worker_bytes(settings: WorkerSettings, alone: ServerSettings | None = None, accelerator: bool = False) -> int:
    """Bytes that a worker keeps on its device.

    Args:
        settings: settings of the worker.
        alone: settings of its server, if that is an object in the worker's process; the worker then has no anchor of
            its own.
        accelerator: whether vectors are copied to and from the host while training continues. Unless the worker is
            alone, the next anchor then has a buffer of its own, and so does the last push if the next one accumulates
            step by step.
    """
    half = ALGORITHMS[settings.algorithm].worker_half(settings.coupling)
    vectors = 1 + half.vectors + 2 * settings.keeps_anchor_move  # 1: what is to be pushed
    if alone is not None:
        return VECTOR * vectors + server_bytes(alone)
    return VECTOR * (vectors + 1 + accelerator * (1 + half.accumulates))


def shared_bytes(workers: int) -> int:
    """Bytes of the exchange on one machine, in shared memory: one mailbox per worker, and two copies of the anchor."""
    return VECTOR * (workers + 2)
