"""What the doctor reports about a launch or a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One finding of the doctor.

    Args:
        mark: "ok"; "note", worth knowing; or "wrong", because of which the launch would not do what was asked.
        text: what was found.
        remedy: what to do about it, or None.
    """

    mark: str
    text: str
    remedy: str | None = None


def worker_count(workers: int) -> str:
    """For example "1 worker", "2 workers"."""
    return "1 worker" if workers == 1 else f"{workers} workers"
