"""Three methods for any Trainer. A method decides on the gradient and on how training is distributed; the optimizer is
that of the training arguments, or NesterovAdamW with the key `nesterov`:

    lsam            LSAMTrainerMixin: asynchronous workers and a server
    ddp_sam         SAMMixin: two passes, each worker perturbing on its own batch; DDP averages the second gradient
    ddp             the Trainer as it is: one pass, DDP averages the gradient
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer, NesterovAdamW, sam
from hf_lsam.batchnorm import tracking_layers
from hf_lsam.identity import Identity
from hf_lsam.trainer.trl import kept_counters
from recipes.common.arguments import pick
from recipes.common.callbacks import StepProgress, StepTimer

METHODS = ("lsam", "ddp_sam", "ddp")


class SAMMixin:
    """Data-parallel SAM: each worker perturbs along the gradient of its own batch (m-sharpness), and DDP averages the
    gradients computed there.

    Args:
        rho, eps, adaptive: see `hf_lsam.sam.perturb`.
    """

    def __init__(self, *positional, rho: float, eps: float, adaptive: bool, **keywords):
        super().__init__(*positional, **keywords)
        self._perturbation = (rho, eps, adaptive)

    def training_step(self, model, inputs, num_items_in_batch=None):
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        step, layers = super().training_step, tracking_layers(self.model)

        def first_pass():
            with self.accelerator.no_sync(model):
                return step(model, inputs, num_items_in_batch)

        def second_pass():
            with kept_counters(self):
                return step(model, inputs, num_items_in_batch)

        scaler = self.accelerator.scaler
        return sam.gradient(parameters, first_pass, second_pass, *self._perturbation, layers, scaler)[0]


class SAMTrainer(SAMMixin, Trainer):
    """transformers' Trainer with data-parallel SAM."""


# For each method, the Trainer and the class of its arguments. A script with a different Trainer has its own table.
TRAINERS = {
    "lsam": (LSAMTrainer, LSAMConfig),
    "ddp_sam": (SAMTrainer, TrainingArguments),
    "ddp": (Trainer, TrainingArguments),
}


def training_arguments(values: dict[str, Any], trainers: dict[str, tuple[type, type]]) -> TrainingArguments:
    """The arguments of the method's Trainer.

    Args:
        values: the value of every key.
        trainers: for each method, the Trainer and the class of its arguments.

    Raises:
        ValueError: for an unknown method, without `output_dir`, for LSAM fields out of range, or if the launcher
            started a different number of workers from `num_workers`.
    """
    if values["method"] not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {values['method']!r}.")
    if values["output_dir"] is None:
        raise ValueError("`output_dir` is not set: the run would have nowhere to leave the model. Name a folder.")
    # With method lsam, LSAMArguments checks num_workers and sam_rho; the other methods use them too.
    if values["method"] != "lsam":
        Identity.from_environment().require_workers(values["num_workers"])
    if values["method"] == "ddp_sam":
        if not 0 <= values["sam_rho"] < math.inf:
            raise ValueError(f"`sam_rho` must be finite and >= 0, got {values['sam_rho']}. Use method ddp for none.")
        for key, only in (("sam_interval", 1), ("sam_ascent_fraction", 1.0), ("sam_direction", "gradient")):
            if values[key] != only:
                raise ValueError(
                    f"method ddp_sam perturbs at every step along the gradient of the whole batch, got {key}="
                    f"{values[key]}. Set it to {only}, or use method lsam (with one worker and coupling_strength=0 "
                    "it is SAM)."
                )
    return pick(trainers[values["method"]][1], values)


def build_trainer(
    values: dict[str, Any], args: TrainingArguments, trainers: dict[str, tuple[type, type]], **keywords
) -> tuple[Trainer, StepTimer]:
    """The Trainer of the method, and the timer of its steps.

    Args:
        keywords: the Trainer's arguments other than `args` and `callbacks`.
    """
    kind, timer = trainers[values["method"]][0], StepTimer()
    if values["method"] == "ddp_sam":
        keywords |= {"rho": values["sam_rho"], "eps": values["sam_eps"], "adaptive": values["sam_adaptive"]}
    trainer = kind(args=args, callbacks=[timer], **keywords)
    if values["nesterov"]:  # not every Trainer accepts it at construction
        betas = (args.adam_beta1, args.adam_beta2)
        settings = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
        trainer.optimizer_cls_and_kwargs = (NesterovAdamW, settings)
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if args.process_index == 0 and not args.disable_tqdm:
        trainer.add_callback(StepProgress())
    return trainer, timer
