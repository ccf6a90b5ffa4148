"""LSAM for your own training loop: the same worker, server and arithmetic as in `LSAMTrainer`, without Trainer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader

from .arguments import TRAINER_ONLY, LSAMArguments, refuse_former_names
from .budget import RunSchedule
from .checkpoint import SERVER_STATE, WORKER_STATE
from .data import agree_on_order, batched_anew, from_the_start, share_unevenly
from .fields import marked
from .generators import set_state, state_of
from .identity import detach
from .session import Session
from .worker import Worker

logger = logging.getLogger(__name__)


@dataclass
class LoopArguments(LSAMArguments):
    """LSAM's fields and their validation, without TrainingArguments."""

    def __post_init__(self) -> None:
        self.validate()


NOT_IN_A_LOOP = marked(LSAMArguments, TRAINER_ONLY)


class LSAM:
    """Replaces forward, backward, clipping and `optimizer.step` in a hand-written loop.

    ```python
    lsam = LSAM(model, optimizer, sam_rho=0.1)
    with lsam:
        for batch in lsam.shard(loader):
            loss = lsam.step(lambda: loss_fn(model(batch["x"]), batch["y"]))
    with lsam.anchor():
        evaluate(model)
    ```

    Started with plain `python`, the worker trains alone; under `accelerate launch` with n processes, the same script
    runs n workers and a server process. The model holds the worker's own parameters inside `with lsam`, and the final
    anchor afterwards.

    `lsam.sam_rho` may be set between steps, to schedule the radius.

    An `Accelerator` is optional. It may be created before or after, and may have prepared model and optimizer or not: a
    DistributedDataParallel wrapper stays around the model but no longer synchronises, and the default process group is
    closed. Without an `Accelerator`, `step` runs the closure under whatever autocast the caller has opened.

    SIGTERM and Ctrl-C set `stop_requested`. If the loop does not end then, the next `step` ends it:

    ```python
            if lsam.stop_requested:
                lsam.save("checkpoint")  # and the optimizer's state, and the place in the data
                break
    ```

    Args:
        model: the model, on its device. If any of its trainable parameters are stored in half precision, it is cast to
            float32 here; to save a checkpoint in the original type, call `model.to(dtype)` first.
        optimizer: any torch optimizer over its parameters, or one that Accelerate has prepared. An optimizer with an
            evaluation mode (schedule-free) is in training mode inside `with lsam`, and in evaluation mode inside
            `anchor` and after training.
        accelerator: takes care of the backward pass and of fp16 scaling.
        gradient_accumulation_steps: number of micro-batches (calls of `step`) per optimizer step, over which the
            gradient is averaged.
        max_grad_norm: clip the gradient of pass 2 to this norm; None does not clip.
        output_dir: folder for the run's record (see `hf_lsam.record`) and for the log of the server process. If None,
            there is no record, and the log is written to the current folder.
        max_steps: with `share_steps`, the steps of the run per worker of the launch (see `batches` and `schedule`).
        resume_from: folder that `save` has written, from which the run continues. Restoring the model and the optimizer
            is up to the caller.
        **lsam: the fields of `LSAMArguments`, except those that concern Trainer's data loader or its loss.

    Raises:
        TypeError: for an unknown field.
        ValueError: for a value out of range, an unstable configuration, or a model or optimizer that LSAM cannot train.
        FileNotFoundError: if `resume_from` is not a folder that `save` has written.

    Process: the training thread. Blocking: entering `with lsam` until all workers have joined, and leaving it until all
    have finished; `step` never.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        accelerator: Accelerator | None = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        output_dir: str | Path | None = None,
        max_steps: int | None = None,
        resume_from: str | Path | None = None,
        **lsam: Any,
    ):
        refuse_former_names(lsam)
        known = {field.name for field in fields(LSAMArguments)}.difference(NOT_IN_A_LOOP)
        unknown = sorted(lsam.keys() - known)
        if unknown:
            raise TypeError(f"LSAM has no argument {unknown[0]!r}. It has {', '.join(sorted(known))}.")
        if gradient_accumulation_steps < 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be >= 1, got {gradient_accumulation_steps}. Use 1 to step after "
                "every batch."
            )
        self.arguments = LoopArguments(**lsam)
        if self.arguments.share_steps != (max_steps is not None and max_steps > 0):
            raise ValueError(
                "`max_steps` must be positive with share_steps=True and must be left out without it, got "
                f"{max_steps}. It counts once for each worker of the launch: n of them make n times as many together. "
                "Without share_steps, your loop decides how many it makes."
            )
        self._max_steps = max_steps
        self._resume_from = None if resume_from is None else Path(resume_from)
        if self._resume_from is not None and not (self._resume_from / SERVER_STATE).exists():
            raise FileNotFoundError(
                f"resume_from={resume_from} holds no {SERVER_STATE}, so there is no anchor to resume from. Name a "
                "folder written by `LSAM.save`, or leave it out to start a new run."
            )
        if accelerator is not None and accelerator.gradient_accumulation_steps > 1:
            if gradient_accumulation_steps not in (1, accelerator.gradient_accumulation_steps):
                raise ValueError(
                    f"gradient_accumulation_steps is {gradient_accumulation_steps} here and "
                    f"{accelerator.gradient_accumulation_steps} in the Accelerator. Set it in one place."
                )
            gradient_accumulation_steps = accelerator.gradient_accumulation_steps
        scales = accelerator is not None and accelerator.scaler is not None
        if scales and not isinstance(optimizer, AcceleratedOptimizer):
            raise ValueError(
                "The Accelerator scales the loss (fp16) but has not prepared this optimizer, so steps whose "
                "gradients overflow would not be skipped. Pass accelerator.prepare(optimizer), or use bf16."
            )
        self.optimizer = optimizer
        self._model = model
        self._accelerator = accelerator
        self._accumulation = gradient_accumulation_steps
        self._max_grad_norm = max_grad_norm
        # For each share that `shard` returned, the loader of all batches.
        self._whole: WeakKeyDictionary[DataLoader[Any], DataLoader[Any]] = WeakKeyDictionary()
        self._micro_step = 0
        self._signal_was_shown = False
        wrapper = model if isinstance(model, DistributedDataParallel) else None
        inner: nn.Module = model if wrapper is None else wrapper.module
        self.session = Session(self.arguments, None if output_dir is None else Path(output_dir))
        self.session.cast_to_float32(inner, optimizer)
        self.session.prepare(inner, optimizer)
        detach(self.arguments.identity, self.session.device)
        if wrapper is not None:
            wrapper.require_forward_param_sync = False  # no broadcast of buffers; `no_sync` does the rest

    @property
    def worker(self) -> Worker | None:
        """This worker, once it has joined a run; None before."""
        return self.session.worker

    @property
    def sam_rho(self) -> float:
        """Radius of the perturbation; set it between optimizer steps to schedule it.

        Raises:
            ValueError: see `Session.sam_rho`.
        """
        return self.session.sam_rho

    @sam_rho.setter
    def sam_rho(self, radius: float) -> None:
        self.session.sam_rho = radius

    # --- the run ---

    def __enter__(self) -> LSAM:
        self._signal_was_shown = False
        self._micro_step = 0
        self.optimizer.zero_grad()  # of an accumulation that another run left incomplete, at other weights
        rank, folder = self.arguments.identity.rank, self._resume_from
        server_state = None if folder is None else folder / SERVER_STATE
        worker_state = None if folder is None else folder / str(rank) / WORKER_STATE
        try:
            state = self.session.join(server_state, worker_state, self._max_steps)
            if state is not None:
                self._restore_random_states(state)
            else:
                if folder is not None:
                    logger.warning("%s has no state of worker %d, which starts at the anchor", folder, rank)
                if number := self.session.number:
                    torch.manual_seed(torch.initial_seed() + number)  # so that dropout masks and noise differ
            configuration = {
                "learning_rate": self._learning_rate,
                "optim": type(self.optimizer).__name__,
                "gradient_accumulation_steps": self._accumulation,
            }
            self.session.begin(self.session.joined_worker.local_steps, folder is not None, configuration)
        except BaseException as error:
            self.session.leave(0, error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        worker = self.session.joined_worker
        try:
            if error is None:
                self.session.finish()
                worker.adopt_anchor()
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.session.leave(worker.local_steps, error)

    def save(self, folder: str | Path) -> None:
        """Saves what LSAM needs in order to continue: this worker's x, y, pending push and torch random state, all
        restored when `with lsam` is entered with `resume_from`, and at worker 0 also the server's state.

        Saving model weights, optimizer, scheduler and the place in the data is up to the caller. Every worker must call
        this, with the same folder.

        Raises:
            OSError: if there is no space left, or no server.
            RuntimeError: if `with lsam` has not been entered yet.
        """
        folder = Path(folder)
        own = folder / str(self.arguments.identity.rank)
        own.mkdir(parents=True, exist_ok=True)
        self.session.save_worker(own, self._random_states())
        if not self.session.save_anchor(folder):
            raise OSError(
                f"The server cannot be reached at the moment, so the anchor's state was not saved to {folder}; this "
                "worker's own was. Try again."
            )

    def _random_states(self) -> dict[str, Tensor]:
        states = {"generator": torch.get_rng_state()}
        if (of_device := state_of(self.session.device)) is not None:
            states["device_generator"] = of_device
        return states

    def _restore_random_states(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["generator"])
        if "device_generator" in state and self.session.device.type != "cpu":
            set_state(self.session.device, state["device_generator"])

    def step(self, compute_loss: Callable[[], Tensor | Mapping[str, Any] | tuple[Any, ...]]) -> Tensor:
        """One micro-batch: SAM's gradient and, after the last micro-batch of an accumulation, the optimizer's step and
        the exchange.

        Args:
            compute_loss: runs the model on the batch and returns the loss, 0-d, or a model output that has it under
                "loss" or as the first element of a tuple. Called twice if the step perturbs along the batch's gradient.

        Returns:
            the detached loss at the worker's own parameters (pass 1), 0-d, on the device; with a `sam_direction` other
            than "gradient", that of its single pass.

        Raises:
            RuntimeError: outside `with lsam`.
            ValueError: if `compute_loss` does not return a loss that has a gradient, if a parameter was resized, or if
                the optimizer's momentum was changed after the anchor had taken it over.
            KeyboardInterrupt, SystemExit: if the loop went on after a signal had set `stop_requested`.
            ServerGone: if the server has been gone for longer than `server_timeout`.
        """
        signals = self.session.signals
        if self._signal_was_shown:
            signals.obey()
        self._signal_was_shown = signals.received is not None
        worker = self.worker
        if worker is None or self.session.finished:
            raise RuntimeError("`LSAM.step` works inside `with lsam:`, where the worker takes part in a run.")

        def one_pass() -> Tensor:
            loss = _loss_in(compute_loss())
            self._backward(loss)
            return loss.detach()

        scaler = None if self._accelerator is None else self._accelerator.scaler
        no_sync = getattr(self._model, "no_sync", nullcontext)
        with no_sync():
            loss = self.session.add_gradient(worker.local_steps, one_pass, scaler=scaler, share=1 / self._accumulation)
        self._micro_step += 1
        if self._micro_step % self._accumulation == 0:
            self._optimizer_step()
        return loss

    @property
    def stop_requested(self) -> bool:
        """Whether another worker, whoever stops the server, or a signal has asked this run to end."""
        asked = self.worker is not None and self.worker.link.status.stop_requested
        return asked or self.session.signals.received is not None

    # --- the steps of the run, if its workers share them ---

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of `loader`, epoch after epoch, as long as the run has steps left (`share_steps`).

        ```python
        with LSAM(model, optimizer, share_steps=True, max_steps=1000) as lsam:
            scheduler = lsam.schedule(CosineAnnealingLR(optimizer, 1000))
            for batch in lsam.batches(lsam.shard(loader)):
                lsam.step(lambda: loss_fn(model(batch["x"]), batch["y"]))
                scheduler.step()
        ```

        Raises:
            ValueError: if `loader` has no batches, or without `share_steps`.
        """
        self._refuse_own_steps("batches", "would never end. Go over your loader")
        while self.session.steps_are_left:
            empty = True
            for batch in loader:
                if not self.session.steps_are_left:
                    return
                empty = False
                yield batch
            if empty:
                raise ValueError("`loader` is empty, but the run has steps left, so it would never end.")

    def schedule(self, scheduler: LRScheduler) -> RunSchedule:
        """Wraps `scheduler`, of `max_steps` steps, so that it follows the run: call its `step` after each of your own
        steps.

        Raises:
            ValueError: without `share_steps`.
        """
        self._refuse_own_steps("schedule", "would stand still. Step the scheduler")
        schedule = RunSchedule(scheduler, self.session.position)
        schedule.catch_up()
        return schedule

    def _refuse_own_steps(self, method: str, consequence: str) -> None:
        if not self.arguments.share_steps:
            raise ValueError(
                f"`LSAM.{method}` follows the steps that the workers of a run share. Without share_steps=True each "
                f"makes steps of its own, and it {consequence} yourself, or pass share_steps=True and max_steps."
            )

    # --- data, evaluation, logging ---

    def shard(self, loader: DataLoader[Any], seed: int | None = None) -> DataLoader[Any]:
        """This worker's share of `loader`, by Accelerate's own sharding: each epoch is divided among the workers.

        A loader that an Accelerator has prepared before, under the same launch, is sharded already. If the workers'
        loaders have different batch sizes, each worker keeps its own, every row is seen once, and a worker's pushes are
        weighted by its rows per step. Blocking: until all workers have called it too.

        Args:
            loader: the data; its samplers draw the same in every worker, and anew in each epoch.
            seed: seed of the order; None follows `torch.manual_seed`. Worker 0's is used by all.

        Raises:
            ValueError: if batch sizes differ, and the loader is a stream or has its own batch sampler, or the algorithm
                is not "lsam".
            RuntimeError: if batch sizes differ, inside `with lsam`.
        """
        identity = self.arguments.identity
        seed = self.session.run.agree("data_seed", torch.initial_seed() if seed is None else seed)
        share = prepare_data_loader(
            loader,
            num_processes=identity.num_workers,
            process_index=identity.rank,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=seed,
        )
        rows = loader.batch_size or 0  # None if the loader has its own batch sampler
        sizes, rows_of_steps = self.session.agree_on_batch_sizes(rows, rows * self._accumulation)
        if len(set(rows_of_steps)) > 1:
            self.session.weigh(rows_of_steps)
        if len(set(sizes)) > 1:
            share_unevenly(share, sizes)
            loader = batched_anew(loader, BatchSampler(loader.sampler, min(sizes), loader.drop_last))
        self._whole[share] = loader
        return agree_on_order(share, seed)

    @contextmanager
    def anchor(
        self, batches: Iterable[Any] | None = None, forward: Callable[[Any], Any] | None = None
    ) -> Iterator[None]:
        """Inside, the model holds the anchor; on exit, what it held before. After `with lsam` it always does.

        Args:
            batches: training batches from which BatchNorm's running statistics are re-estimated at the anchor. From a
                DataLoader, including one that `shard` returned, the first `batchnorm_batches` batches of the whole data
                set are used, and its position does not change; from anything else, all, which should be the same in
                every worker.
            forward: runs the model on one of the batches; `model(batch)` if None.
        """

        def first_batches(batches: Iterable[Any]) -> Iterable[Any]:
            if not isinstance(batches, DataLoader):
                return batches
            whole = from_the_start(self._whole.get(batches, batches))
            return itertools.islice(whole, self.arguments.batchnorm_batches)

        with ExitStack() as stack:
            if self.worker is not None and not self.session.finished:
                stack.enter_context(self.session.showing_anchor())
            some = None if batches is None else partial(first_batches, batches)
            self.session.settle_batchnorm(some, forward or self._model)
            yield

    def log(self, **measured: float) -> dict[str, float]:
        """Returns LSAM's own metrics since the last call, and writes them to the run's record; warns once about each
        sign that the run is going wrong.

        Args:
            **measured: further values for the record, such as loss=loss.item().

        Returns:
            LSAM's metrics and `measured`.

        Raises:
            RuntimeError: if `with lsam` has not been entered yet.
            ValueError: if parameters have been frozen or unfrozen since then.
        """
        step, rate = self.session.joined_worker.local_steps, self._learning_rate
        logged = self.session.observe(rate) | measured
        self.session.log(step, {**logged, "learning_rate": rate})
        return logged

    def worker_summary(self) -> dict[str, float]:
        """This worker's totals of the run so far: steps, pushes, bytes, staleness, anchor version, and the drift, which
        after the run is that of the last step."""
        return self.session.summary()

    def log_evaluation(self, step: int | None = None, **measured: float) -> None:
        """Writes an evaluation of the anchor to the run's record.

        Args:
            step: local step of worker 0 at which the anchor was taken; the current one if None.
            **measured: the results, under names that begin with eval_, such as eval_accuracy=0.9.
        """
        now = 0 if self.worker is None else self.worker.local_steps
        self.session.record.log(now if step is None else step, measured)

    # --- inside a step ---

    def _backward(self, loss: Tensor) -> None:
        if self._accelerator is None:
            (loss / self._accumulation).backward()
        else:  # `Accelerator.backward` divides by its own number of accumulation steps
            self._accelerator.backward(loss * (self._accelerator.gradient_accumulation_steps / self._accumulation))

    def _optimizer_step(self) -> None:
        if self._accelerator is not None:
            self._accelerator.unscale_gradients(self.optimizer)  # before clipping and before the coupling in the score
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.session.joined_worker.parameters, self._max_grad_norm)
        self.session.hooks.before_step()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.session.after_optimizer_step()

    @property
    def _learning_rate(self) -> float:
        """The largest learning rate of a trained parameter."""
        return max(self.session.hooks.learning_rates(), default=0.0)


def _loss_in(output: Any) -> Tensor:
    """The loss in what a closure returned, found as Trainer finds it in a model's output.

    Raises:
        ValueError: if there is no loss tensor, or one that is not 0-d or has no gradient.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif isinstance(output, tuple) and output:
        loss = output[0]
    if isinstance(loss, Tensor) and loss.dim() == 0 and loss.requires_grad:
        return loss
    if not isinstance(loss, Tensor):
        found = f"a {type(output).__name__} without a loss tensor" if loss is not output else f"a {type(loss).__name__}"
    elif loss.dim():
        found = f"a loss of shape {list(loss.shape)}, not reduced to one number"
    else:
        found = "a loss that is cut off from the parameters (detached, or computed under torch.no_grad)"
    raise ValueError(
        f"The closure given to `LSAM.step` returned {found}, which has no gradient. Return the batch's mean loss "
        'as a 0-d tensor: `loss_fn(model(x), y)` or `model(**batch)["loss"]`, not its .item() or its .detach().'
    )
