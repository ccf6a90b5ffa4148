"""The progress of long work and the time left: a bar in a terminal, plain lines anywhere else."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
LINE_SECONDS = 5.0  # between two plain lines


class Progress:
    """Shows progress on stderr, so that a script's own output stays clean.

    Args:
        total: how much there is to do.
        what: what is counted, such as "runs".
        quiet: print plain lines even in a terminal.
    """

    def __init__(self, total: float, what: str, quiet: bool = False):
        self._total, self._what = total, what
        self._done, self._begun, self._said = 0.0, time.monotonic(), time.monotonic()
        self._bar = tqdm(
            total=total,
            desc=what,
            file=sys.stderr,
            disable=quiet or not sys.stderr.isatty(),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.6g} of {total:.6g}, {elapsed}, about {remaining} to go",
        )

    def advance(self, by: float = 1) -> None:
        """Advances the progress by `by`."""
        self._done += by
        self._bar.update(by)
        now = time.monotonic()
        if self._bar.disable and (now - self._said >= LINE_SECONDS or self._done >= self._total):
            self._said = now
            left = (now - self._begun) * (self._total - self._done) / self._done
            to_go = f", about {tqdm.format_interval(left)} to go" if left > 0 else ""
            print(f"{self._what}: {self._done:.6g} of {self._total:.6g}{to_go}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Closes the bar, which stays on the screen."""
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def track(items: Sequence[Item], what: str, quiet: bool = False) -> Iterator[Item]:
    """Yields the items one by one, showing progress."""
    with Progress(len(items), what, quiet) as progress:
        for item in items:
            yield item
            progress.advance()


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Adds the option --quiet."""
    parser.add_argument("--quiet", action="store_true", help="plain lines instead of a progress bar")
