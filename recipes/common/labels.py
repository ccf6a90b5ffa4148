"""The order of labels."""

from __future__ import annotations


def natural_order(label: str) -> tuple[bool, int, str]:
    """A key that sorts "2" before "10", and numbers before words. No two labels have the same, so that all processes
    number them alike."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)
