"""One worker's part in a run, whatever drives its steps: what `LSAMTrainer` and `LSAM` have in common.

    prepare   checks model and optimizer, before any time is spent
    join      creates the worker, at the anchor or where it was saved
    begin     catches signals and opens the record
    step      add_gradient for each micro-batch; hooks.before_step and after_optimizer_step around the optimizer's step
    finish    takes the final anchor
    leave     in any case

Trainer and loop call these in this order, with `log`, `showing_anchor`, `save_anchor` and `save_worker` in between.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import sam
from .arguments import LSAMArguments
from .batchnorm import keep_variances_positive, kept_statistics, reestimate, running_statistics, tracking_layers
from .budget import StepBudget
from .buffers import kept_buffers, movable_buffers, moved_since, values_of
from .checkpoint import SERVER_STATE, WORKER_STATE, load_tensors, refuse_other_parameters, save_tensors
from .conflicts import refuse_first, with_optimizer
from .data import Generators
from .failure_signatures import FailureSignatures
from .fields import check_field
from .generators import forked
from .metrics import WorkerMetrics
from .optimizers import StepHooks, known_direction, showing_anchor, switch
from .parameters import ParameterLayout, about_cast, cast_to_float32, refuse_changes, trainable_parameters
from .record import RecordWriter, describe
from .run import Run
from .signals import EndSignals
from .worker import Worker

logger = logging.getLogger(__name__)

RECORD_SECONDS = 5.0  # after this long without a log point, a step adds an entry to the record


class Session:
    """Takes part in runs, one after the other.

    Args:
        arguments: LSAM's fields, already checked.
        output_dir: folder for the run's record (see `hf_lsam.record`) and for the log of the server process. If None,
            there is no record, and the log is written to the current folder.

    Attributes:
        arguments: as given.
        sync_steps: tau, once prepared.
        worker: None until the first run is joined; kept after it is left.
        hooks, metrics: those of this worker (see `StepHooks`, `WorkerMetrics`).
        budget: the steps of the run, if workers share them (see `StepBudget`).
        finished: whether the worker has finished, so that the model may hold the anchor for good.
        cast: the tensors that are trained in a different dtype than they came in, with their original dtypes.
        run, record, signals, signatures: the components of the session.

    Process: the training thread. Blocking: `join` until all workers have joined, `finish` until all have finished.
    """

    def __init__(self, arguments: LSAMArguments, output_dir: Path | None):
        identity = arguments.identity
        self.arguments = arguments
        self.run = Run(
            identity,
            Path(arguments.shared_memory_dir),
            (output_dir or Path(".")) / "server.log",
            arguments.server_address,
            arguments.timeouts(),
            arguments.server_port,
        )
        self.record = RecordWriter(output_dir, identity.rank)
        self.signals = EndSignals()
        self.signatures = FailureSignatures(identity.num_workers)
        self.worker: Worker | None = None
        self.budget: StepBudget | None = None
        self.finished = False
        self.cast: list[tuple[Tensor, torch.dtype]] = []
        self._sam_rho = arguments.sam_rho
        self._weights = [1]  # of the workers of the launch, or of this one alone
        self._final_drift = 0.0
        self._record_at = 0.0  # when the next entry is due, by time.monotonic()
        self._at_step_begin = False  # no micro-batch of the next step has been seen
        self._storage: list[Tensor] | None = None  # of perturbed parameters, from step to step

    # --- a run: prepare, join, finish, leave ---

    def cast_to_float32(self, model: nn.Module, optimizer: Optimizer | None = None, remark: str = "") -> None:
        """Like `parameters.cast_to_float32`; worker 0 logs what was done, followed by `remark`.

        Raises:
            ValueError: if `optimizer` has made steps, or loaded a state, in half precision.
        """
        self.cast = cast_to_float32(model, optimizer)
        if self.cast and self.arguments.identity.rank == 0:
            logger.warning("%s", " ".join(filter(None, [about_cast(self.cast), remark])))

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Sets, and checks, which model is trained with which optimizer.

        Args:
            model: the unwrapped model, on its device.
            optimizer: any torch optimizer over its parameters, or one that Accelerate has prepared.

        Raises:
            ValueError: for a model or an optimizer that LSAM cannot train.
        """
        arguments = self.arguments
        refuse_first(with_optimizer(arguments, optimizer))
        self._model, self.optimizer, self._storage = model, optimizer, None
        self._sam_rho = arguments.sam_rho
        self._named: list[tuple[str, Tensor]] = list(trainable_parameters(model))
        if arguments.batchnorm_statistics == "average":
            self._named += running_statistics(model)
        self.batchnorm = tracking_layers(model)
        self._buffers = movable_buffers(model)
        self._buffers_before: list[Tensor] | None = values_of(self._buffers)
        workers = arguments.identity.num_workers
        self.sync_steps = arguments.steps_between_pushes(workers)
        self._factor = arguments.learning_rate_factor(self.sync_steps, optimizer, workers)
        self._shared_momentum = momentum = arguments.shared_momentum(optimizer, workers)
        logger.info("sync_steps=%d", self.sync_steps)
        if self._factor != 1 and arguments.identity.rank == 0:
            logger.warning(
                "The optimizer of each of %d workers steps with %.3g times its learning rate, so that the anchor moves "
                "as data-parallel training does with it; see scale_learning_rate, compensate_coupling and momentum_at.",
                workers,
                self._factor,
            )
        if momentum and arguments.identity.rank == 0:
            logger.warning(
                "The optimizer's momentum of %g a step is the anchor's: workers step without, the anchor with %.3g an "
                "exchange.",
                momentum,
                momentum**self.sync_steps,
            )

    def agree_on_batch_sizes(self, rows: int, rows_per_step: int) -> tuple[list[int], list[int]]:
        """Exchanges batch sizes among the workers of the launch.

        All workers must call it equally often. Blocking: until all have.

        Args:
            rows: rows in a batch of this worker's data.
            rows_per_step: rows in one of its optimizer steps, all micro-batches together.

        Returns:
            `rows` and `rows_per_step` of each worker, in rank order.
        """
        sizes = self.run.agree("batch_sizes", self.run.gather("batch_size", [rows, rows_per_step]))
        each_rows, each_step = ([size[part] for size in sizes] for part in (0, 1))
        return each_rows, each_step

    def weigh(self, rows_per_step: list[int]) -> None:
        """Weights this worker's differences by the rows it trains on, from the next `join` on.

        Args:
            rows_per_step: of each worker of the launch, in rank order.

        Raises:
            ValueError: if they differ, and the algorithm does not average, so that there is nothing to weight.
            RuntimeError: if they have joined with other weights.
        """
        if len(set(rows_per_step)) > 1 and not self.arguments.server_half.adds_up:
            raise ValueError(
                f"The workers train on {rows_per_step} rows a step, but algorithm={self.arguments.algorithm!r} "
                "gives every worker the same weight. Use the same number of rows in every worker (smaller "
                "batches and more gradient accumulation where memory is short), or algorithm='lsam'."
            )
        unit = math.gcd(*rows_per_step)
        weights = [rows // unit for rows in rows_per_step]
        if self.run.joined and weights != self._weights:
            raise RuntimeError(
                f"The workers train on {rows_per_step} rows a step. How much each counts is settled when it joins, and "
                "this one has joined already: call `lsam.shard` before `with lsam`."
            )
        self._weights = weights

    @property
    def device(self) -> torch.device:
        """The device of the trained parameters, once prepared."""
        return self._named[0][1].device

    @property
    def joined_worker(self) -> Worker:
        """`worker`, for use where it must exist.

        Raises:
            RuntimeError: if no run was joined yet.
        """
        if self.worker is None:
            raise RuntimeError("The worker has not joined a run yet: train first, or enter `with lsam`.")
        return self.worker

    def join(
        self, server_state: Path | None = None, worker_state: Path | None = None, max_steps: int | None = None
    ) -> dict[str, Tensor] | None:
        """Joins a run. x is what the worker was saved with, or else the anchor.

        Args:
            server_state: a server's snapshot to continue from.
            worker_state: file that `save_worker` has written.
            max_steps: see `StepBudget`; only used if workers share their steps.

        Returns:
            all tensors in `worker_state`; None if it is None or does not exist.

        Raises:
            OSError, RefusedError, ServerGone: see `Run.join`.
            ValueError: if a state belongs to other trainable parameters.
        """
        arguments = self.arguments
        for path in filter(None, (server_state, worker_state)):
            if path.exists():
                refuse_other_parameters(path, ParameterLayout(self._named).manifest)
        self.finished = False
        self.worker = worker = self.run.join(
            self._named,
            arguments.worker_settings(self.sync_steps, self._weights[arguments.identity.rank % len(self._weights)]),
            arguments.server_settings(self.sync_steps, self._shared_momentum),
            server_state,
        )
        self.metrics = WorkerMetrics(worker)
        self.hooks = StepHooks(self.optimizer, worker, self._factor, self._shared_momentum)
        self.budget = None
        if arguments.share_steps:
            assert max_steps is not None  # Trainer knows it, and `LSAM` requires it
            self.budget = StepBudget(worker.link, max_steps, arguments.identity.num_workers)
        switch(self.optimizer, "train")  # before x is set, because x is where the optimizer trains
        if worker_state is None or not worker_state.exists():
            worker.adopt_anchor()
            return None
        state = load_tensors(worker_state)
        worker.load_state_tensors(state)
        self.metrics.resume(state["exchanged"])
        return state

    def begin(self, step: int, resumed: bool, configuration: dict[str, Any]) -> None:
        """Call right before the first step: from here on signals are requests to end, and the record is open.

        Args:
            step: number of optimizer steps made before.
            resumed: whether training continues from a checkpoint.
            configuration: what the record says about the run in addition to LSAM's own fields.
        """
        self.signals.catch()
        self._record_at = 0.0
        if self.budget is not None:
            self.budget.begin_step()
            if self.budget.is_spent and resumed:
                logger.warning(
                    "All %d steps of the run (max_steps for each of %d workers) were begun before it was resumed, so "
                    "this worker makes none. Raise max_steps to train on.",
                    self.budget.total,
                    self.arguments.identity.num_workers,
                )
        run = None
        if self.arguments.identity.rank == 0:
            unwrapped = getattr(self._model, "get_base_model", None)  # of peft
            base = self._model if unwrapped is None else unwrapped()
            config, kind, adapter = getattr(base, "config", None), type(base).__name__, base is not self._model
            labelled = adapter and kind.endswith("Classification")  # the adapter's own configuration has no labels
            about = {
                "name": getattr(config, "_name_or_path", None) or None,
                "class": kind,
                "adapter": adapter,
                "labels": list(getattr(config, "id2label", {}).values()) if labelled else None,
                "trainable_parameters": self.joined_worker.layout.numel,
            }
            settings = {**self.arguments.lsam_fields(), "sync_steps": self.sync_steps, **configuration}
            run = describe(self.arguments.identity.num_workers, settings, about)
        self.record.begin(resumed, step, run)

    def finish(self, stop_all: bool = False, best_step: int = -1) -> int:
        """Makes the last push and takes the final anchor; the model still holds x. See `Worker.finish`.

        Raises:
            KeyboardInterrupt, SystemExit: if a signal has asked for the end, or does so while the others continue.
            ValueError: if parameters were frozen or unfrozen since the run began.
            ServerGone: if there is no server.
        """
        worker = self.joined_worker
        refuse_changes(self._model, worker.parameters)
        self._final_drift = worker.drift()
        with self.signals.at_once():
            best_step = worker.finish(stop_all, best_step)
        self.signals.restore()
        switch(self.optimizer, "eval")
        self.finished = True
        return best_step

    def leave(self, step: int, error: BaseException | None) -> None:
        """Ends this worker's part, whether or not it has finished.

        Args:
            step: number of optimizer steps made.
            error: the error it ends with, or None; the other workers of the launch then end with one as well.
        """
        if error is None and self.finished and self.metrics.steps_since_last_entry:
            self._add_entry(step, {"lsam/drift": self._final_drift})
        self.record.end(step, error)
        self.signals.restore()
        self.run.leave(failed=error is not None)

    @property
    def number(self) -> int:
        """The worker's number in the run: its rank or, if it is alone in its launch, the one the server gave it."""
        identity = self.arguments.identity
        return identity.rank if identity.num_workers > 1 else self.joined_worker.link.worker

    def save_anchor(self, folder: Path) -> bool:
        """At worker 0, saves the server's state; does nothing at the others.

        Returns:
            False if nothing was saved because there is no server at the moment; otherwise True.

        Raises:
            OSError: if there is no space left.
        """
        worker = self.joined_worker
        return self.arguments.identity.rank != 0 or worker.link.snapshot(folder / SERVER_STATE, worker.layout.manifest)

    def save_worker(self, folder: Path, beside: dict[str, Tensor] | None = None) -> None:
        """Saves x, y and what is to be pushed.

        Args:
            beside: further tensors to save, which `join` returns as well.
        """
        worker = self.joined_worker
        state = {**worker.state_tensors(), "exchanged": self.metrics.exchanged(), **(beside or {})}
        save_tensors(folder / WORKER_STATE, state, worker.layout.manifest)

    # --- a step ---

    @property
    def sam_rho(self) -> float:
        """Radius of the perturbation. `prepare` sets it to the configured value; set it between optimizer steps only.

        Raises:
            ValueError: if it is set to a value that the field `sam_rho` does not accept, or raised from a configured 0
                with `sam_direction` "momentum" or "anchor", which need state that is kept from the beginning.
        """
        return self._sam_rho

    @sam_rho.setter
    def sam_rho(self, radius: float) -> None:
        arguments = self.arguments
        check_field(LSAMArguments, "sam_rho", radius)
        if radius and not arguments.sam_rho and arguments.sam_direction != "gradient":
            raise ValueError(
                "The run began with sam_rho=0, so nothing was kept that "
                f"sam_direction={arguments.sam_direction!r} could perturb along. Configure a positive sam_rho, "
                "and set it to 0 before the first step."
            )
        self._sam_rho = radius

    @property
    def steps_are_left(self) -> bool:
        """Whether this worker may make another step. Always true, unless the workers share the run's steps and none is
        left."""
        return self.budget is None or not self.budget.is_spent

    def position(self) -> int:
        """The position of the schedule in a run whose steps are shared (see `RunSchedule`)."""
        return 0 if self.budget is None else self.budget.position

    def after_optimizer_step(self) -> None:
        """Call when the optimizer has stepped; see `StepHooks.after_step`, also for what it raises."""
        if self.budget is not None:
            self.budget.begin_step()
        self._at_step_begin = True
        self.hooks.after_step()

    def add_gradient(
        self,
        step: int,
        one_pass: Callable[[], Tensor],
        other_pass: Callable[[], Tensor] | None = None,
        ascent_on_part: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        share: float = 1.0,
    ) -> Tensor:
        """Adds one (micro-)batch's gradient to `.grad`: SAM's, one along a known direction, or the plain one.

        Args:
            step: number of optimizer steps made before this one.
            one_pass: forward and backward on the batch; returns the detached loss, 0-d.
            other_pass: the other of SAM's two passes; `one_pass` again if None.
            ascent_on_part: whether `other_pass` is the first of the two, on part of the batch; otherwise it is the
                second.
            scaler: the scaler of the losses (fp16).
            share: the share of the step's loss that the loss of `one_pass` makes up.

        Returns:
            the loss of `one_pass`, 0-d, on the device.
        """
        if self._at_step_begin and self.metrics.steps_since_last_entry and time.monotonic() >= self._record_at:
            self._add_entry(step, {})
        self._at_step_begin = False
        arguments, worker = self.arguments, self.joined_worker
        parameters = worker.parameters
        rho, eps, adaptive = self._sam_rho, arguments.sam_eps, arguments.sam_adaptive
        if rho and self._storage is None:
            self._storage = sam.storage_for(parameters)
        if not rho or step % arguments.sam_interval:
            loss = one_pass()
        elif arguments.sam_direction != "gradient":
            directions, sign = known_direction(arguments.sam_direction, worker, self.optimizer)
            if directions is None:
                loss = one_pass()
            else:
                loss = sam.gradient_along(parameters, directions, one_pass, sign * rho, eps, adaptive, self._storage)
        else:
            passes = [one_pass, other_pass or one_pass]
            if ascent_on_part:
                passes.reverse()
            first, second = passes

            def second_pass() -> Tensor:
                with kept_buffers(self._buffers):
                    return second()

            losses = sam.gradient(
                parameters, first, second_pass, rho, eps, adaptive, self.batchnorm, scaler, self._storage
            )
            self.metrics.add_losses(*losses, share, skip_overflow=scaler is not None)
            loss = losses[ascent_on_part]
        worker.note_loss(loss, share)
        self.metrics.add_loss(loss, share)
        return loss

    # --- evaluating the anchor ---

    @contextmanager
    def showing_anchor(self) -> Iterator[None]:
        """Inside, the model holds y; on exit x and BatchNorm's running statistics are restored. May be nested."""
        with showing_anchor(self.joined_worker, self.optimizer), kept_statistics(self.batchnorm):
            yield

    def settle_batchnorm(
        self, batches: Callable[[], Iterable[Any]] | None, forward: Callable[[Any], Any], seed: int = 0
    ) -> None:
        """Gives the BatchNorm layers running statistics that belong to the anchor, which the model already holds.

        Args:
            batches: returns the training batches to re-estimate them from; None if there are none.
            forward: runs the model on one batch.
            seed: seed of what `batches` and `forward` draw at random, the same in every worker.
        """
        if not self.batchnorm:
            return
        statistics = self.arguments.batchnorm_statistics
        if statistics == "average":
            keep_variances_positive(self.batchnorm)
        elif statistics == "worker" or batches is None:
            self._warn(self.signatures.batchnorm_not_reestimated())
        else:
            with forked(self.device), Generators(seed).in_place():
                done = reestimate(self._model, batches(), forward)
            if not done:
                self._warn(self.signatures.batchnorm_not_reestimated())

    # --- logging ---

    def observe(self, learning_rate: float) -> dict[str, float]:
        """Returns LSAM's own metrics since the last call; warns once about each sign that the run is going wrong.

        Args:
            learning_rate: the largest of a trained parameter.

        Raises:
            ValueError: if parameters were frozen or unfrozen since the run began.
        """
        refuse_changes(self._model, self.joined_worker.parameters)
        metrics = self.metrics.since_last_log()
        if self.hooks.factor != 1.0:
            metrics["lsam/worker_learning_rate"] = learning_rate * self.hooks.factor
        metrics |= self._steps_of_all()
        version = int(metrics["lsam/anchor_version"])
        drift, staleness = metrics["lsam/drift"], metrics["lsam/staleness"]
        for warning in self.signatures.observe(drift, staleness, version, learning_rate):
            self._warn(warning)
        if self._shared_momentum:
            self._warn(self.signatures.slow_link(self.joined_worker.link.exchange_steps, self.sync_steps))
        if self._buffers_before is not None:
            self._warn(self.signatures.buffers_of_a_worker(moved_since(self._buffers, self._buffers_before)))
            self._buffers_before = None  # the first log point has shown which buffers move
        return metrics

    def log(self, step: int, point: dict[str, Any]) -> None:
        """Writes one log point to the record.

        Args:
            step: number of optimizer steps made.
            point: what `observe` returned, and further values.
        """
        self.record.log(step, point)
        self.metrics.entry_was_made()
        self._record_at = time.monotonic() + RECORD_SECONDS

    def _add_entry(self, step: int, more: dict[str, float]) -> None:
        """Writes an entry between two log points to the record; reads one number from the device."""
        rates = {"learning_rate": max(self.hooks.learning_rates(), default=0.0)}
        entry = {"between_logs": True, **self.metrics.since_last_entry(), **self._steps_of_all(), **rates, **more}
        self.record.log(step, entry)
        self._record_at = time.monotonic() + RECORD_SECONDS

    def _steps_of_all(self) -> dict[str, int]:
        return {} if self.budget is None else {"lsam/steps_of_all": self.budget.steps_begun}

    def summary(self) -> dict[str, float]:
        """This worker's totals of the run so far: steps, pushes, bytes, staleness, anchor version, and the drift, which
        after the run is that of the last step.

        Raises:
            RuntimeError: if no run was joined.
        """
        worker = self.joined_worker
        return {**self.metrics.of_run(), "drift": self._final_drift if self.finished else worker.drift()}

    def _warn(self, warning: str | None) -> None:
        if warning:
            logger.warning("LSAM, worker %d: %s", self.arguments.identity.rank, warning)
