"""Fine-tunes a pretrained transformer to classify sentences, with LSAM, data-parallel SAM or plain data parallelism.

    accelerate launch --multi_gpu --num_processes 2 scripts/train_text_classification.py \\
        --config recipes/text_classification/quickstart.yaml [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments` (text_data.py), `LSAMConfig` and `TrainingArguments`.
`method` names the gradient and the distribution, the optimizer is what the training arguments say:

    lsam    LSAMTrainer: asynchronous workers and a server
    sam     Trainer with SAM's two passes, each worker perturbing on its own batch; DDP averages the second gradient
    sgd     Trainer as it is: one pass, DDP averages the gradient

`output_dir` then holds the model or adapter, the tokenizer, results.json, a model card (README.md) and curves.png.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from configuration import parse_configuration, resolve
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, TaskType, get_peft_model
from reporting import REPOSITORY, data_parallel_bytes, provenance, result_table, write_report
from text_data import DataArguments, load_examples
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_lsam import LSAMConfig, LSAMTrainer, sam
from hf_lsam.batchnorm import tracking_layers
from hf_lsam.identity import Identity

METHODS = ("lsam", "sam", "sgd")


@dataclass
class ModelArguments:
    """What is trained, and how."""

    method: str = field(default="lsam", metadata={"help": "'lsam', 'sam' (data-parallel) or 'sgd' (plain)."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model on the Hub, a folder, or package://PACKAGE/PATH."}
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id that the model card names, where model_name_or_path is none."}
    )
    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all parameters."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=16, metadata={"help": "Its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "'all-linear', or module names separated by commas."}
    )


class SAMTrainer(Trainer):
    """Data-parallel SAM: each worker perturbs along the gradient of its own batch (m-sharpness), DDP averages the
    gradients taken there.

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
            return step(model, inputs, num_items_in_batch)

        scaler = self.accelerator.scaler
        return sam.gradient(parameters, first_pass, second_pass, *self._perturbation, layers, scaler)[0]


class StepTimer(TrainerCallback):
    """Takes the time from the beginning to the end of each step; on a GPU without waiting for it."""

    def __init__(self):
        self._steps: list[tuple[Any, Any]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self._steps.append((self._begin, self._now(args.device)))

    def median(self) -> float:
        """Seconds."""
        return statistics.median(
            end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000 for begin, end in self._steps
        )

    def _now(self, device: torch.device):
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """The arguments of the method's Trainer: `LSAMConfig` for lsam, else `TrainingArguments`.

    Raises:
        ValueError: for an unknown method, for LSAM fields out of range, or if the launcher started another number of
            workers than `num_workers`.
    """
    if values["method"] not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {values['method']!r}.")
    if values["output_dir"] is None:
        raise ValueError("`output_dir` is not set: the run would have nowhere to leave the model. Name a folder.")
    kind = LSAMConfig if values["method"] == "lsam" else TrainingArguments
    if kind is TrainingArguments:
        # LSAMConfig checks its fields; the other methods use these.
        workers = Identity.from_environment().num_workers
        if values["num_workers"] not in (None, workers):
            raise ValueError(
                f"num_workers={values['num_workers']}, but {workers} were started. Launch with `accelerate launch "
                f"--multi_gpu --num_processes {values['num_workers']}`, or set num_workers to what you want."
            )
        if values["method"] == "sam":
            if not 0 <= values["sam_rho"] < math.inf:
                raise ValueError(
                    f"`sam_rho` must be finite and >= 0, got {values['sam_rho']}. Use method sgd for none."
                )
            for key, only in (("sam_interval", 1), ("sam_ascent_fraction", 1.0)):
                if values[key] != only:
                    raise ValueError(
                        f"method sam perturbs at every step on the whole batch, got {key}={values[key]}. Set it to "
                        f"{only}, or use method lsam (with one worker and coupling_strength=0 it is SAM)."
                    )
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.init})


def load_model(args: ModelArguments, labels: list[str]) -> tuple[PreTrainedModel, list[str]]:
    """The model with a head for `labels`, and the labels in the order of its outputs.

    A model that has a classification head already keeps it, with its own numbering of the labels.

    Raises:
        ValueError: if its head is for other labels, or for another number of them.
    """
    if not args.model_name_or_path:
        raise ValueError("`model_name_or_path` is not set. Name a model on the Hub or a folder.")
    path = resolve(args.model_name_or_path)
    config = AutoConfig.from_pretrained(path)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        labels = _labels_of_head(args.model_name_or_path, config, labels)
    names = dict(enumerate(labels))
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=len(labels), id2label=names, label2id={name: number for number, name in names.items()}
    )
    # The loss is a mean over examples, whatever `num_items_in_batch` says. Trainer takes it for a sum over that number
    # where the model's forward accepts it, and would scale the gradient by processes and accumulation steps.
    model.accepts_loss_kwargs = False
    if args.use_lora:
        targets = args.lora_target_modules
        lora = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
        )
        model = get_peft_model(model, lora)
    return model, labels


def _labels_of_head(name: str, config: PretrainedConfig, labels: list[str]) -> list[str]:
    remedy = (
        "Give data with its labels (keep_labels selects some), or start from a model without a classification head."
    )
    if config.num_labels != len(labels):
        raise ValueError(
            f"{name} classifies into {config.num_labels} labels, the data has {len(labels)}: "
            f"{', '.join(map(repr, labels))}. {remedy}"
        )
    own = [str(config.id2label[number]) for number in range(config.num_labels)]
    if own == [f"LABEL_{number}" for number in range(config.num_labels)]:
        return labels  # it never was told their names
    if set(own) != set(labels):
        raise ValueError(
            f"{name} classifies into {', '.join(map(repr, own))}, the data has {', '.join(map(repr, labels))}. {remedy}"
        )
    return own


def tokenize(examples: Dataset, tokenizer, names: list[str], max_length: int) -> Dataset:
    """Token ids and label numbers; the labels numbered in the order of `names`."""
    numbers = [names.index(name) for name in examples.features["labels"].names]

    def encode(batch):
        return {
            **tokenizer(batch["text"], truncation=True, max_length=max_length),
            "label": [numbers[label] for label in batch["labels"]],
        }

    return examples.map(
        encode, batched=True, remove_columns=examples.column_names, keep_in_memory=True, desc="Tokenizing"
    )


def accuracy_metric(rank: int):
    """`compute_metrics` from the accuracy that lies beside the recipes."""
    metric = evaluate.load(
        str(REPOSITORY / "recipes/metrics/accuracy"), experiment_id=f"{os.getpid()}-{rank}", keep_in_memory=True
    )

    def compute(prediction):
        return metric.compute(predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids)

    return compute


def build_trainer(values: dict[str, Any], args: TrainingArguments, **keywords) -> Trainer:
    """The Trainer of the method."""
    if values["method"] == "lsam":
        return LSAMTrainer(args=args, **keywords)
    if values["method"] == "sam":
        rho, eps, adaptive = values["sam_rho"], values["sam_eps"], values["sam_adaptive"]
        return SAMTrainer(args=args, rho=rho, eps=eps, adaptive=adaptive, **keywords)
    return Trainer(args=args, **keywords)


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates, saves; the results at worker 0, None at the others.

    Args:
        values: the value of every key, as `parse_configuration` gives them.
    """

    def pick(kind):
        return kind(**{each.name: values[each.name] for each in fields(kind)})

    data_args, model_args = pick(DataArguments), pick(ModelArguments)
    args = training_arguments(values)
    set_seed(args.seed)
    if args.process_index > 0:
        disable_progress_bars()
    train, held_out, labels = load_examples(data_args)
    model, labels = load_model(model_args, labels)
    tokenizer = AutoTokenizer.from_pretrained(resolve(model_args.model_name_or_path))
    timer = StepTimer()
    trainer = build_trainer(
        values,
        args,
        model=model,
        train_dataset=tokenize(train, tokenizer, labels, data_args.max_length),
        eval_dataset=tokenize(held_out, tokenizer, labels, data_args.max_length),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy_metric(args.process_index),
        callbacks=[timer],
    )
    asynchronous = values["method"] == "lsam"
    reports = not asynchronous or args.process_index == 0  # the evaluations of DDP are collective
    evaluated = []
    if not asynchronous:
        # A model that was evaluated before `train` would stay without DDP in it: each process would train by itself.
        args.eval_on_start = True
    elif reports:
        evaluated = [{"step": 0, **trainer.evaluate()}]
    training = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate() if reports else None
    measured = gather_lsam(trainer, timer) if asynchronous else gather_data_parallel(trainer, timer)
    trainer.save_model()
    if args.process_index != 0:
        return None

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    evaluated += [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    before = evaluated[0]
    accuracies = [[entry["step"], entry["eval_accuracy"]] for entry in evaluated]
    curves = {**measured.pop("curves"), "eval_accuracy": accuracies}
    results = {
        "method": values["method"],
        "num_workers": len(measured["steps_per_worker"]),
        "seed": args.seed,
        "device": args.device.type,
        "eval_accuracy": after["eval_accuracy"],
        "eval_loss": after["eval_loss"],
        "eval_accuracy_before": before["eval_accuracy"],
        "eval_loss_before": before["eval_loss"],
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "labels": labels,
        "trainable_parameters": trainable,
        "train_runtime_s": training.metrics["train_runtime"],
        **measured,
        "bytes_data_parallel": data_parallel_bytes(measured["steps_per_worker"], trainable),
        **provenance(),
        "configuration": without_secrets(values),
        "curves": curves,
    }
    write_report(Path(args.output_dir), results)
    return results


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, tokens blanked."""
    return {key: f"<{key}>" if key.endswith("_token") and value else value for key, value in values.items()}


def gather_lsam(trainer: LSAMTrainer, timer: StepTimer) -> dict[str, Any] | None:
    """What the workers measured, in the order of ranks, at worker 0; None at the others."""
    with trainer.local():
        own = trainer.evaluate(metric_key_prefix="worker")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[entry["step"], entry["loss"], entry["lsam/drift"]] for entry in logged]
    report = {
        **trainer.worker_summary(),
        "median_step_s": timer.median(),
        "accuracy": own["worker_accuracy"],
        "losses": losses,
    }
    reports = trainer.gather_from_workers("report", report)
    if reports is None:
        return None

    def each(key):
        return [report[key] for report in reports]

    pushes = sum(each("pushes"))
    weighted = sum(report["staleness_mean"] * report["pushes"] for report in reports)
    return {
        "eval_accuracy_workers": each("accuracy"),
        "steps_per_worker": each("steps"),
        "median_step_s": each("median_step_s"),
        "anchor_version": reports[0]["anchor_version"],
        "pushes_per_worker": each("pushes"),
        "skipped_pushes_per_worker": each("skipped_pushes"),
        "bytes_pushed": each("bytes_pushed"),
        "bytes_pulled": each("bytes_pulled"),
        "staleness": {"mean": weighted / max(1, pushes), "max": max(each("staleness_max"))},
        "curves": {
            "loss": [[[step, loss] for step, loss, _ in losses] for losses in each("losses")],
            "drift": [[[step, drift] for step, _, drift in losses] for losses in each("losses")],
        },
    }


def gather_data_parallel(trainer: Trainer, timer: StepTimer) -> dict[str, Any]:
    """As `gather_lsam`; what only LSAM has is None, and the loss is the workers' mean."""
    median = torch.tensor([timer.median()], device=trainer.args.device)
    medians = trainer.accelerator.gather(median).tolist()
    return {
        "eval_accuracy_workers": None,
        "steps_per_worker": [trainer.state.global_step] * len(medians),
        "median_step_s": medians,
        "anchor_version": None,
        "pushes_per_worker": None,
        "skipped_pushes_per_worker": None,
        "bytes_pushed": None,
        "bytes_pulled": None,
        "staleness": None,
        "curves": {
            "loss": [[[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]],
            "drift": None,
        },
    }


def main() -> None:
    values = parse_configuration((ModelArguments, DataArguments, LSAMConfig), sys.argv[1:])
    results = run(values)
    if results is not None:
        print(result_table(results, values["output_dir"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
