"""`LSAMTrainer`: transformers' Trainer whose gradient is SAM's and whose parameters are coupled to an anchor.

Wiring only. A worker is an ordinary single-device Trainer run; this module takes the seams at which LSAM acts:

    training_step           two passes instead of one (sam.py)
    callbacks               the worker acts after each optimizer step (callbacks.py, worker.py)
    get_train_dataloader    each worker its share of the data, sharded by Accelerate
    evaluate, save, ...     the model holds the anchor meanwhile
    _finalize_training      the last push, and the final anchor into the model of every worker
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from .. import sam
from ..arguments import LSAMArguments
from ..batchnorm import (
    keep_variances_positive,
    kept_statistics,
    reestimate,
    running_statistics,
    tracking_layers,
)
from ..callbacks import FailureSignatures, LSAMCallback, OtherWorkers
from ..card import facts_of_record, model_card
from ..checkpoint import SERVER_STATE, newest_sealed
from ..data import Generators, agree_on_order
from ..figures import Figures
from ..identity import data_sharding, is_pinned
from ..optimizers import known_direction, showing_anchor, switch
from ..parameters import about_cast, cast_to_float32, in_stored_types, refuse_changes, trainable_parameters
from ..rates import RaisedRates, momentum_coefficient
from ..record import RecordWriter, describe, read_record
from ..run import EndSignals, Run
from ..transport.base import ServerGone
from ..worker import Worker
from .checkpoints import Checkpoints
from .counting import uncounted
from .survey import LandscapeSurvey

logger = transformers_logging.get_logger(__name__)

# Of the Trainer's arguments, what the record of a run tells beside LSAM's own.
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

# Not part of transformers' public interface; tried on the versions that pyproject.toml admits.
_SEAMS = {
    Trainer: (
        "_finalize_training",
        "_get_output_dir",
        "_inner_training_loop",
        "_load_from_checkpoint",
        "_load_rng_state",
        "_prepare_for_training",
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
                "the range that hf_lsam requires: pip install -U 'hf-lsam'."
            )


class LSAMTrainerMixin(Checkpoints, LandscapeSurvey):
    """Makes a worker of any Trainer: `class MyTrainer(LSAMTrainerMixin, Seq2SeqTrainer)`.

    Its `args` must be an `LSAMConfig`, or a config of that Trainer with `LSAMArguments` mixed in. Started with plain
    `python`, the worker is alone and its server is an object in the same process (LSAM, Algorithm 1). Under `accelerate
    launch` with n processes, worker 0 starts a server process, and each worker trains by itself.

    While training, the model holds the worker's own parameters x; `evaluate`, `predict`, `save_model` and checkpoints
    see the anchor y. After training, the model of every worker holds the final anchor (or the best one, with
    `load_best_model_at_end`), and `local()` gives x back for a while.

    Raises:
        TypeError: if `args` is no `LSAMArguments`.
        ValueError: for a Trainer or model that LSAM cannot train (see each message for the reason and the remedy).
    """

    def __init__(self, *positional, **keywords):
        args = keywords.get("args", positional[1] if len(positional) > 1 else None)
        if not isinstance(args, LSAMArguments):
            raise TypeError(
                f"{type(self).__name__} needs the LSAM fields in `args`, got {type(args).__name__}. Pass an "
                "LSAMConfig, or mix them into your config: `@dataclass class Config(LSAMArguments, YourArguments): "
                "pass`."
            )
        if generating := _makes_its_batches(type(self)):
            raise ValueError(
                f"LSAM cannot train with {generating} yet: it makes or changes its batches inside the step (it "
                "generates, or keeps samples between steps), so SAM's second pass would not see the first one's. Use a "
                "trainer with a plain loss, such as SFTTrainer or DPOTrainer."
            )
        pairing = _stacks_rows(type(self))
        if pairing and args.sam_ascent_fraction < 1:
            raise ValueError(
                f"sam_ascent_fraction={args.sam_ascent_fraction} lets pass 1 see the first rows of each batch, and "
                f"{pairing} makes its batches of rows that belong together (chosen rows stacked over rejected ones): "
                "cut, they would be scored against the wrong ones. Use sam_ascent_fraction=1.0; sam_interval saves "
                "time there too."
            )
        if not is_pinned(args.identity):
            # Another TrainingArguments or Accelerator was made since, and made one distributed job of the workers.
            args.pin_process(args.device.type == "cpu")
        if args.identity.rank != 0:
            args.eval_on_start = False
        self.worker: Worker | None = None
        self.steps_before_epoch = 0
        self.others: OtherWorkers | None = None  # at worker 0, once there are any
        self._run = Run(
            args.identity,
            Path(args.shared_memory_dir),
            Path(args.output_dir) / "server.log",
            args.server_address,
            args.timeouts(),
        )
        self._record = RecordWriter(Path(args.output_dir), args.identity.rank)
        self._signals = EndSignals()
        self.server_gone: ServerGone | None = None
        self._own: Tensor | None = None  # x after training, when the model holds the anchor
        self._showing_local = False
        self._cast: list[tuple[Tensor, torch.dtype]] = []  # what is saved in another type than it is trained in
        super().__init__(*positional, **keywords)
        if self.model_init is None:
            self._cast_to_float32(self.model, self.optimizer)
        trainable_parameters(self.model)  # refuses what cannot be trained, before any time is spent
        if self.is_model_parallel:
            raise ValueError(
                "The model is spread over several devices (device_map). A worker has one device; with LSAM each would "
                "spread over all. Load the model without device_map."
            )
        self._signatures = FailureSignatures(args.identity.num_workers)
        self.add_callback(LSAMCallback(self))

    def _cast_to_float32(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
        self._cast = cast_to_float32(model, optimizer)
        if self._cast and self.args.identity.rank == 0:
            logger.warning(f"{about_cast(self._cast)} It is saved in the types that it was loaded in.")

    def call_model_init(self, trial=None):
        model = super().call_model_init(trial)
        self._cast_to_float32(model)
        return model

    # --- what users call ---

    @contextmanager
    def anchor(self) -> Iterator[None]:
        """The model holds the anchor inside, and what it held before after. May be nested; no-op when it already does.

        BatchNorm statistics are re-estimated there, and the worker's own put back.
        """
        if self._showing_local or self.worker is None or self._own is not None or self.worker.shows_anchor:
            yield
            return
        with showing_anchor(self.worker, self.optimizer), kept_statistics(self._batchnorm):
            self._reestimate_batchnorm()
            yield

    @contextmanager
    def local(self) -> Iterator[None]:
        """After training, the model holds this worker's last own parameters x inside: `with trainer.local():
        trainer.evaluate()` measures a worker instead of the anchor. With an optimizer that has a mode for evaluation
        (schedule-free), they are those of that mode."""
        if self._own is None:
            raise RuntimeError("There are no worker parameters beside the model's before `train()` has ended.")
        worker = self.worker
        shown = worker.own_parameters
        self._showing_local = True
        try:
            with kept_statistics(self._batchnorm):
                worker.layout.write(self._own, worker.parameters)
                for buffer, own in zip(self._batchnorm_buffers(), self._own_statistics, strict=True):
                    buffer.copy_(own)
                yield
        finally:
            self._showing_local = False
            worker.layout.write(shown, worker.parameters)

    def _batchnorm_buffers(self) -> list[Tensor]:
        return [buffer for layer in self._batchnorm for buffer in layer.buffers()]

    def gather_from_workers(self, key: str, value: Any) -> list[Any] | None:
        """Collects a JSON value of each worker at worker 0, in the order of ranks; None at the others.

        Worker 0 waits for the slowest. All workers must call it as often, and in the same order.
        """
        return self._run.gather(key, value)

    def worker_summary(self) -> dict[str, Any]:
        """This worker's figures of the last `train()`: steps, pushes, bytes, staleness, anchor version."""
        return self._summary

    # --- the SAM step ---

    def training_step(self, model, inputs, num_items_in_batch=None):
        args = self.args
        if args.sam_rho == 0 or self.state.global_step % args.sam_interval:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.worker.note_loss(loss)
            return loss
        if args.sam_direction != "gradient":
            return self._one_pass_step(model, inputs, num_items_in_batch)
        part, share = _first_part(inputs, args.sam_ascent_fraction)
        items = None if num_items_in_batch is None else num_items_in_batch * share
        step, scaler = super().training_step, self.accelerator.scaler

        def first_pass():
            with uncounted(self, share < 1):
                return step(model, part, items)

        def second_pass():
            with uncounted(self, share == 1):
                return step(model, inputs, num_items_in_batch)

        first_loss, second_loss = sam.gradient(
            self.worker.parameters,
            first_pass,
            second_pass,
            args.sam_rho,
            args.sam_eps,
            args.sam_adaptive,
            self._batchnorm,
            scaler,
        )
        self.figures.note_losses(first_loss, second_loss, skip_overflow=scaler is not None)
        loss = first_loss if share == 1 else second_loss
        self.worker.note_loss(loss)
        return loss

    def _one_pass_step(self, model, inputs, num_items_in_batch):
        args, worker, step = self.args, self.worker, super().training_step
        directions, sign = known_direction(args.sam_direction, worker, self.optimizer)
        if directions is None:
            loss = step(model, inputs, num_items_in_batch)
        else:
            loss = sam.gradient_along(
                worker.parameters,
                directions,
                lambda: step(model, inputs, num_items_in_batch),
                sign * args.sam_rho,
                args.sam_eps,
                args.sam_adaptive,
            )
        worker.note_loss(loss)
        return loss

    def learning_rates(self) -> list[float]:
        """The learning rate of each trainable parameter now."""
        return [float(group["lr"]) if group is not None else 0.0 for group in self._groups]

    # --- each worker its data ---

    def get_train_dataloader(self):
        identity = self.args.identity
        if identity.num_workers == 1:
            return super().get_train_dataloader()
        if self.args.data_distribution == "sharded":
            return self._train_dataloader(identity.num_workers, self._data_seed)
        # Far apart: epoch e of the seedable sampler uses its seed + e.
        return self._train_dataloader(1, self._data_seed + 1_000_003 * identity.rank)

    @property
    def _data_seed(self) -> int:
        """The same in every worker, whatever the state of its generators."""
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _train_dataloader(self, num_shards: int, seed: int):
        config = self.accelerator.dataloader_config
        before, config.data_seed = config.data_seed, seed
        try:
            with data_sharding(num_shards):
                return agree_on_order(super().get_train_dataloader(), seed)
        finally:
            config.data_seed = before

    # --- what is evaluated and saved is the anchor ---

    def evaluate(self, *positional, **keywords):
        with self.anchor():
            return super().evaluate(*positional, **keywords)

    def predict(self, *positional, **keywords):
        with self.anchor():
            return super().predict(*positional, **keywords)

    def push_to_hub(self, *positional, **keywords):
        with self.anchor():
            return super().push_to_hub(*positional, **keywords)

    def save_model(self, output_dir=None, _internal_call=False):
        if _internal_call and self.args.identity.rank != 0:
            # The checkpoint of a worker beside worker 0 holds its own state only.
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            return
        with self.anchor(), in_stored_types(self._cast):
            super().save_model(output_dir, _internal_call)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Writes the card that `hf-lsam card` would write of this run's record into `output_dir`, at worker 0.

        Args: those of Trainer's and of trl's method of this name; `dataset_args` is not told.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        facts = facts_of_record(folder, read_record(folder))
        names = _listed(dataset_tags)
        facts = replace(
            facts,
            name=model_name or facts.name,
            base=finetuned_from or facts.base,
            data=next(iter([*names, *_listed(dataset), *_listed(dataset_name)]), None),
            task=next(iter(_listed(tasks)), facts.task),
        )
        kinds = [*_listed(tags), *getattr(self, "_tag_names", []), *_listed(getattr(self.model, "model_tags", None))]
        card = model_card(facts, language=language, license=license, tags=kinds, datasets=names or None)
        (folder / "README.md").write_text(str(card))

    def _reestimate_batchnorm(self):
        """Running statistics at the weights the model holds, from the same training batches in every worker."""
        if not self._batchnorm:
            return
        if self.args.batchnorm_statistics == "worker":
            self._warn(self._signatures.batchnorm_not_reestimated())
            return
        if self.args.batchnorm_statistics == "average":
            keep_variances_positive(self._batchnorm)
            return
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), Generators(self._data_seed).in_place():
            batches = itertools.islice(self._train_dataloader(1, self._data_seed), self.args.batchnorm_batches)
            reestimate(self.model, batches, lambda batch: self.compute_loss(self.model, self._prepare_inputs(batch)))

    # --- logging ---

    def log(self, logs, start_time=None):
        # Trainer alone hands over the start time, with what it measured between two log points.
        if start_time is not None and self.is_in_train and "loss" in logs:
            refuse_changes(self.model, self.worker.parameters)
            logs.update(self.figures.since_last_log())
            if self.rates.factor != 1.0:
                logs["lsam/worker_learning_rate"] = logs["learning_rate"] * self.rates.factor
            for warning in self._signatures.observe(
                logs["lsam/drift"], logs["lsam/staleness"], logs["lsam/anchor_version"], logs["learning_rate"]
            ):
                self._warn(warning)
            self._record.log(self.state.global_step, logs)
        elif self.args.identity.rank == 0 and not self._showing_local:
            evaluation = {name: value for name, value in logs.items() if name.startswith("eval_")}
            if evaluation:
                self._record.log(self.state.global_step, evaluation)
        super().log(logs, start_time)

    def _warn(self, warning: str | None):
        if warning:
            logger.warning(f"LSAM, worker {self.args.identity.rank}: {warning}")

    # --- a run: join, train, finish ---

    def train(self, resume_from_checkpoint=None, *positional, **keywords):
        self._common_checkpoint = None
        identity = self.args.identity
        if identity.rank == 0 and identity.num_workers > 1:
            self.others = OtherWorkers(Path(self.args.output_dir), identity.num_workers)
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                newest = newest_sealed(Path(self.args.output_dir)) or get_last_checkpoint(self.args.output_dir)
                resume_from_checkpoint = newest or True
            if resume_from_checkpoint is not True:
                self._common_checkpoint = Path(resume_from_checkpoint)
                resume_from_checkpoint = str(self._own_checkpoint(self._common_checkpoint))
                self._say_who_resumes()
        return super().train(resume_from_checkpoint, *positional, **keywords)

    def hyperparameter_search(self, *positional, **keywords):
        if self.args.identity.num_workers > 1:
            raise ValueError(
                "hyperparameter_search chooses each trial at worker 0 and tells the others through a process group, "
                f"which LSAM's workers do not have: {self.args.identity.num_workers} of them would train with "
                "different settings. Search with one worker (plain `python script.py`), or give each trial a launch of "
                "its own."
            )
        return super().hyperparameter_search(*positional, **keywords)

    def _inner_training_loop(self, *positional, **keywords):
        error = None
        try:
            return super()._inner_training_loop(*positional, **keywords)
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._record.end(self.state.global_step, error)
            self._signals.restore()
            self._run.leave(failed=error is not None)

    @property
    def must_end(self) -> bool:
        """Whether the run is to be saved and ended now: by a signal, here or at the server, or for want of a server."""
        ended = self.worker.link.status.save_requested or self.server_gone is not None
        return ended or self._signals.received is not None

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model, train_dataloader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        named = trainable_parameters(self.model)
        self._batchnorm = tracking_layers(self.model)  # of this model: `model_init` makes a new one for each `train`
        if self.args.batchnorm_statistics == "average":
            named += running_statistics(self.model)
        group_of = {id(parameter): group for group in self.optimizer.param_groups for parameter in group["params"]}
        self._groups = [group_of.get(id(parameter)) for _, parameter in named]
        self.args.refuse_optimizer(self.optimizer)
        self._own = None
        server_state = None if self._common_checkpoint is None else self._common_checkpoint / SERVER_STATE
        if server_state is not None and not server_state.exists():
            logger.warning(f"{self._common_checkpoint} holds no anchor: its model becomes the first one.")
            server_state = None
        sync_steps = self.args.steps_between_pushes(max_steps)
        self.rates = RaisedRates(
            self.optimizer, self.args.learning_rate_factor(sync_steps, momentum_coefficient(self.optimizer))
        )
        logger.info(f"sync_steps={sync_steps}; the optimizer steps with {self.rates.factor:g} times its learning rate.")
        self.worker = self._run.join(
            named, self.args.worker_settings(sync_steps), self.args.server_settings(sync_steps), server_state
        )
        self.figures = Figures(self.worker)
        switch(self.optimizer, "train")  # before x is there: it is where the optimizer trains
        self._restore_worker(None if resume_from_checkpoint is None else Path(resume_from_checkpoint))
        self.server_gone = None
        self._signals.catch()
        self._record.begin(resume_from_checkpoint is not None, self.state.global_step, self._description(max_steps))
        return model, train_dataloader

    def _description(self, max_steps: int) -> dict[str, Any] | None:
        if self.args.identity.rank != 0:
            return None
        trainer_fields = {name: getattr(self.args, name) for name in _RECORDED} | {"max_steps": max_steps}
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        about = {
            "name": getattr(getattr(base, "config", None), "_name_or_path", None) or None,
            "class": type(base).__name__,
            "adapter": base is not model,
            "trainable_parameters": self.worker.layout.numel,
        }
        settings = {**self.args.lsam_fields(), "sync_steps": self.worker.settings.sync_steps, **trainer_fields}
        return describe(self.args.identity.num_workers, settings, about)

    def _finalize_training(self, trial, num_train_samples, start_time):
        worker, state = self.worker, self.state
        self._signals.restore()
        self._signals.obey()
        if self.server_gone is not None:
            raise self.server_gone
        refuse_changes(self.model, worker.parameters)
        best = -1 if state.best_global_step is None else state.best_global_step
        drift = worker.drift()
        # A stop before the last step is somebody's decision and holds for all; running out of data is not.
        stop_all = self.control.should_training_stop and self.steps_before_epoch < state.global_step < state.max_steps
        try:
            best = worker.finish(stop_all, best)
        except ServerGone:
            self._save_checkpoint(self.model, trial)
            raise
        self._summary = {**self.figures.of_run(), "drift": drift}
        switch(self.optimizer, "eval")
        self._own = worker.own_parameters
        self._own_statistics = [buffer.clone() for buffer in self._batchnorm_buffers()]
        worker.adopt_anchor()
        self._reestimate_batchnorm()
        if self.args.landscape_points:
            self._survey_landscape()
        if best >= 0 and self.args.identity.rank != 0:
            # Worker 0 has evaluated and saved; all load the same best checkpoint.
            folder = Path(self.args.output_dir) / f"checkpoint-{best}"
            state.best_global_step, state.best_model_checkpoint = best, str(folder) if folder.is_dir() else None
        return super()._finalize_training(trial, num_train_samples, start_time)


class LSAMTrainer(LSAMTrainerMixin, Trainer):
    """transformers' Trainer with LSAM; takes the same arguments, with `args` an `LSAMConfig`.

    ```python
    args = LSAMConfig(output_dir="out", sam_rho=0.05)
    trainer = LSAMTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
    trainer.train()
    trainer.save_model()    # the anchor
    ```
    """


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _trainers_of_trl(kind: type) -> list[type]:
    """The trainers of trl that `kind` is one of, the most derived first."""
    return [c for c in kind.__mro__ if c.__module__.startswith("trl.") and c.__name__.endswith("Trainer")]


def _stacks_rows(kind: type) -> str | None:
    """The trl trainer whose batches are not of rows that each stand alone, if `kind` is one: all but SFTTrainer."""
    names = [c.__name__ for c in _trainers_of_trl(kind)]
    return names[0] if names and names[0] != "SFTTrainer" else None


def _makes_its_batches(kind: type) -> str | None:
    """The trl trainer whose step makes or changes the batch that it is given, if `kind` is one.

    The others leave `_prepare_inputs` to Trainer, and hand what `training_step` gets on without naming it.
    """
    trainers = _trainers_of_trl(kind)
    for trainer in trainers:
        step = vars(trainer).get("training_step")
        names_inputs = step is not None and "inputs" in inspect.signature(step).parameters
        if names_inputs or "_prepare_inputs" in vars(trainer):
            return trainers[0].__name__
    return None


def _first_part(inputs: dict[str, Any], fraction: float) -> tuple[dict[str, Any], float]:
    """The first `fraction` of a batch, at least one row, and the share of the rows that it is.

    Every tensor whose first dimension is the batch is cut; a batch of one row, or without tensors, stays whole.
    """
    rows = next((value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1)
    kept = math.ceil(rows * fraction)
    if kept >= rows:
        return inputs, 1.0
    part = {
        name: value[:kept] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for name, value in inputs.items()
    }
    return part, kept / rows
