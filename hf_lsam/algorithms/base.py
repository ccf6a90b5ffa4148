"""What a method is made of: what a worker does between its optimizer's steps, and what the server does with a push."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from ..anchor import Anchor


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is held and when it exchanges.

    Args:
        sync_steps: local steps between two pushes. Denoted tau in the paper.
        coupling_strength: lambda0, the share of its distance to the anchor that a worker gives up in a period; for
            "easgd", alpha.
        coupling: "merge" (at once, when a new anchor comes), "decoupled" (step by step, after the optimizer's step) or
            "score" (step by step, inside the gradient; SGD only).
        langevin_temperature: T; 0 injects no noise, 1 samples exactly.
        algorithm: "lsam", "easgd" or "lsgd".
        max_bad_pushes: refused pushes (NaN, infinity) in a row after which the worker begins again at the anchor.
        keeps_anchor_move: keep y_old - y of the last move that was seen, at the price of two vectors.
    """

    sync_steps: int
    coupling_strength: float = 1.0
    coupling: str = "merge"
    langevin_temperature: float = 0.0
    algorithm: str = "lsam"
    max_bad_pushes: int = 3
    keeps_anchor_move: bool = False

    @property
    def coupling_per_step(self) -> float:
        """c = lambda0 / tau, the share of the distance to the anchor that one decoupled step takes away."""
        return self.coupling_strength / self.sync_steps


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to know of a run.

    Args:
        sync_steps: tau, local steps between two pushes of a worker.
        anchor_lr: eta'.
        anchor_momentum_correction: beta.
        anchor_optimizer: "sgd", "nesterov" or "adam".
        anchor_momentum: momentum of "nesterov", first decay rate of "adam".
        algorithm: "lsam", "easgd" or "lsgd".
        moving_rate: alpha of "easgd".
        exchange_bits: of a value that crosses between machines: 32, or 8 or 4 (see `compression`).
    """

    sync_steps: int
    anchor_lr: float = 1.0
    anchor_momentum_correction: float = 0.0
    anchor_optimizer: str = "sgd"
    anchor_momentum: float = 0.9
    algorithm: str = "lsam"
    moving_rate: float = 0.0
    exchange_bits: int = 32

    as_dict = asdict


class WorkerHalf:
    """A method's part in a worker. The defaults do nothing.

    Every tensor list holds one tensor a parameter, in the model's order; y and `push` are float32 views of flat
    vectors.

    Args:
        settings: see `WorkerSettings`.
        x: the worker's parameters.

    Attributes:
        weight: of this worker in the mean difference of "lsam", where workers' batches differ in size: its rows a step
            over the workers' mean. The weights of a launch sum to n.

    Process: the training thread; nothing here waits.
    """

    weight = 1.0
    accumulates = False  # whether `push` grows at every step, and not only when it is handed in
    pushes_a_part = True  # whether a period that the run's end cuts short is handed in
    pushes_movement = False  # whether that is what it has moved by itself, and not where it stands
    moves_at_once = False  # whether coupling_strength is its whole move at an exchange
    brakes = False  # whether it is drawn at every step to an anchor that follows the workers' mean, and slows it down
    wants_loss = False  # whether the server is told the mean loss
    vectors = 0  # of d values that it keeps

    def __init__(self, settings: WorkerSettings, x: Sequence[Tensor]):
        self.settings = settings

    def begin(self, x: Sequence[Tensor]) -> None:
        """x has just been set to y: the worker begins, or begins again."""

    def before_step(self, x: Sequence[Tensor], y: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """`.grad` of x is what the optimizer will step with, at `learning_rates`, one a parameter."""

    def after_step(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor]) -> None:
        """The optimizer has moved x; what `push` gathers until it is handed in is this method's."""

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """A period of `steps` local steps ends: `push` is to hold what the server gets.

        Returns:
            how many steps it counts as.
        """
        return steps

    def after_push(self, push: Sequence[Tensor]) -> None:
        """`push` is free again; on an accelerator it is another vector than the one that is under way."""

    def take_anchor(self, x: Sequence[Tensor], y: Sequence[Tensor], uncounted: Sequence[Tensor] | None) -> None:
        """A new anchor y has come.

        Args:
            uncounted: what the last push held, if this anchor cannot have counted it yet.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of this half, as tensors by name."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave."""


class ServerHalf:
    """A method's part in the server. The defaults do nothing.

    Args:
        anchor: y, float32 [d].
        settings: see `ServerSettings`.

    Attributes:
        adds_up: pushes are added up, and their mean moves the anchor: they can be weighed, a relay can add them up for
            another machine, and since the sum is looked at, that a push is finite may be taken on its sender's word.
        moves_elastically: the anchor moves at a push as far as the worker does: `moving_rate` is its coupling strength.

    Process: the server's.
    """

    adds_up = False
    moves_elastically = False

    def __init__(self, anchor: Anchor, settings: ServerSettings):
        self.anchor = anchor
        self.settings = settings

    @staticmethod
    def vectors(settings: ServerSettings) -> int:
        """Of d values that it and the anchor's step keep, beside y."""
        return 0

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: int) -> None:
        """Takes what one worker hands in.

        Args:
            vector: float32 [d]; read, not kept.
            steps: local steps that it covers.
            worker: who hands it in.
            loss: the worker's mean loss over these steps, where its half `wants_loss`.
            live: n, the workers that take part.
        """
        raise NotImplementedError

    def leave(self, worker: int, gone: int, live: int) -> None:
        """A worker, or `gone` of those that push as one, have finished or died; what they pushed stays."""

    def flush(self) -> None:
        """The run ends."""

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of this half, as tensors by name."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave."""


class Algorithm(Protocol):
    """What a method's file has."""

    def worker_half(self, coupling: str) -> type[WorkerHalf]:
        """What a worker does with this `coupling`, where the method leaves a choice."""

    @property
    def server_half(self) -> type[ServerHalf]:
        """What the server does."""
