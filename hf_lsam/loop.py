"""LSAM for a training loop of your own: the same worker, server and arithmetic as `LSAMTrainer`, without Trainer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import sam
from .arguments import LSAMArguments
from .batchnorm import keep_variances_positive, kept_statistics, reestimate, running_statistics, tracking_layers
from .callbacks import FailureSignatures
from .checkpoint import SERVER_STATE, WORKER_STATE, load_tensors, save_tensors
from .data import Generators, agree_on_order, from_the_start
from .figures import Figures
from .identity import detach
from .optimizers import known_direction, showing_anchor, switch
from .parameters import about_cast, cast_to_float32, refuse_changes, trainable_parameters
from .rates import RaisedRates, momentum_coefficient
from .record import RecordWriter, describe
from .run import EndSignals, Run
from .worker import Worker

logger = logging.getLogger(__name__)


@dataclass
class LoopArguments(LSAMArguments):
    """LSAM's fields and their validation, without TrainingArguments."""

    def __post_init__(self):
        self.validate()


# What a closure decides for itself, or a Trainer's data loader.
NOT_IN_A_LOOP = (
    "sam_ascent_fraction",
    "data_distribution",
    "landscape_points",
    "landscape_batches",
)


class LSAM:
    """Takes the place of forward, backward, clipping and `optimizer.step` in a hand-written loop.

    ```python
    lsam = LSAM(model, optimizer, sam_rho=0.1, total_steps=len(loader))
    with lsam:
        for batch in lsam.shard(loader):
            loss = lsam.step(lambda: loss_fn(model(batch["x"]), batch["y"]))
    with lsam.anchor():
        evaluate(model)
    ```

    Started with plain `python`, the worker is alone; under `accelerate launch` with n processes there are n workers and
    a server process, the script unchanged. The model holds the worker's own parameters inside `with lsam`, and the
    final anchor after it.

    An `Accelerator` is optional. It may have been made before or after, and model and optimizer may have been prepared
    by it or not: a DistributedDataParallel wrapper stays around the model and no longer synchronises, and the default
    process group is closed. Without one, `step` runs the closure under whatever autocast the caller has opened.

    SIGTERM and Ctrl-C set `stop_requested`; a loop that does not end then is ended by the next `step`:

    ```python
            if lsam.stop_requested:
                lsam.save("checkpoint")  # and the optimizer's state, and the place in the data
                break
    ```

    Args:
        model: the model, on its device. If trainable parameters of it are stored in half precision, it is cast to
            float32 here; a checkpoint in its old type is `model.to(dtype)` away.
        optimizer: any torch optimizer over its parameters, or one that Accelerate has prepared. One with a mode for
            evaluation (schedule-free) is in training mode inside `with lsam`, in the other inside `anchor` and after.
        accelerator: takes care of the backward pass and of fp16 scaling.
        gradient_accumulation_steps: micro-batches (calls of `step`) to one optimizer step; their mean is the gradient.
        max_grad_norm: clip the gradient of pass 2 to this norm; None does not clip.
        total_steps: optimizer steps of a worker in the whole run, where known: `sync_steps`, if left out, follows.
        output_dir: folder for the run's record (see `hf_lsam.record`) and the log of the server process. Without one
            there is no record, and the log lies in the current folder.
        resume_from: folder that `save` has written; the run goes on from there. Model and optimizer are the caller's.
        **lsam: the fields of `LSAMArguments`, except those that concern Trainer's data loader.

    Raises:
        TypeError: for an unknown field.
        ValueError: for a value out of range, an unstable configuration, or a model that LSAM cannot train.
        FileNotFoundError: if `resume_from` is no folder that `save` has written.

    Process: the training thread. Blocking: entering `with lsam` until all workers have joined, and leaving it until all
    have finished; `step` never.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | AcceleratedOptimizer,
        *,
        accelerator: Accelerator | None = None,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        total_steps: int | None = None,
        output_dir: str | Path | None = None,
        resume_from: str | Path | None = None,
        **lsam: Any,
    ):
        known = {field.name for field in fields(LSAMArguments)}.difference(NOT_IN_A_LOOP)
        unknown = sorted(lsam.keys() - known)
        if unknown:
            raise TypeError(f"LSAM takes no field {unknown[0]!r}. It takes {', '.join(sorted(known))}.")
        if gradient_accumulation_steps < 1:
            raise ValueError(
                f"`gradient_accumulation_steps` must be >= 1, got {gradient_accumulation_steps}. Use 1 to step after "
                "every batch."
            )
        self.arguments = LoopArguments(**lsam)
        self._resume_from = None if resume_from is None else Path(resume_from)
        if self._resume_from is not None and not (self._resume_from / SERVER_STATE).exists():
            raise FileNotFoundError(
                f"resume_from={resume_from} holds no {SERVER_STATE}: there is no anchor to go on from. Name a folder "
                "that `LSAM.save` has written, or leave it out to begin anew."
            )
        cast = cast_to_float32(_unwrapped(model), optimizer)
        if cast and self.arguments.identity.rank == 0:
            logger.warning("%s", about_cast(cast))
        named = trainable_parameters(_unwrapped(model))
        if self.arguments.batchnorm_statistics == "average":
            named += running_statistics(_unwrapped(model))
        self.optimizer = optimizer
        self.worker: Worker | None = None
        self.figures: Figures | None = None
        self._named = named
        self._model = model
        self._accelerator = accelerator
        self._accumulation = gradient_accumulation_steps
        if accelerator is not None and accelerator.gradient_accumulation_steps > 1:
            if gradient_accumulation_steps not in (1, accelerator.gradient_accumulation_steps):
                raise ValueError(
                    f"gradient_accumulation_steps is {gradient_accumulation_steps} here and "
                    f"{accelerator.gradient_accumulation_steps} in the Accelerator. Set it in one place."
                )
            self._accumulation = accelerator.gradient_accumulation_steps
        self._max_grad_norm = max_grad_norm
        self._batchnorm = tracking_layers(model)
        self._whole: WeakKeyDictionary[DataLoader, DataLoader] = WeakKeyDictionary()  # of the shares handed out
        self._micro_step = 0
        self._finished = False
        self._signals = EndSignals()
        self._signal_was_shown = False
        identity = self.arguments.identity
        detach(identity, named[0][1].device)
        self._run = Run(
            identity,
            Path(self.arguments.shared_memory_dir),
            Path(output_dir or ".") / "server.log",
            self.arguments.server_address,
            self.arguments.timeouts(),
        )
        self._record = RecordWriter(None if output_dir is None else Path(output_dir), identity.rank)
        self._signatures = FailureSignatures(identity.num_workers)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.require_forward_param_sync = False  # no broadcast of buffers; `no_sync` does the rest
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._groups = [groups.get(id(parameter)) for _, parameter in named]
        self.arguments.refuse_optimizer(optimizer)
        self._sync_steps = self.arguments.steps_between_pushes(total_steps)
        self._rates = RaisedRates(
            optimizer, self.arguments.learning_rate_factor(self._sync_steps, momentum_coefficient(optimizer))
        )

    # --- the run ---

    def __enter__(self) -> LSAM:
        self._finished = self._signal_was_shown = False
        rank, resume_from = self.arguments.identity.rank, self._resume_from
        server_state = None if resume_from is None else resume_from / SERVER_STATE
        try:
            self.worker = self._run.join(
                self._named,
                self.arguments.worker_settings(self._sync_steps),
                self.arguments.server_settings(self._sync_steps),
                server_state,
            )
            switch(self.optimizer, "train")  # before x is there: it is where the optimizer trains
            self.worker.adopt_anchor()
            if resume_from is not None and (own := resume_from / str(rank) / WORKER_STATE).exists():
                state = load_tensors(own)
                self.worker.load_state_tensors(state)
                self._restore_random_states(state)
            else:
                if resume_from is not None:
                    logger.warning("%s holds nothing of worker %d: it starts at the anchor", resume_from, rank)
                if rank:
                    torch.manual_seed(torch.initial_seed() + rank)  # each worker its own dropout masks and noise
        except BaseException:
            self._run.leave(failed=True)
            raise
        self.figures = Figures(self.worker)
        self._signals.catch()
        self._record.begin(resume_from is not None, self.worker.local_steps, None if rank else self._description())
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._signals.restore()
        try:
            if error is None:
                self._signals.obey()
                refuse_changes(_unwrapped(self._model), self.worker.parameters)
                self.worker.finish()
                switch(self.optimizer, "eval")
                self.worker.adopt_anchor()
                self._finished = True
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._record.end(self.worker.local_steps, error)
            self._run.leave(failed=error is not None)

    def save(self, folder: str | Path) -> None:
        """Saves what LSAM has to know to go on: this worker's x, y, sum and torch's random state, with which it goes on
        when `with lsam` is entered; at worker 0 also the server's state.

        Model weights, optimizer, scheduler and the place in the data are the caller's to save. Every worker calls it,
        with the same folder.

        Raises:
            OSError: if there is no room, or no server.
        """
        folder = Path(folder)
        own = folder / str(self.arguments.identity.rank)
        own.mkdir(parents=True, exist_ok=True)
        if self.arguments.identity.rank == 0 and not self.worker.link.snapshot(folder / SERVER_STATE):
            raise OSError(f"There is no server at the moment: the anchor's state was not saved to {folder}. Try again.")
        save_tensors(own / WORKER_STATE, {**self.worker.state_tensors(), **self._random_states()})

    def _random_states(self) -> dict[str, Tensor]:
        device = self.worker.anchor.device
        of_device = {"device_generator": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
        return {"generator": torch.get_rng_state(), **of_device}

    def _restore_random_states(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["generator"])
        if "device_generator" in state and self.worker.anchor.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_generator"], self.worker.anchor.device)

    def step(self, compute_loss: Callable[[], Tensor | Mapping[str, Any] | tuple]) -> Tensor:
        """One micro-batch: SAM's gradient, and after the last of an accumulation the optimizer's step and the coupling.

        Args:
            compute_loss: runs the model on the batch and returns the loss, 0-d, or a model's output that holds it under
                "loss", or as the first of a tuple; called twice where the step perturbs.

        Returns:
            the detached loss at the worker's own parameters (pass 1), 0-d, on the device.

        Raises:
            RuntimeError: outside `with lsam`.
            ValueError: if what `compute_loss` returns is no loss to take a gradient of.
        """
        if self._signal_was_shown:
            self._signals.obey()
        self._signal_was_shown = self._signals.received is not None
        if self.worker is None or self._finished:
            raise RuntimeError("`LSAM.step` works inside `with lsam:`, where the worker takes part in a run.")
        parameters = self.worker.parameters
        arguments, scaler = self.arguments, self._scaler

        def one_pass() -> Tensor:
            loss = _loss_in(compute_loss())
            self._backward(loss)
            return loss.detach()

        unsynchronised = self._model.no_sync if hasattr(self._model, "no_sync") else nullcontext
        with unsynchronised():
            if arguments.sam_rho == 0 or self.worker.local_steps % arguments.sam_interval:
                loss = one_pass()
            elif arguments.sam_direction != "gradient":
                directions, sign = known_direction(arguments.sam_direction, self.worker, self.optimizer)
                if directions is None:
                    loss = one_pass()
                else:
                    rho, eps, adaptive = sign * arguments.sam_rho, arguments.sam_eps, arguments.sam_adaptive
                    loss = sam.gradient_along(parameters, directions, one_pass, rho, eps, adaptive)
            else:
                loss, second = sam.gradient(
                    parameters,
                    one_pass,
                    one_pass,
                    arguments.sam_rho,
                    arguments.sam_eps,
                    arguments.sam_adaptive,
                    self._batchnorm,
                    scaler,
                )
                self.figures.note_losses(loss, second, skip_overflow=scaler is not None)
        self.worker.note_loss(loss)
        self._micro_step += 1
        if self._micro_step % self._accumulation == 0:
            self._optimizer_step()
        return loss

    @property
    def stop_requested(self) -> bool:
        """Whether another worker, whoever ends the server, or a signal has asked for the end."""
        asked = self.worker is not None and self.worker.link.status.stop_requested
        return asked or self._signals.received is not None

    # --- data, evaluation, logging ---

    def shard(self, loader: DataLoader, seed: int | None = None) -> DataLoader:
        """This worker's share of `loader`, by Accelerate's own sharding; epochs are shared by the workers.

        A loader that an Accelerator under the same launch has prepared before is sharded already. Blocking: until
        worker 0 has called it too.

        Args:
            loader: the data; what its samplers draw is drawn alike in every worker, and anew each epoch.
            seed: of the order; None follows `torch.manual_seed`. Worker 0's counts.
        """
        identity = self.arguments.identity
        seed = self._run.agree("data_seed", torch.initial_seed() if seed is None else seed)
        share = prepare_data_loader(
            loader,
            num_processes=identity.num_workers,
            process_index=identity.rank,
            dispatch_batches=False,
            use_seedable_sampler=True,
            data_seed=seed,
        )
        self._whole[share] = loader
        return agree_on_order(share, seed)

    @contextmanager
    def anchor(self, batches: Iterable | None = None, forward: Callable[[Any], Any] | None = None) -> Iterator[None]:
        """The model holds the anchor inside, and what it held before after. After `with lsam` it holds it already.

        Args:
            batches: training batches from which BatchNorm's running statistics are re-estimated at the anchor, the same
                ones in every worker. Of a DataLoader, also of one that `shard` has returned, these are the first
                `batchnorm_batches` of all its batches, and where it stands does not change; of anything else, all.
            forward: runs the model on one of them; `model(batch)` if None.
        """
        with ExitStack() as stack:
            if self.worker is not None and not self._finished:
                stack.enter_context(showing_anchor(self.worker, self.optimizer))
                stack.enter_context(kept_statistics(self._batchnorm))
            if self.arguments.batchnorm_statistics == "average":
                keep_variances_positive(self._batchnorm)
            elif self._batchnorm and batches is not None:
                if isinstance(batches, DataLoader):
                    whole = from_the_start(self._whole.get(batches, batches))
                    batches = itertools.islice(whole, self.arguments.batchnorm_batches)
                with Generators(0).in_place():
                    reestimate(self._model, batches, forward or self._model)
            elif self._batchnorm and (warning := self._signatures.batchnorm_not_reestimated()):
                logger.warning("LSAM: %s", warning)
            yield

    def log(self, **measured: float) -> dict[str, float]:
        """LSAM's own figures since the last call; warns once of each way in which a run can be seen to go wrong.

        Args:
            **measured: what else belongs into the run's record, such as loss=loss.item().

        Returns:
            LSAM's figures and `measured`.

        Raises:
            ValueError: if parameters were frozen or unfrozen since `with lsam` was entered.
        """
        refuse_changes(_unwrapped(self._model), self.worker.parameters)
        figures = self.figures.since_last_log() | measured
        learning_rate = max(self._learning_rates(), default=0.0)
        self._record.log(self.worker.local_steps, {**figures, "learning_rate": learning_rate})
        for warning in self._signatures.observe(
            figures["lsam/drift"], figures["lsam/staleness"], figures["lsam/anchor_version"], learning_rate
        ):
            logger.warning("LSAM, worker %d: %s", self.arguments.identity.rank, warning)
        return figures

    def log_evaluation(self, step: int | None = None, **measured: float) -> None:
        """Writes what was measured of the anchor into the run's record.

        Args:
            step: local step of worker 0 at which the anchor was taken; now if None.
            **measured: under names that begin with eval_, such as eval_accuracy=0.9.
        """
        now = self.worker.local_steps if self.worker else 0
        self._record.log(now if step is None else step, measured)

    def _description(self) -> dict[str, Any]:
        configuration = {
            **self.arguments.lsam_fields(),
            "sync_steps": self._sync_steps,
            "learning_rate": max(self._learning_rates(), default=0.0),
            "optim": type(self.optimizer).__name__,
            "gradient_accumulation_steps": self._accumulation,
        }
        about = {
            "name": None,
            "class": type(_unwrapped(self._model)).__name__,
            "adapter": False,
            "trainable_parameters": self.worker.layout.numel,
        }
        return describe(self.arguments.identity.num_workers, configuration, about)

    # --- inside a step ---

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return None if self._accelerator is None else self._accelerator.scaler

    def _backward(self, loss: Tensor) -> None:
        if self._accelerator is None:
            (loss / self._accumulation).backward()
        else:  # which divides by its own number of accumulation steps
            self._accelerator.backward(loss * (self._accelerator.gradient_accumulation_steps / self._accumulation))

    def _optimizer_step(self) -> None:
        parameters = self.worker.parameters
        if self._accelerator is not None:
            self._accelerator.unscale_gradients(self.optimizer)  # before clipping and before the pull in the score
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self._rates.raise_()
        rates = self._learning_rates()
        self.worker.before_optimizer_step(rates)
        self.optimizer.step()
        self._rates.restore()
        self.optimizer.zero_grad()
        if not getattr(self.optimizer, "step_was_skipped", False):
            self.worker.after_optimizer_step(rates)
        if self.worker.fell_back:
            self.optimizer.state.clear()  # of gradients that led nowhere
            self.worker.fell_back = False

    def _learning_rates(self) -> list[float]:
        return [0.0 if group is None else float(group["lr"]) for group in self._groups]


def _loss_in(output: Any) -> Tensor:
    """The loss in what a closure returned, found as Trainer finds it in a model's output."""
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
        f"The closure given to `LSAM.step` returned {found}: there is no gradient to take. Return the batch's mean "
        'loss as a 0-d tensor: `loss_fn(model(x), y)` or `model(**batch)["loss"]`, not its .item() or its .detach().'
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
