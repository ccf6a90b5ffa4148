"""The two halves of a method: what a worker does between its optimizer's steps, and how the server handles pushes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from ..anchor import Anchor


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is coupled to the anchor, and when it exchanges.

    Args:
        sync_steps: local steps between two pushes. Denoted tau in the paper.
        coupling_strength: lambda0, the share of its distance to the anchor that a worker gives up in a period; for
            "easgd", alpha.
        coupling: "merge" (all at once, when a new anchor arrives), "decoupled" (at every step, after the optimizer's)
            or "score" (at every step, inside the gradient; SGD only).
        langevin_temperature: T; 0 injects no noise, 1 samples exactly.
        algorithm: "lsam", "easgd" or "lsgd".
        max_bad_pushes: refused pushes (NaN, infinity) in a row after which the worker starts again at the anchor.
        keeps_anchor_move: keep y_old - y of the anchor's last move that was seen, at the cost of two vectors.
        weight: of this worker in the mean of "lsam", at least 1: where the workers of a launch train on unequal numbers
            of rows a step, these numbers, divided by their greatest common divisor.
    """

    sync_steps: int
    coupling_strength: float = 1.0
    coupling: str = "merge"
    langevin_temperature: float = 0.0
    algorithm: str = "lsam"
    max_bad_pushes: int = 3
    keeps_anchor_move: bool = False
    weight: int = 1

    @property
    def coupling_per_step(self) -> float:
        """c = lambda0 / tau, the share of the distance to the anchor that one decoupled step removes."""
        return self.coupling_strength / self.sync_steps


@dataclass(frozen=True)
class ServerSettings:
    """What the server needs to know about a run.

    Args:
        sync_steps: tau, local steps between two pushes of a worker.
        anchor_lr: eta'.
        anchor_momentum_correction: beta.
        anchor_optimizer: "sgd", "nesterov" or "adam".
        anchor_momentum: momentum of "nesterov", first decay rate of "adam".
        algorithm: "lsam", "easgd" or "lsgd".
        moving_rate: alpha of "easgd".
        exchange_bits: bits per value sent between machines: 32, 8 or 4 (see `compression`).
        pushes_movement: whether workers push how far they have moved on their own, instead of where they are.
    """

    sync_steps: int
    anchor_lr: float = 1.0
    anchor_momentum_correction: float = 0.0
    anchor_optimizer: str = "sgd"
    anchor_momentum: float = 0.9
    algorithm: str = "lsam"
    moving_rate: float = 0.0
    exchange_bits: int = 32
    pushes_movement: bool = False

    as_dict = asdict


class WorkerHalf:
    """A method's part in a worker. The defaults do nothing.

    Every tensor list holds one tensor per parameter, in the model's order; y and `push` are float32 views of flat
    vectors.

    Args:
        settings: see `WorkerSettings`.
        x: the worker's parameters.

    Process: the training thread; nothing here waits.
    """

    accumulates = False  # whether `push` grows at every step, instead of being written when it is sent
    pushes_a_part = True  # whether a period that is cut short by the end of the run is pushed
    pushes_movement = False  # whether it pushes how far it has moved on its own, instead of where it is
    moves_at_once = False  # whether coupling_strength is its whole move at an exchange
    brakes = False  # whether every step draws it to an anchor that follows the workers' mean, which slows both down
    wants_loss = False  # whether the server gets the mean loss
    vectors = 0  # how many vectors of d values it keeps

    def __init__(self, settings: WorkerSettings, x: Sequence[Tensor]):
        self.settings = settings

    def begin(self, x: Sequence[Tensor]) -> None:
        """Called when x has just been set to y, because the worker starts, or starts again."""

    def before_step(self, x: Sequence[Tensor], y: Sequence[Tensor], learning_rates: Sequence[float]) -> None:
        """Called before the optimizer steps with the `.grad` of x, at `learning_rates`, one per parameter."""

    def after_step(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor]) -> None:
        """Called when the optimizer has moved x. Methods that accumulate add to `push` here."""

    def before_push(self, x: Sequence[Tensor], y: Sequence[Tensor], push: Sequence[Tensor], steps: int) -> int:
        """Called at the end of a period of `steps` local steps, to write what the server gets into `push`.

        Returns:
            how many steps the push counts as; with a weight, as many times more.
        """
        return steps

    def after_push(self, push: Sequence[Tensor]) -> None:
        """Called when `push` is free again; on an accelerator it is a different vector from the one being sent."""

    def take_anchor(self, x: Sequence[Tensor], y: Sequence[Tensor], uncounted: Sequence[Tensor] | None) -> None:
        """Called when a new anchor y has arrived.

        Args:
            uncounted: the contents of the last push, if this anchor cannot have counted it yet.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this half, as named tensors."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` returned."""


class ServerHalf:
    """A method's part in the server. The defaults do nothing.

    Args:
        anchor: y, float32 [d].
        settings: see `ServerSettings`.

    Attributes:
        adds_up: whether pushes are summed and their mean moves the anchor. They can then be weighted, and a relay can
            sum those of its machine.
        moves_elastically: whether a push moves the anchor as far as the worker, `moving_rate` being the worker's
            coupling strength.

    Process: the server's.
    """

    adds_up = False
    moves_elastically = False

    def __init__(self, anchor: Anchor, settings: ServerSettings):
        self.anchor = anchor
        self.settings = settings

    @staticmethod
    def vectors(settings: ServerSettings) -> int:
        """How many vectors of d values it and the anchor's optimizer keep in addition to y."""
        return 0

    def checks_later(self, steps: int, live: Mapping[int, int]) -> bool:
        """Whether a push of `steps` local steps goes into a sum that this half checks before it moves the anchor, so
        that the server may trust a sender's claim that the push is finite. For `live`, see `push`."""
        return False

    def push(self, vector: Tensor, steps: int, worker: int, loss: float, live: Mapping[int, int]) -> None:
        """Takes one worker's push.

        Args:
            vector: float32 [d], finite unless this half `checks_later`; read, not kept.
            steps: local steps that it covers.
            worker: the sender.
            loss: the worker's mean loss over these steps, if its half `wants_loss`.
            live: the weights of the live workers, by sender; of a machine, whose workers push as one, their sum. Where
                all weigh 1, n is the sum of all.
        """
        raise NotImplementedError

    def leave(self, worker: int, live: Mapping[int, int]) -> None:
        """Called when a worker has finished or died; its pushes remain.

        Args:
            worker: which; or a machine, on which some workers may be left.
            live: those that are left, as in `push`.
        """

    def flush(self) -> None:
        """Called at the end of the run."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this half, as named tensors."""
        return {}

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` returned."""


class Algorithm(Protocol):
    """What a method's file defines."""

    def worker_half(self, coupling: str) -> type[WorkerHalf]:
        """The worker's half for this `coupling`, which some methods ignore."""

    @property
    def server_half(self) -> type[ServerHalf]:
        """The server's half."""
