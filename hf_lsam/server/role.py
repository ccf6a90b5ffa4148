"""The interface between a service and its role, which is what distinguishes one server of a run from the others."""

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
        folder: the run folder of this machine.
        counted: the last counted push of each process.
        join_by: `time.monotonic` at which the workers that have joined are told that others never came.
        resumed: whether the run continues from what the folder holds.
        started: whether the workers have been welcomed.
        ended: whether the anchor is final.
        terminating: whether the server is to end, and its workers are to save and leave.
        waits_for_nobody: whether it was told so twice.
        failed: the worker of the launch that ended with an error, or None.
        best_step: the best step that any worker knows of, or -1.
    """

    folder: RunFolder
    counted: CountedPushes
    join_by: float
    resumed: bool
    started: bool
    ended: bool
    terminating: bool
    waits_for_nobody: bool
    failed: int | None
    best_step: int

    @property
    @abstractmethod
    def workers_are_here(self) -> bool:
        """Whether the workers that begin together have joined; True in a resumed run, which waits for none."""

    @property
    @abstractmethod
    def has_workers(self) -> bool:
        """Whether any worker is connected."""

    @abstractmethod
    def watch(self, source: int | HasFileno, heard: Callable[[], None]) -> None:
        """Calls `heard` whenever `source` is readable."""

    @abstractmethod
    def unwatch(self, source: int | HasFileno) -> None:
        """Stops watching `source`."""

    @abstractmethod
    def start_if_ready(self) -> None:
        """Must be called when the role may have become ready: welcomes the workers once they have joined as well."""

    @abstractmethod
    def publish_if_newer(self) -> None:
        """Must be called whenever the core may have changed: publishes its anchor to the workers, then updates other
        machines."""

    @abstractmethod
    def note_best_step(self, step: int) -> None:
        """Records the best step that a worker knows of, or -1."""

    @abstractmethod
    def stop_workers(self, save: bool = False) -> None:
        """Asks the workers of this machine to end at their next step, with or without a checkpoint."""

    @abstractmethod
    def stop_all(self) -> None:
        """Stops all workers of the run, because one of them has asked for it."""

    @abstractmethod
    def fail(self, worker: int) -> None:
        """A worker ends with an error. If it belongs to the launch, the others end with one too; an external worker
        ends alone."""

    @abstractmethod
    def pass_failure_on(self, worker: int) -> None:
        """Tells the workers of this machine that a worker of the launch has failed on another one. The root ends the
        launch."""

    @abstractmethod
    def give_up(self, reason: object) -> None:
        """This machine can no longer take part: its workers, and those that wait to join, end with an error."""

    @abstractmethod
    def end_if_all_finished(self) -> None:
        """Ends the launch if all its workers have finished or died. External workers are asked to stop first, and
        waited for."""


class Role(ABC):
    """What distinguishes one server of a run from the others: its aggregator, and its relation to other machines.

    Only the service calls it, from its own thread, and nothing here but `close` may wait. What a role may call back is
    in `ServiceInterface`.

    Attributes:
        core: takes the pushes of this machine's workers, and holds the anchor that they pull.
        keeps_state: whether this server keeps the state of the run: saves it periodically, and resumes from it.
    """

    core: Aggregator
    keeps_state: bool

    @abstractmethod
    def attach(self, service: ServiceInterface) -> None:
        """Called once, before any worker can join."""

    @abstractmethod
    def take_up(self, resume: Path | bool) -> dict[str, Tensor] | None:
        """Sets core and folder to the point from which the run continues. Called after `attach`.

        Args:
            resume: another run's server state to begin with, or True for what this folder holds.

        Returns:
            the newest snapshot of this folder, or None if the run does not continue from one.
        """

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether this machine's workers may be welcomed as soon as they have joined: the other machines are there."""

    @property
    @abstractmethod
    def is_needed(self) -> bool:
        """Whether other machines still need this server after its own workers have left."""

    @property
    @abstractmethod
    def others_finished(self) -> bool:
        """Whether the workers of this machine are the last ones training, as far as this server has to know."""

    @property
    @abstractmethod
    def bytes_moved(self) -> int:
        """Bytes that this server has sent to and received from other machines."""

    @property
    def exchange_steps(self) -> int:
        """How many steps each worker of this machine makes between two exchanges with the others; 0 if that is not
        known, or the server has more than one link."""
        return 0

    @abstractmethod
    def tick(self, now: float) -> None:
        """Does what is due without a message. Called at every turn of the loop."""

    @abstractmethod
    def exchange(self) -> None:
        """Sends other machines whatever can be sent without waiting. Called when pushes have arrived, workers have come
        or gone, or the anchor has moved."""

    @abstractmethod
    def stop_all(self) -> None:
        """Passes on to other machines that a worker asks all to stop. The workers of this machine know already."""

    @abstractmethod
    def terminate(self) -> None:
        """Passes on to other machines that the server was told to end, or that a worker of the launch has failed. The
        service tells the workers of this machine."""

    @abstractmethod
    def conclude(self) -> bool:
        """Called once all workers here have finished, and again until it returns True: whether the anchor is final as
        soon as it has been flushed."""

    @abstractmethod
    def close(self) -> None:
        """Called when the loop has ended. May wait a few seconds, to forward what is left."""
