"""What a service and its role ask of each other; the role is what sets one server of a run apart from the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from ..transport.in_process import Aggregator
from ..transport.mailbox import RunFolder
from .connections import HasFileno
from .core import CountedPushes


class ServiceInterface(ABC):
    """What a role may ask of the service.

    Attributes:
        folder: of the run, on this machine.
        counted: of each process, the last push that was counted.
        join_by: when the workers that have joined are told that others never came; of `time.monotonic`.
        resumed: whether the run goes on from what the folder holds.
        started: whether the workers have been welcomed.
        ended: whether the anchor is final.
        terminating: whether the server is to end, and its workers to save and leave.
        failed: the worker of the launch that ended with an error, or None.
        best_step: that any worker knows of, or -1.
    """

    folder: RunFolder
    counted: CountedPushes
    join_by: float
    resumed: bool
    started: bool
    ended: bool
    terminating: bool
    failed: int | None
    best_step: int

    @property
    @abstractmethod
    def workers_are_here(self) -> bool:
        """Whether the workers that begin together have joined."""

    @property
    @abstractmethod
    def has_workers(self) -> bool:
        """Whether any is connected."""

    @abstractmethod
    def watch(self, source: int | HasFileno, heard: Callable[[], None]) -> None:
        """Calls `heard` whenever `source` is readable."""

    @abstractmethod
    def unwatch(self, source: int | HasFileno) -> None:
        """`source` is heard no longer."""

    @abstractmethod
    def start_if_ready(self) -> None:
        """To be called whenever the role may have become ready: the workers are welcomed once they are here as well."""

    @abstractmethod
    def publish_if_newer(self) -> None:
        """To be called whenever the core may have changed: workers see its anchor, then other machines hear of it."""

    @abstractmethod
    def note_best_step(self, step: int) -> None:
        """The best step that a worker knows of, or -1."""

    @abstractmethod
    def stop_workers(self, save: bool = False) -> None:
        """Asks the workers of this machine to end at their next step, with a checkpoint or without."""

    @abstractmethod
    def stop_all(self) -> None:
        """A worker has asked that all stop."""

    @abstractmethod
    def fail(self, worker: int) -> None:
        """A worker ends with an error. If it is one of the launch, so do the others; an external one's is its own."""

    @abstractmethod
    def pass_failure_on(self, worker: int) -> None:
        """A worker of the launch has failed on another machine, whose server ends the launch."""

    @abstractmethod
    def give_up(self, reason: object) -> None:
        """This machine can take part no longer: its workers, and whoever waits to join, end with an error."""

    @abstractmethod
    def end_if_all_finished(self) -> None:
        """The launch is over when all its workers have finished or died; external ones are asked to stop, and waited
        for."""


class Role(ABC):
    """What sets one server of a run apart from the others: what its aggregator is, and how it stands to other machines.

    The service calls it from its own thread alone; nothing here may wait. What a role may call back is in
    `ServiceInterface`.

    Attributes:
        core: takes the pushes of this machine's workers, and holds the anchor that they are given.
        keeps_state: the state of the run is this server's, to be saved now and then and taken up again.
    """

    core: Aggregator
    keeps_state: bool

    @abstractmethod
    def attach(self, service: ServiceInterface) -> None:
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
