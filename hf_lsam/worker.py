"""One worker: what LSAM does between the steps of an ordinary training loop.

    x <- Sampler(x, s, eta)           the caller's: SAM gradient, clipping, optimizer
    x <- x - (lambda0 / tau) (x - y)  pull
    D <- D + (x - y)                  running sum
    every tau steps: push D, D <- 0   hand the sum to the server, if it has taken the last one
    y <- newest anchor                if there is one

LSAM (arXiv 2509.03110), Algorithms 1 and 2, worker part; `rules` says where EASGD and LSGD differ. Nothing here waits
for another worker or for the server; a push that finds the mailbox still full is skipped, and its sum goes out with the
next.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .coupling import add_langevin_noise, add_pull_to_gradient, exchange_elastically, pull_and_accumulate
from .parameters import ParameterLayout

logger = logging.getLogger(__name__)


class Link(Protocol):
    """A worker's end of the exchange: `transport.link.MailboxLink` or `server.local.LocalLink`."""

    worker: int
    version: int
    can_push: bool
    away: bool
    evicted: bool
    stop_requested: bool
    save_requested: bool
    staleness: list[int]
    accepted: int
    refused: int
    refused_in_a_row: int
    bytes_pushed: int
    bytes_pulled: int

    def push(self, total: Tensor, steps: int, version: int, loss: float) -> None: ...
    def poll(self, held: int, incoming: Tensor) -> int | None: ...
    def settle(self) -> None: ...
    def finish(self, stop_all: bool, best_step: int, incoming: Tensor) -> tuple[int, int]: ...
    def snapshot(self, path: Path) -> bool: ...
    def close(self, failed: bool = False) -> None: ...


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker is held and when it exchanges.

    Args:
        sync_steps: local steps between two pushes. Denoted tau in the paper.
        coupling_strength: lambda0; a step pulls x by lambda0 / tau of its distance to the anchor.
        coupling: "decoupled" (after the optimizer's step) or "score" (inside the gradient; SGD only).
        langevin_temperature: T; 0 injects no noise, 1 samples exactly.
        rule: what the server does with pushes; decides what is handed in (see `rules`).
        max_bad_pushes: refused pushes (NaN, infinity) in a row after which the worker begins again at the anchor.
    """

    sync_steps: int
    coupling_strength: float = 0.1
    coupling: str = "decoupled"
    langevin_temperature: float = 0.0
    rule: str = "smoothed"
    max_bad_pushes: int = 3


class Worker:
    """The parameters x of one process, their anchor y and the exchange between them.

    Args:
        named: (name, parameter) pairs as `trainable_parameters` gives them.
        link: this worker's end of the exchange.
        settings: see `WorkerSettings`.

    State: x, y, the running sum D, the steps in it, the anchor version and the number of local steps.
    Process: the training thread. Blocking: `finish` waits for the other workers, all else for nobody.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], link: Link, settings: WorkerSettings):
        self.layout = ParameterLayout(named)
        self.parameters = [parameter for _, parameter in named]
        self.settings = settings
        self.link = link
        device = self.parameters[0].device

        def vector() -> Tensor:
            return torch.zeros(self.layout.numel, dtype=torch.float32, device=device)

        self.anchor = vector()  # y, [d]
        self._total = vector()  # D, [d]
        # On an accelerator vectors are copied beside the training stream: the next y while it comes and the last D
        # while it goes need places of their own.
        self._incoming = self.anchor if device.type == "cpu" else vector()
        self._total_in_flight = self._total if device.type == "cpu" else vector()
        self._anchor_views = self.layout.views(self.anchor)
        self._total_views = self.layout.views(self._total)
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self._away: Tensor | None = None  # the worker's own x, [d], while the model shows the anchor
        self.local_steps = 0
        self.steps_in_total = 0
        self.version = -1
        self.skipped_pushes = 0
        self.fell_back = False  # until the owner of the optimizer has seen it, and cleared the optimizer's state
        while self.version < 0:  # the first anchor is there already; on an accelerator its copy takes a moment
            self.pull_newest()

    def adopt_anchor(self) -> None:
        """x <- y: how a worker begins, so that all begin at one point."""
        self.layout.write(self.anchor, self.parameters)

    def before_optimizer_step(self, learning_rates: Sequence[float]) -> None:
        """Adds lambda (x - y) to the gradients, where `coupling` is "score".

        Args:
            learning_rates: eta of each parameter, in the order of `named`. Parameters with eta = 0 are not pulled.
        """
        if self.settings.coupling != "score" or not self.settings.coupling_strength:
            return
        for parameter, y, eta in zip(self.parameters, self._anchor_views, learning_rates, strict=True):
            if eta > 0:
                strength = self.settings.coupling_strength / (eta * self.settings.sync_steps)
                add_pull_to_gradient([parameter], [y], strength)

    def note_loss(self, loss: Tensor) -> None:
        """Adds the loss of one (micro-)batch, 0-d, to the mean that the leader is chosen by."""
        if self.settings.rule == "leader":
            self._loss_sum += loss

    def after_optimizer_step(self, learning_rates: Sequence[float]) -> None:
        """Noise, pull, running sum; a push every tau steps; the newest anchor if it is there.

        Args:
            learning_rates: eta of each parameter, of the step just made.
        """
        settings = self.settings
        if settings.langevin_temperature:
            for parameter, eta in zip(self.parameters, learning_rates, strict=True):
                add_langevin_noise([parameter], eta, settings.langevin_temperature)
        self.local_steps += 1
        self.steps_in_total += 1
        period_ends = self.local_steps % settings.sync_steps == 0
        if settings.rule != "elastic":
            pull = settings.coupling_strength / settings.sync_steps if settings.coupling == "decoupled" else 0.0
            pull_and_accumulate(self.parameters, self._anchor_views, self._total_views, pull)
        elif period_ends and self.link.can_push:  # both sides move, or neither
            alpha = settings.coupling_strength
            exchange_elastically(self.parameters, self._anchor_views, self._total_views, alpha)
        if period_ends:
            if self.link.can_push:
                self._push()
            else:
                self.skipped_pushes += 1
        self.pull_newest()

    def finish(self, stop_all: bool = False, best_step: int = -1) -> int:
        """Hands over what is left, waits until all workers have finished, and takes the final anchor.

        Args:
            stop_all: ask the others to stop as well.
            best_step: step of the best checkpoint where this worker knows one, else -1.

        Returns:
            the best step that any worker named, or -1.
        """
        self.link.settle()
        if self.steps_in_total and self.settings.rule != "elastic":
            self._push()
            self.link.settle()
        self.version, best_step = self.link.finish(stop_all, best_step, self._incoming)
        self._take_incoming()
        return best_step

    @contextmanager
    def showing_anchor(self) -> Iterator[None]:
        """The model holds y inside and x again after; may be nested."""
        if self._away is not None:
            yield
            return
        self._away = self.layout.read(self.parameters, torch.empty_like(self.anchor))
        self.adopt_anchor()
        try:
            yield
        finally:
            self.layout.write(self._away, self.parameters)
            self._away = None

    @property
    def shows_anchor(self) -> bool:
        return self._away is not None

    @property
    def own_parameters(self) -> Tensor:
        """A copy of x, float32 [d], whatever the model shows."""
        if self._away is not None:
            return self._away.clone()
        return self.layout.read(self.parameters, torch.empty_like(self.anchor))

    def drift(self) -> float:
        """||x - y|| / ||y||, read back to the host."""
        x = self.own_parameters
        return (torch.dist(x, self.anchor) / self.anchor.norm().clamp_min(1e-12)).item()

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of this worker, as tensors by name."""
        counters = [self.local_steps, self.steps_in_total, self.version, self.skipped_pushes]
        return {
            "parameters": self.own_parameters,
            "anchor": self.anchor,
            "total": self._total,
            "counters": torch.tensor(counters),
        }

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave: x goes into the model.

        Raises:
            ValueError: if the state is of another model.
        """
        if state["parameters"].numel() != self.layout.numel:
            raise ValueError(
                f"The checkpoint holds {state['parameters'].numel()} trainable values, the model has "
                f"{self.layout.numel}: it was written for another model or adapter. Resume with the one it was saved "
                "from."
            )
        self.layout.write(state["parameters"].to(self.anchor.device), self.parameters)
        self.anchor.copy_(state["anchor"])
        self._total.copy_(state["total"])
        self.local_steps, self.steps_in_total, self.version, self.skipped_pushes = state["counters"].tolist()

    def _push(self) -> None:
        loss = 0.0
        if self.settings.rule == "leader":
            self.layout.read(self.parameters, self._total)
            loss = self._loss_sum.item() / self.steps_in_total
            self._loss_sum.zero_()
        self.link.push(self._total, self.steps_in_total, self.version, loss)
        self._total, self._total_in_flight = self._total_in_flight, self._total
        self._total_views = self.layout.views(self._total)
        self._total.zero_()
        self.steps_in_total = 0

    def pull_newest(self) -> None:
        """Replies from the server, and y <- newest anchor if it is there; never waits."""
        version = self.link.poll(self.version, self._incoming)
        if version is not None:
            self.version = version
            self._take_incoming()
        if self.link.evicted or self.link.refused_in_a_row >= self.settings.max_bad_pushes:
            self._fall_back()

    def _fall_back(self) -> None:
        """x <- y, D <- 0: after a long absence, or once x is no longer finite."""
        logger.warning("worker %d begins again at anchor %d", self.link.worker, self.version)
        self.adopt_anchor()
        self._total.zero_()
        self._loss_sum.zero_()
        self.steps_in_total = 0
        self.link.evicted, self.link.refused_in_a_row = False, 0
        self.fell_back = True

    def _take_incoming(self) -> None:
        self.anchor, self._incoming = self._incoming, self.anchor
        self._anchor_views = self.layout.views(self.anchor)
