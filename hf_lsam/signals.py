"""SIGTERM and Ctrl-C: the first is a request to end, the second ends the process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class EndSignals:
    """Turns the first SIGTERM or Ctrl-C into a request to end at the next step; a second one ends the process at once.

    Inside `at_once`, where there is no next step, even the first one does.

    Process: the main thread; in any other it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._at_once = False

    def catch(self) -> None:
        """From here on, signals are requests."""
        self.received = None
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        """Puts back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal ends the process as `obey` does."""
        self._at_once = True
        try:
            self.obey()
            yield
        finally:
            self._at_once = False

    def obey(self) -> None:
        """If a signal was received, ends the process as the signal would have."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.obey()
        self.received = number
        if self._at_once:
            self.obey()
