"""One worker: what happens between the steps of an ordinary training loop.

    x <- Sampler(x, s, eta)    the caller's: SAM gradient, clipping, optimizer
    couple x to y              at every step, if the algorithm does so (see `algorithms`)
    y <- newest anchor         if there is one; x merges with it, if the algorithm does so
    every tau steps: push      if the server has taken the last one

Nothing here waits for another worker or for the server. A push that finds the mailbox still full is skipped, and what
it would have held goes out with the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .algorithms import ALGORITHMS, WorkerHalf, WorkerSettings
from .coupling import add_langevin_noise
from .parameters import ParameterLayout
from .transport.base import Link

logger = logging.getLogger(__name__)

# How many anchors a worker may miss in one of its own periods. In step with the others it misses none; at a tenth of
# their speed it misses about ten. A worker that misses more stood still for long: what it has done since its last push
# belongs to an anchor that is gone, and to a learning rate that may have been higher, and would undo what is settled.
MISSED_ANCHORS = 32


class Worker:
    """The parameters x of one process, their anchor y, and the exchange between them.

    Args:
        named: (name, parameter) pairs, as returned by `trainable_parameters`.
        link: this worker's end of the exchange (see `transport.base`).
        settings: see `WorkerSettings`.

    State: x, y, what is to be pushed, the steps in it, the anchor version, the number of local steps; the algorithm's.
    Process: the training thread. Blocking: `finish` waits for the other workers; nothing else waits.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]], link: Link, settings: WorkerSettings):
        self.layout = ParameterLayout(named)
        self.parameters = [parameter for _, parameter in named]
        self.settings = settings
        self.link = link
        device = self.parameters[0].device

        def vector() -> Tensor:
            return torch.zeros(self.layout.numel, dtype=torch.float32, device=device)

        self.anchor = vector() if link.anchor_in_place is None else link.anchor_in_place  # y, [d]
        self._total = vector()  # what is to be pushed, [d]
        self._algorithm: WorkerHalf = ALGORITHMS[settings.algorithm].worker_half(settings.coupling)(
            settings, self.parameters
        )
        # On an accelerator vectors are copied in parallel with the training stream. The next y therefore needs a buffer
        # of its own while it arrives, and so does the last push while it leaves, if the next accumulates step by step.
        at_once = device.type == "cpu" or link.anchor_in_place is not None
        self._incoming = self.anchor if at_once else vector()
        self._total_in_flight = self._total if at_once or not self._algorithm.accumulates else vector()
        self._anchor_views = self.layout.views(self.anchor)
        self._total_views = self.layout.views(self._total)
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=device)
        self._away: Tensor | None = None  # the worker's own x, [d], while the model shows the anchor
        self.local_steps = 0
        self.steps_in_total = 0
        self.version = -1
        self._steps_at_anchor = 0  # local steps when the last anchor arrived
        self.skipped_pushes = 0
        self.fell_back = False  # stays True until the optimizer's owner has seen it and cleared the optimizer's state
        self.anchor_move: list[Tensor] | None = None  # y_old - y of the last move that was seen, as views
        self._last_anchor: Tensor | None = None
        self._at_fall_back = link.status  # at the last fall-back, or at the beginning
        self._dropped_push = False  # it has started again since the last push, so x holds nothing of that push
        while self.version < 0:  # the first anchor exists already, but on an accelerator its copy takes a moment
            self._pull()
        if settings.keeps_anchor_move:
            self._last_anchor, self._move = self.anchor.clone(), vector()

    def adopt_anchor(self) -> None:
        """x <- y: how a worker starts, so that all start at the same point."""
        self.layout.write(self.anchor, self.parameters)
        self._algorithm.begin(self.parameters)

    def before_optimizer_step(self, learning_rates: Sequence[float]) -> None:
        """Couples inside the gradient, if the algorithm does so.

        Args:
            learning_rates: eta of each parameter, in the order of `named`.

        Raises:
            ValueError: if a parameter was resized since the run began.
        """
        self.layout.refuse_resized(self.parameters)
        self._algorithm.before_step(self.parameters, self._anchor_views, learning_rates)

    def note_loss(self, loss: Tensor, share: float) -> None:
        """Adds the loss of one (micro-)batch, 0-d, to the mean by which a leader is chosen; it makes up `share` of the
        step's loss."""
        if self._algorithm.wants_loss:
            self._loss_sum.add_(loss, alpha=share)

    def after_optimizer_step(self, learning_rates: Sequence[float]) -> None:
        """Adds noise, couples, and exchanges (see `exchange`).

        Args:
            learning_rates: eta of each parameter in the step just made.
        """
        if temperature := self.settings.langevin_temperature:
            for parameter, eta in zip(self.parameters, learning_rates, strict=True):
                add_langevin_noise(parameter, eta, temperature)
        self.local_steps += 1
        self.steps_in_total += 1
        self._algorithm.after_step(self.parameters, self._anchor_views, self._total_views)
        self.exchange()

    def exchange(self) -> None:
        """All that a step does in addition to the optimizer's step and the coupling: a push every tau steps, and
        y <- newest anchor if there is a new one. Never waits."""
        if self.local_steps % self.settings.sync_steps == 0:
            self.pull_newest()  # so that the push is measured from the newest available anchor
            if not self.link.can_push:
                self.skipped_pushes += 1
            elif self.steps_in_total:  # 0 if the pull has just made it start again
                self._push()
        self.pull_newest()

    def finish(self, stop_all: bool = False, best_step: int = -1) -> int:
        """Pushes what is left, waits until all workers have finished, and takes the final anchor.

        Args:
            stop_all: ask the others to stop as well.
            best_step: step of the best checkpoint if this worker knows one, else -1.

        Returns:
            the best step that any worker reported, or -1.
        """
        self.link.settle()
        if self.steps_in_total and self._algorithm.pushes_a_part:
            self._push()
            self.link.settle()
        self.version, best_step = self.link.finish(stop_all, best_step, self._incoming)
        self._swap_in_incoming()  # x is unchanged
        return best_step

    @contextmanager
    def showing_anchor(self) -> Iterator[None]:
        """Inside, the model holds y; on exit it holds x again. May be nested."""
        if self._away is not None:
            yield
            return
        self._away = self.layout.read(self.parameters, torch.empty_like(self.anchor))
        self.layout.write(self.anchor, self.parameters)
        try:
            yield
        finally:
            self.layout.write(self._away, self.parameters)
            self._away = None

    @property
    def shows_anchor(self) -> bool:
        """Whether the model currently holds y instead of x."""
        return self._away is not None

    @property
    def own_parameters(self) -> Tensor:
        """A copy of x, float32 [d], even while the model holds the anchor."""
        if self._away is not None:
            return self._away.clone()
        return self.layout.read(self.parameters, torch.empty_like(self.anchor))

    def drift(self) -> float:
        """||x - y|| / ||y||, read back to the host."""
        x = self.own_parameters
        return float(torch.dist(x, self.anchor) / self.anchor.norm().clamp_min(1e-12))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this worker, as named tensors."""
        accumulates = self._algorithm.accumulates
        counters = [self.local_steps, self.steps_in_total, self.version, self.skipped_pushes, accumulates]
        return {
            "parameters": self.own_parameters,
            "anchor": self.anchor,
            "total": self._total,
            "loss_sum": self._loss_sum,
            "counters": torch.tensor(counters),
            **self._algorithm.state_tensors(),
        }

    def load_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_tensors` returned for a worker with the same parameters; x is written to the model."""
        self.layout.write(state["parameters"].to(self.anchor.device), self.parameters)
        if self.link.anchor_in_place is None:  # else it is the server's own, which is newer
            self.anchor.copy_(state["anchor"])
        self._total.copy_(state["total"])
        self._loss_sum.copy_(state["loss_sum"])
        self._algorithm.begin(self.parameters)
        self._algorithm.load_state_tensors(state)
        *counters, accumulated = state["counters"].tolist()
        self.local_steps, self.steps_in_total, self.version, self.skipped_pushes = counters
        if accumulated != self._algorithm.accumulates:  # saved with a coupling whose sum means something else
            self._total.zero_()
            self.steps_in_total = 0
        self._steps_at_anchor = self.local_steps

    def _push(self) -> None:
        x, y, push = self.parameters, self._anchor_views, self._total_views
        steps = self._algorithm.before_push(x, y, push, self.steps_in_total)
        loss = 0.0
        if self._algorithm.wants_loss:
            loss = self._loss_sum.item() / self.steps_in_total
            self._loss_sum.zero_()
        self.link.push(self._total, steps, self.version, loss)
        self._total, self._total_in_flight = self._total_in_flight, self._total
        self._total_views = self.layout.views(self._total)
        self._algorithm.after_push(self._total_views)
        self.steps_in_total = 0
        self._dropped_push = False

    def pull_newest(self) -> None:
        """Processes the server's answers, and takes y <- newest anchor if there is a new one. Never waits."""
        version, periods = self.version, (self.local_steps - self._steps_at_anchor) / self.settings.sync_steps
        if self._pull():
            self._steps_at_anchor = self.local_steps
            missed = self.version - version
            if missed > MISSED_ANCHORS * max(1.0, periods):
                logger.info("worker %d missed %d anchors and starts again at the newest", self.link.worker, missed)
                self._begin_again()
            else:
                counted_at = self.link.status.counted_at
                is_counted = counted_at is not None and counted_at < self.version
                settled = is_counted or self._dropped_push
                uncounted = None if settled else self.layout.views(self._total_in_flight)
                self._algorithm.take_anchor(self.parameters, self._anchor_views, uncounted)
        status, before = self.link.status, self._at_fall_back
        refused_in_a_row = min(status.refused_in_a_row, status.refused - before.refused)
        if status.evictions > before.evictions or refused_in_a_row >= self.settings.max_bad_pushes:
            self._fall_back()

    def _pull(self) -> bool:
        version = self.link.poll(self.version, self._incoming)
        if version is None:
            return False
        self.version = version
        self._swap_in_incoming()
        if self._last_anchor is not None:
            torch.sub(self._last_anchor, self.anchor, out=self._move)
            self._last_anchor.copy_(self.anchor)
            self.anchor_move = self.layout.views(self._move)
        return True

    def _begin_again(self) -> None:
        """x <- y, D <- 0."""
        self.adopt_anchor()
        if self._algorithm.accumulates:
            self._total.zero_()
        self._dropped_push = True
        self._loss_sum.zero_()
        self.steps_in_total = 0

    def _fall_back(self) -> None:
        """Starts again at the anchor, without the optimizer's state: after an eviction, or too many refused pushes."""
        logger.warning("worker %d begins again at anchor %d", self.link.worker, self.version)
        self._begin_again()
        self._at_fall_back = self.link.status
        self.fell_back = True

    def _swap_in_incoming(self) -> None:
        self.anchor, self._incoming = self._incoming, self.anchor
        self._anchor_views = self.layout.views(self.anchor)
