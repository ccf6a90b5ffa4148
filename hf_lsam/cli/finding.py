"""What the doctor says: of a launch, and of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Args:
        mark: "ok"; "note", which is worth knowing; "wrong", with which the launch does not do what was asked.
        text: what was found.
        remedy: what to do about it, or None.
    """

    mark: str
    text: str
    remedy: str | None = None


def worker_count(workers: int) -> str:
    """For example "1 worker", "2 workers"."""
    return "1 worker" if workers == 1 else f"{workers} workers"
