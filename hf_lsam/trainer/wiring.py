"""`LSAMTrainer`: transformers' Trainer with SAM's gradient, and with parameters that are coupled to an anchor.

Wiring only. A worker is an ordinary single-device Trainer run; this module overrides the methods at which LSAM acts:

    training_step           two passes instead of one (session.py, sam.py)
    callbacks               the worker acts around each optimizer step (callbacks.py, optimizers.py)
    get_train_dataloader    gives each worker its share of the data, sharded by Accelerate (training_data.py)
    evaluate, save, ...     the model holds the anchor meanwhile
    evaluation_loop         after training, shared among the workers (shared_evaluation.py)
    _finalize_training      makes the last push, and loads the final anchor into every worker's model
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import BestRun, PredictionOutput, TrainOutput, get_last_checkpoint

from ..arguments import LSAMArguments
from ..batchnorm import kept_statistics
from ..budget import RunSchedule
from ..checkpoint import SERVER_STATE, newest_sealed
from ..identity import is_pinned
from ..parameters import in_stored_types, trainable_parameters
from ..session import Session
from ..transport.base import ServerGone
from ..worker import Worker
from .callbacks import LSAMCallback, OtherWorkers
from .checkpoints import Checkpoints
from .landscape_scan import LandscapeScan
from .publishing import Publishing
from .shared_evaluation import SharedEvaluation
from .training_data import TrainingData
from .trl import kept_counters, load_on_one_device, makes_its_batches, stacks_rows

logger = logging.getLogger(__name__)

# Those of the Trainer's arguments that are recorded with a run, in addition to LSAM's own.
_RECORDED = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "bf16",
    "fp16",
    "seed",
)

# Not part of transformers' public interface; tested on the versions that pyproject.toml admits.
_SEAMS = {
    Trainer: (
        "_finalize_training",
        "_get_output_dir",
        "_inner_training_loop",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_prepare_for_training",
        "_push_from_checkpoint",
        "_save_checkpoint",
        "_save_optimizer_and_scheduler",
    ),
    TrainingArguments: ("_setup_devices",),
}
for _owner, _names in _SEAMS.items():
    for _name in _names:
        if not hasattr(_owner, _name):
            raise ImportError(
                f"This transformers has no {_owner.__name__}.{_name}, which hf_lsam builds on. Install a version in "
                "the range that hf_lsam requires: in its checkout, pip install -U -e ."
            )


class LSAMTrainerMixin(Checkpoints, LandscapeScan, Publishing, SharedEvaluation, TrainingData):
    """Turns any Trainer into a worker: `class MyTrainer(LSAMTrainerMixin, Seq2SeqTrainer)`.

    Its `args` must be an `LSAMConfig`, or that Trainer's config with `LSAMArguments` mixed in. Started with plain
    `python`, the worker trains alone, and its server is an object in the same process (LSAM, Algorithm 1). Under
    `accelerate launch` with n processes, worker 0 starts a server process, and each worker trains on its own.

    During training, the model holds the worker's own parameters x; `evaluate`, `predict`, `save_model` and checkpoints
    use the anchor y. After training, every worker's model holds the final anchor (or the best one, with
    `load_best_model_at_end`), and `local()` gives x back temporarily.

    Raises:
        TypeError: if `args` is not an `LSAMArguments`.
        ValueError: for a Trainer or model that LSAM cannot train (see each message for the reason and the remedy).
    """

    def __init__(self, *positional: Any, **keywords: Any) -> None:
        args = keywords.get("args", positional[1] if len(positional) > 1 else None)
        if not isinstance(args, LSAMArguments):
            raise TypeError(
                f"{type(self).__name__} needs the LSAM fields in `args`, got {type(args).__name__}. Pass an "
                "LSAMConfig, or mix them into your config: `@dataclass class Config(LSAMArguments, YourArguments): "
                "pass`."
            )
        if generating := makes_its_batches(type(self)):
            raise ValueError(
                f"LSAM cannot train with {generating} yet: it makes or changes its batches inside the step (it "
                "generates, or keeps samples between steps), so SAM's second pass would not see the first one's. Use a "
                "trainer with a plain loss, such as SFTTrainer or DPOTrainer."
            )
        pairing = stacks_rows(type(self))
        if pairing and args.sam_ascent_fraction < 1:
            raise ValueError(
                f"sam_ascent_fraction={args.sam_ascent_fraction} lets pass 1 see only the first rows of each "
                f"batch, but in the batches of {pairing} rows belong together (chosen rows stacked over rejected "
                "ones) and would be scored against the wrong ones. Use sam_ascent_fraction=1.0; sam_interval "
                "saves time there too."
            )
        if not is_pinned(args.identity):
            # Another TrainingArguments or Accelerator was created since, and turned the workers into a distributed job.
            args.pin_process(args.device.type == "cpu")
        load_on_one_device(type(self), keywords.get("model", positional[0] if positional else None), args)
        if args.identity.rank != 0:
            args.eval_on_start = False
        self.session = Session(args, None if args.output_dir is None else Path(args.output_dir))
        self._callback = LSAMCallback(self, self.session)
        self._batch_sizes = []
        self._own: Tensor | None = None  # x after training, when the model holds the anchor
        self._showing_local = False
        super().__init__(*positional, **keywords)
        if self.model_init is None:
            self._cast_to_float32(self.model, self.optimizer)
        trainable_parameters(self.model)  # refuses what cannot be trained, before any time is spent
        if self.is_model_parallel:
            raise ValueError(
                f"The model lies on {_devices_of(self.model)} (device_map), and this worker's device is "
                f"{args.device}. Each worker needs its whole model on its own device. Create the LSAMConfig "
                'first, and load the model without device_map, or with device_map={"": args.device}.'
            )
        self.add_callback(self._callback)

    @property
    def worker(self) -> Worker | None:
        """This worker; None before training has begun."""
        return self.session.worker

    @property
    def sam_rho(self) -> float:
        """Radius of the perturbation. Training begins with the configured one; a callback may set it at the beginning
        of a step (`on_step_begin`), for a schedule.

        Raises:
            ValueError: see `Session.sam_rho`.
        """
        return self.session.sam_rho

    @sam_rho.setter
    def sam_rho(self, radius: float) -> None:
        self.session.sam_rho = radius

    def _cast_to_float32(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.session.cast_to_float32(model, optimizer, "It is saved in the types that it was loaded in.")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._cast_to_float32(model)
        return model

    # --- what users call ---

    @contextmanager
    def anchor(self) -> Iterator[None]:
        """Lets the model hold the anchor inside the `with` block; afterwards it holds what it held before.

        May be nested. Does nothing if the model holds the anchor already, before training has begun, and inside
        `local()`. BatchNorm statistics are re-estimated for the anchor; the worker's own are restored afterwards.
        """
        if self._showing_local or self.worker is None or self.session.finished or self.worker.shows_anchor:
            yield
            return
        with self.session.showing_anchor():
            self._settle_batchnorm()
            yield

    @contextmanager
    def local(self) -> Iterator[None]:
        """After training, lets the model hold this worker's own last parameters x inside the `with` block: `with
        trainer.local(): trainer.evaluate()` evaluates a worker instead of the anchor. With an optimizer that has an
        evaluation mode (schedule-free), x are the parameters of that mode.

        Raises:
            RuntimeError: before `train()` has ended.
        """
        if self._own is None:
            raise RuntimeError("A worker's own parameters can be had once `train()` has ended, not before.")
        worker = self.session.joined_worker
        shown = worker.own_parameters
        self._showing_local = True
        try:
            with kept_statistics(self.session.batchnorm):
                worker.layout.write(self._own, worker.parameters)
                for buffer, own in zip(self._batchnorm_buffers(), self._own_statistics, strict=True):
                    buffer.copy_(own)
                yield
        finally:
            self._showing_local = False
            worker.layout.write(shown, worker.parameters)

    def _batchnorm_buffers(self) -> list[Tensor]:
        return [buffer for layer in self.session.batchnorm for buffer in layer.buffers()]

    def gather_from_workers(self, key: str, value: Any) -> list[Any] | None:
        """Collects a JSON value from each worker at worker 0, in the order of ranks; returns None at the others.

        Worker 0 waits for the slowest worker. All workers must make the same calls in the same order.
        """
        return self.session.run.gather(key, value)

    def worker_summary(self) -> dict[str, Any]:
        """This worker's totals of the last `train()`, or of the one under way, including the part that it was resumed
        from: steps, pushes, bytes, staleness and anchor version, and the drift at the last step."""
        return self.session.summary()

    # --- the SAM step ---

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        step = super().training_step
        part, share = _first_part(inputs, self.args.sam_ascent_fraction)
        items = num_items_in_batch if num_items_in_batch is None or share == 1 else num_items_in_batch * share

        def one_pass() -> Tensor:
            return step(model, inputs, num_items_in_batch)

        def other_pass() -> Tensor:
            with kept_counters(self):
                # A share of the number of items need not be an integer.
                return step(model, part, items)  # type: ignore[arg-type]

        scaler = self.accelerator.scaler
        return self.session.add_gradient(self.state.global_step, one_pass, other_pass, share < 1, scaler)

    # --- what is evaluated and saved is the anchor ---

    def evaluate(self, *positional: Any, **keywords: Any) -> dict[str, float]:
        """Trainer's method, for the anchor. After training, the workers that call it share the batches, and each gets
        the metrics."""
        with self.anchor():
            return super().evaluate(*positional, **keywords)

    def predict(self, *positional: Any, **keywords: Any) -> PredictionOutput:
        """Trainer's method, for the anchor. After training, the workers that call it share the batches, and each gets
        the results."""
        with self.anchor():
            return super().predict(*positional, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's method, for the anchor, in the types that the model was loaded in."""
        if _internal_call and self.args.identity.rank != 0:
            # The checkpoint of every worker but worker 0 holds that worker's own state only.
            Path(output_dir or self._output_folder).mkdir(parents=True, exist_ok=True)
            return
        with self.anchor(), in_stored_types(self.session.cast):
            super().save_model(output_dir, _internal_call)

    def _settle_batchnorm(self) -> None:
        """Re-estimates running statistics at the weights that the model holds, from the same training batches in every
        worker."""

        def batches() -> Iterator[Any]:
            return self._first_batches(self.args.batchnorm_batches, min(self._batch_sizes, default=None))

        def forward(batch: dict[str, Any]) -> Any:
            return self.compute_loss(self.model, self._prepare_inputs(batch))

        self.session.settle_batchnorm(batches, forward, self._data_seed)

    # --- logging ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only Trainer itself passes the start time, with what it measured between two log points.
        at_log_point = start_time is not None and self.is_in_train and "loss" in logs
        if at_log_point:
            logs.update(self.session.observe(logs["learning_rate"]))
        super().log(logs, start_time)
        logged = self.state.log_history[-1]  # with what trl's trainers add
        if at_log_point:
            self.session.log(self.state.global_step, logged)
        elif self.args.identity.rank == 0 and not self._showing_local:
            evaluation = {name: value for name, value in logged.items() if name.startswith("eval_")}
            if evaluation:
                self.session.record.log(self.state.global_step, {**evaluation, **self._loaded})

    # --- the steps of the run, where its workers share them ---

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader[Any]
    ) -> tuple[int, int, int, int, int, int | None, int]:
        values = super().set_initial_training_values(args, dataloader)
        if self.args.share_steps:  # one worker may make the epochs of all; their number is the first value
            values = (values[0] * self.args.identity.num_workers, *values[1:])
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if self.args.share_steps and not isinstance(scheduler, RunSchedule):
            self.lr_scheduler = scheduler = RunSchedule(scheduler, self.session.position)
        return scheduler

    # --- a run: join, train, finish ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *positional: Any, **keywords: Any) -> TrainOutput:
        """Trainer's method. At its end the model holds the final anchor, or the best one if Trainer loads that."""
        self._refuse_unwritable()
        self._common_checkpoint = self.sealed_step = None
        self._whole = {}
        identity = self.args.identity
        rows = self.args.train_batch_size
        rows_per_step = rows * self.args.gradient_accumulation_steps
        self._batch_sizes, rows_of_steps = self.session.agree_on_batch_sizes(rows, rows_per_step)
        self.session.weigh(rows_of_steps)
        if identity.rank == 0 and identity.num_workers > 1:
            self._callback.others = OtherWorkers(self._output_folder, identity.num_workers)
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                newest = newest_sealed(self._output_folder) or get_last_checkpoint(str(self._output_folder))
                resume_from_checkpoint = True if newest is None else str(newest)
            if not isinstance(resume_from_checkpoint, bool):
                self._common_checkpoint = Path(resume_from_checkpoint)
                resume_from_checkpoint = str(self._own_checkpoint(self._common_checkpoint))
                self._say_who_resumes(self._common_checkpoint)
        return super().train(resume_from_checkpoint, *positional, **keywords)

    def hyperparameter_search(self, *positional: Any, **keywords: Any) -> BestRun | list[BestRun]:
        if self.args.identity.num_workers > 1:
            raise ValueError(
                "hyperparameter_search chooses each trial at worker 0 and tells the others through a process group, "
                f"which LSAM's workers do not have: {self.args.identity.num_workers} of them would train with "
                "different settings. Search with one worker (plain `python script.py`), or give each trial a launch of "
                "its own."
            )
        return super().hyperparameter_search(*positional, **keywords)

    def _inner_training_loop(self, *positional: Any, **keywords: Any) -> TrainOutput:
        error = None
        try:
            return super()._inner_training_loop(*positional, **keywords)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.session.leave(self.state.global_step, error)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader[Any]]:
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._own = None
        self.session.prepare(self.model, self.optimizer)
        if not self.args.worker_half.pushes_a_part and max_steps < self.session.sync_steps:
            raise ValueError(
                f"A worker makes {max_steps} steps and would exchange after {self.session.sync_steps} "
                f"(`sync_steps`), so the anchor of algorithm={self.args.algorithm!r} would stay the model that "
                f"training began with. Set sync_steps to {max(1, max_steps // 4)}, or train for longer."
            )
        server_state = None if self._common_checkpoint is None else self._common_checkpoint / SERVER_STATE
        if server_state is not None and not server_state.exists():
            logger.warning("%s has no anchor; its model becomes the first one.", self._common_checkpoint)
            server_state = None
        self._join(server_state, None if resume_from_checkpoint is None else Path(resume_from_checkpoint), max_steps)
        configuration = {name: getattr(self.args, name) for name in _RECORDED} | {"max_steps": max_steps}
        self.session.begin(self.state.global_step, resume_from_checkpoint is not None, configuration)
        if self.session.budget is not None:
            self._max_steps, self.state.max_steps = max_steps, self.session.budget.total
            self.lr_scheduler.catch_up()
            if not self.session.steps_are_left:
                return model, DataLoader[Any]([])  # type: ignore[arg-type]  # a list is as good as a Dataset
        return model, train_dataloader

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        session, state = self.session, self.state
        session.signals.obey()
        if self._callback.server_gone is not None:
            raise self._callback.server_gone
        # A stop before the last step is somebody's decision and applies to all workers; running out of data is not.
        in_an_epoch = self._callback.steps_before_epoch < state.global_step < state.max_steps
        stop_all = self.control.should_training_stop and in_an_epoch
        try:
            best = session.finish(stop_all, self._best_step)
        except (ServerGone, KeyboardInterrupt, SystemExit):
            if self.sealed_step != state.global_step:
                self._save_checkpoint(self.model, trial)
            raise
        self._own = session.joined_worker.own_parameters
        self._own_statistics = [buffer.clone() for buffer in self._batchnorm_buffers()]
        session.joined_worker.adopt_anchor()
        self._settle_batchnorm()
        if self.args.landscape_points:
            self._scan_landscape()
        if best >= 0 and self.args.identity.rank != 0:
            # Worker 0 has evaluated and saved; all load the same best checkpoint.
            folder = self._output_folder / f"checkpoint-{best}"
            state.best_global_step, state.best_model_checkpoint = best, str(folder) if folder.is_dir() else None
            if self.args.load_best_model_at_end and not folder.is_dir():
                logger.warning(
                    "Worker %d sees no %s, which worker 0 loads as the best model: it keeps the final anchor. Let all "
                    "machines share output_dir.",
                    self.args.identity.rank,
                    folder,
                )
        if session.budget is not None:
            num_train_samples *= state.global_step / self._max_steps  # in proportion to the steps this worker has made
        if self._loaded and self.args.identity.rank == 0:
            session.record.log(state.global_step, self._loaded)
        return super()._finalize_training(trial, num_train_samples, start_time)

    @property
    def _best_step(self) -> int:
        """The step of the best checkpoint, -1 without one; the best evaluation may be of another step, not saved."""
        best = self.state.best_model_checkpoint
        return -1 if best is None else int(best.rpartition("-")[2])

    @property
    def _loaded(self) -> dict[str, int]:
        """What the record says of the model that Trainer loads after training as the best: the step of its anchor."""
        loads = self.session.finished and self.args.load_best_model_at_end and self._best_step >= 0
        return {"loaded_step": self._best_step} if loads else {}


class LSAMTrainer(LSAMTrainerMixin, Trainer):
    """transformers' Trainer with LSAM; takes the same arguments, with `args` an `LSAMConfig`.

    ```python
    args = LSAMConfig(output_dir="out", sam_rho=0.05)
    trainer = LSAMTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
    trainer.train()
    trainer.save_model()    # the anchor
    ```
    """


def _devices_of(model: Any) -> str:
    """The devices of a model that Accelerate has dispatched, in words."""
    places = sorted({str(place) for place in model.hf_device_map.values()})
    return f"several devices ({', '.join(places)})" if len(places) > 1 else f"device {places[0]}"


def _first_part(inputs: dict[str, Any], fraction: float) -> tuple[dict[str, Any], float]:
    """The first `fraction` of a batch, at least one row, and the share of its rows that this is.

    Every tensor whose first dimension is the batch is cut; a batch of one row, or without tensors, stays whole.
    """
    if fraction == 1:
        return inputs, 1.0
    rows = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)
    kept = math.ceil(rows * fraction)
    if kept >= rows:
        return inputs, 1.0
    part = {
        name: value[:kept] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for name, value in inputs.items()
    }
    return part, kept / rows
