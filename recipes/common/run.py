"""A run of a recipe: trains, evaluates, saves and reports."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_lsam import LSAMTrainer
from hf_lsam.parameters import data_parallel_bytes
from recipes.common.callbacks import StepTimer
from recipes.common.configuration import parse_configuration
from recipes.common.methods import training_arguments
from recipes.common.report import result_table, write_report
from recipes.common.results import provenance


def begin(values: dict[str, Any], trainers: dict[str, tuple[type, type]]) -> TrainingArguments:
    """The arguments of the method's Trainer (see `training_arguments`). Also sets the seed, and silences progress bars
    where they do not belong."""
    args = training_arguments(values, trainers)
    set_seed(args.seed)
    if args.process_index > 0 or not sys.stderr.isatty():
        disable_progress_bars()
        logging.disable_progress_bar()
    if args.process_index > 0:
        logging.set_verbosity_error()  # worker 0 says the same
    return args


def measured_run(
    trainer: Trainer, timer: StepTimer, values: dict[str, Any], metric: str, **facts: Any
) -> dict[str, Any] | None:
    """Evaluates, trains, evaluates, saves and reports; returns the results at worker 0, None at the others.

    Args:
        trainer: the Trainer of any method.
        timer: the timer of its steps.
        values: the value of every key.
        metric: the metric by which the model is judged: "loss", or a name from `compute_metrics`.
        facts: further results that are already known.
    """
    args = trainer.args
    asynchronous = values["method"] == "lsam"
    evaluated = []
    if not asynchronous:
        # If a model is evaluated before `train`, Trainer does not wrap it in DDP: each process would train on its own.
        args.eval_on_start = True
    elif args.process_index == 0:
        evaluated = [{"step": 0, **trainer.evaluate()}]
    resume: str | bool | None = args.resume_from_checkpoint  # a field of text, as which true and false arrive too
    if str(resume).lower() in ("true", "false"):
        resume = str(resume).lower() == "true" and any(Path(args.output_dir).glob("checkpoint-*"))
    training = trainer.train(resume_from_checkpoint=resume)
    after = trainer.evaluate()  # called by all workers, which share the work with every method
    trainer.save_model()
    gather = gather_lsam if asynchronous else gather_data_parallel
    measured = gather(trainer, timer, metric)
    if args.process_index != 0:
        return None

    key = f"eval_{metric}"
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    evaluated += [entry for entry in trainer.state.log_history if key in entry]
    before = evaluated[0]
    curves = {**measured.pop("curves"), key: [[entry["step"], entry[key]] for entry in evaluated]}
    seconds = training.metrics["train_runtime"]
    if not asynchronous:  # Trainer's clock starts before `eval_on_start`
        began = trainer.state.log_history[timer.logged_before :]
        seconds -= next(entry["eval_runtime"] for entry in began if key in entry)
    results = {
        "method": values["method"],
        "num_workers": len(measured["steps_per_worker"]),
        "seed": args.seed,
        "device": args.device.type,
        "metric": metric,
        key: after[key],
        "eval_loss": after["eval_loss"],
        f"{key}_before": before[key],
        "eval_loss_before": before["eval_loss"],
        **facts,
        "trainable_parameters": trainable,
        "train_runtime_s": seconds,
        "resumed_at_step": timer.resumed_at,  # before which train_runtime_s does not count
        **measured,
        "bytes_data_parallel": data_parallel_bytes(measured["steps_per_worker"], trainable),
        **provenance(),
        "configuration": without_secrets(values),
        "curves": curves,
    }
    if metric == "loss":  # only language models are judged by it
        results["eval_perplexity"] = math.exp(results["eval_loss"])
    write_report(Path(args.output_dir), results)
    return results


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration with access tokens blanked."""
    return {key: f"<{key}>" if key.endswith("_token") and value else value for key, value in values.items()}


def gather_lsam(trainer: LSAMTrainer, timer: StepTimer, metric: str) -> dict[str, Any] | None:
    """The workers' measurements, in rank order, at worker 0; None at the others."""
    with trainer.local():
        own = trainer.evaluate(metric_key_prefix="worker")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [[entry["step"], entry["loss"], entry["lsam/drift"]] for entry in logged]
    report = {
        **trainer.worker_summary(),
        "median_step_s": timer.median(),
        metric: own[f"worker_{metric}"],
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
        f"eval_{metric}_workers": each(metric),
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


def gather_data_parallel(trainer: Trainer, timer: StepTimer, metric: str) -> dict[str, Any]:
    """Like `gather_lsam`; what only LSAM has is None, and the loss is the workers' mean."""
    median = torch.tensor([timer.median()], device=trainer.args.device)
    medians = trainer.accelerator.gather(median).tolist()
    return {
        f"eval_{metric}_workers": None,
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


def main(keys: Sequence[type], run: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """The main function of a training script: parses the command line, makes the run, and prints a table of results.

    Args:
        keys: the dataclasses whose fields are the keys.
        run: takes the value of every key; returns the results at worker 0, None at the others.
    """
    values = parse_configuration(keys, sys.argv[1:])
    results = run(values)
    if results is not None:
        print(result_table(results, values["output_dir"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
