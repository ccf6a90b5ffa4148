"""What sets one server of a run apart from the others, as the service sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..transport.in_process import Aggregator

if TYPE_CHECKING:
    from .service import Service


class Role(ABC):
    """What sets one server of a run apart from the others: what its aggregator is, and how it stands to other machines.

    The service calls it from its own thread alone; nothing here may wait. A role calls back what the service offers
    under "what a role may ask for".

    Attributes:
        core: takes the pushes of this machine's workers, and holds the anchor that they are given.
        keeps_state: the state of the run is this server's, to be saved now and then and taken up again.
    """

    core: Aggregator
    keeps_state: bool

    @abstractmethod
    def attach(self, service: Service) -> None:
        """Called once, before any worker is let in."""

    @abstractmethod
    def take_up(self, resume: Path | bool) -> dict[str, Tensor] | None:
        """Sets core and folder to where the run goes on, after `attach`.

        Args:
            resume: a server state of another run to begin with, or True for what this folder holds.

        Returns:
            the newest snapshot of this folder, or None if the run does not go on from one.
        """

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether the workers here may be welcomed, once they are here: the other machines are."""

    @property
    @abstractmethod
    def is_needed(self) -> bool:
        """Whether other machines still need this server when its own workers have left."""

    @property
    @abstractmethod
    def others_finished(self) -> bool:
        """Whether the workers of this machine are the last that train."""

    @property
    @abstractmethod
    def bytes_moved(self) -> int:
        """Sent to and received from other machines by this server."""

    @abstractmethod
    def tick(self, now: float) -> None:
        """What is due without a message, at every turn of the loop."""

    @abstractmethod
    def exchange(self) -> None:
        """Pushes came, workers did, or the anchor moved: says to other machines what can be said without waiting."""

    @abstractmethod
    def stop_all(self) -> None:
        """A worker asks that all stop; those of this machine know."""

    @abstractmethod
    def terminate(self) -> None:
        """The server was told to end, or a worker of the launch has failed: those of this machine will be told."""

    @abstractmethod
    def conclude(self) -> bool:
        """All workers here have finished: whether the anchor, once it has been flushed, is final. Asked until it is."""

    @abstractmethod
    def close(self) -> None:
        """The loop has ended."""
