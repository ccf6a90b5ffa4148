"""What the training scripts share: a method and its Trainer, the model, the time of a step, and what a run came to.

A method names the gradient and the distribution; the optimizer is what the training arguments say:

    lsam    LSAMTrainerMixin: asynchronous workers and a server
    sam     SAMMixin: SAM's two passes, each worker perturbing on its own batch; DDP averages the second gradient
    sgd     the Trainer as it is: one pass, DDP averages the gradient
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from configuration import parse_configuration, resolve
from peft import LoraConfig, TaskType
from reporting import provenance, result_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_lsam import LSAMConfig, LSAMTrainer, sam
from hf_lsam.batchnorm import tracking_layers
from hf_lsam.identity import Identity
from hf_lsam.parameters import data_parallel_bytes
from hf_lsam.trainer.trl import kept_counters

METHODS = ("lsam", "sam", "sgd")


# --- what the keys are ---


@dataclass
class MethodArguments:
    """How it is trained, and what is trained on."""

    method: str = field(default="lsam", metadata={"help": "'lsam', 'sam' (data-parallel) or 'sgd' (plain)."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model on the Hub, a folder, or package://PACKAGE/PATH."}
    )


@dataclass
class ScratchArguments:
    """A model from scratch, in place of `model_name_or_path`."""

    model_config: dict | str | None = field(
        default=None, metadata={"help": "A configuration for a model with random weights: model_type and its fields."}
    )


@dataclass
class TokenizerArguments:
    """The tokenizer, where it is not the model's."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer on the Hub or a folder; default: the model's, or bytes for a model_config."},
    )


@dataclass
class LoraArguments:
    """A LoRA adapter."""

    use_lora: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all parameters."})
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapter."})
    lora_alpha: float = field(default=16, metadata={"help": "Its scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of the adapter."})
    lora_target_modules: str = field(
        default="all-linear", metadata={"help": "'all-linear', or module names separated by commas."}
    )


def pick(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` of the values of its fields."""
    return kind(**{each.name: values[each.name] for each in fields(kind) if each.init})


@dataclass
class ModelArguments(LoraArguments, TokenizerArguments, ScratchArguments, MethodArguments):
    """What language model is trained, and how."""


# --- the methods ---


class SAMMixin:
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
            with kept_counters(self):
                return step(model, inputs, num_items_in_batch)

        scaler = self.accelerator.scaler
        return sam.gradient(parameters, first_pass, second_pass, *self._perturbation, layers, scaler)[0]


class SAMTrainer(SAMMixin, Trainer):
    """transformers' Trainer with data-parallel SAM."""


# Of each method the Trainer and the class of its arguments. A script with another Trainer has a table of its own.
TRAINERS = {
    "lsam": (LSAMTrainer, LSAMConfig),
    "sam": (SAMTrainer, TrainingArguments),
    "sgd": (Trainer, TrainingArguments),
}


def training_arguments(values: dict[str, Any], trainers: dict[str, tuple[type, type]] = TRAINERS) -> TrainingArguments:
    """The arguments of the method's Trainer.

    Args:
        values: the value of every key.
        trainers: of each method the Trainer and the class of its arguments.

    Raises:
        ValueError: for an unknown method, for LSAM fields out of range, or if the launcher started another number of
            workers than `num_workers`.
    """
    if values["method"] not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}, got {values['method']!r}.")
    if values["output_dir"] is None:
        raise ValueError("`output_dir` is not set: the run would have nowhere to leave the model. Name a folder.")
    if values["method"] != "lsam":
        # The arguments of LSAM check these fields; the other methods use them as well.
        workers = Identity.from_environment().num_workers
        if values["num_workers"] not in (None, workers):
            raise ValueError(
                f"num_workers={values['num_workers']}, but {workers} were started. Launch with `accelerate launch "
                f"--multi_gpu --num_processes {values['num_workers']}`, or set num_workers to what you want."
            )
    if values["method"] == "sam":
        if not 0 <= values["sam_rho"] < math.inf:
            raise ValueError(f"`sam_rho` must be finite and >= 0, got {values['sam_rho']}. Use method sgd for none.")
        for key, only in (("sam_interval", 1), ("sam_ascent_fraction", 1.0)):
            if values[key] != only:
                raise ValueError(
                    f"method sam perturbs at every step on the whole batch, got {key}={values[key]}. Set it to "
                    f"{only}, or use method lsam (with one worker and coupling_strength=0 it is SAM)."
                )
    return pick(trainers[values["method"]][1], values)


def build_trainer(
    values: dict[str, Any], args: TrainingArguments, trainers: dict[str, tuple[type, type]] = TRAINERS, **keywords
) -> tuple[Trainer, StepTimer]:
    """The Trainer of the method, and what takes the time of its steps.

    Args:
        keywords: what the Trainer takes beside `args` and `callbacks`.
    """
    kind, timer = trainers[values["method"]][0], StepTimer()
    if values["method"] == "sam":
        keywords |= {"rho": values["sam_rho"], "eps": values["sam_eps"], "adaptive": values["sam_adaptive"]}
    return kind(args=args, callbacks=[timer], **keywords), timer


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


# --- the model ---


def load_model(values: dict[str, Any], auto_class: type, **changes) -> PreTrainedModel:
    """A pretrained model, or one with random weights (`model_config`); its weights in float32.

    Args:
        auto_class: for example `AutoModelForCausalLM`.
        changes: fields of the configuration that the data settles, such as id2label. A `model_config` may say
            otherwise.

    Raises:
        ValueError: without a model, with two, for an adapter on random weights, or for a `model_config` with a field
            that this type of model has not.
    """
    name, config = values["model_name_or_path"], values["model_config"]
    if (name is None) == (config is None):
        raise ValueError(
            "Give one of `model_name_or_path` (a model on the Hub or a folder) and `model_config` (a model from "
            f"scratch), got {'neither' if name is None else 'both'}."
        )
    if name is not None:
        # transformers would keep the type of the checkpoint, often bfloat16, in which small steps are lost.
        return auto_class.from_pretrained(resolve(name), dtype=torch.float32, **changes)
    if values.get("use_lora"):
        raise ValueError(
            "use_lora saves the adapter alone, and the random weights of a `model_config` under it would be gone. "
            "Train all parameters (use_lora false), or name a pretrained model."
        )
    model = auto_class.from_config(model_configuration(config, changes))
    if model.config.model_type == "timm_wrapper":
        model.timm_model.init_weights()  # the wrapper has drawn all weights anew, as if each were a classifier's
    return model


def model_configuration(config: dict | str, changes: dict[str, Any]) -> PretrainedConfig:
    """The configuration of a model from scratch; a field that it does not have is an error.

    Args:
        config: `model_type` and fields of that type's configuration, as a mapping or as JSON.
        changes: further fields, for which `config` may have other values.
    """
    fields_given = json.loads(config) if isinstance(config, str) else dict(config)
    model_type = fields_given.pop("model_type", None)
    if model_type is None:
        raise ValueError("`model_config` does not say which model it is for. Add model_type, for example gpt2.")
    default = AutoConfig.for_model(model_type)
    known = {*default.to_dict(), *default.attribute_map, "num_labels", "id2label", "label2id"}
    unknown = [key for key in fields_given if key not in known]
    if unknown:
        raise ValueError(
            f"`model_config` has the unknown field `{unknown[0]}`: a {model_type} would not use it. Correct its "
            f"spelling or take it out; there are {', '.join(sorted(known))}."
        )
    return AutoConfig.for_model(model_type, **{**changes, **fields_given})


# Marks what the assistant says, so that trl can train on it alone (assistant_only_loss).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes: it needs no file, and there is no text it does not know."""
    special = ["<pad>", "</s>", "<|im_start|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate([*special, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load_tokenizer(values: dict[str, Any]) -> PreTrainedTokenizerBase:
    """That of `tokenizer_name`, else of the model; of bytes for a model from scratch."""
    name = values["tokenizer_name"] or values["model_name_or_path"]
    return byte_tokenizer() if name is None else AutoTokenizer.from_pretrained(resolve(name))


def token_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What a model from scratch has to know of its tokenizer; nothing for a pretrained one, which knows."""
    if values["model_config"] is None:
        return {}
    special = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer), **special}


def lora_config(args: LoraArguments, task_type: str) -> LoraConfig:
    """peft's configuration.

    Args:
        task_type: a `peft.TaskType`; of a classifier the head is trained in full.
    """
    targets = args.lora_target_modules
    return LoraConfig(
        task_type=task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        # peft keeps "all-linear" off the head of a sequence classifier, but not of a token classifier.
        exclude_modules=["classifier", "score"] if task_type == TaskType.TOKEN_CLS else None,
    )


# --- a run ---


def measured_run(
    trainer: Trainer, timer: StepTimer, values: dict[str, Any], metric: str, **facts: Any
) -> dict[str, Any] | None:
    """Evaluates, trains, evaluates, saves; the results at worker 0, None at the others.

    Args:
        trainer: of any method.
        values: the value of every key.
        metric: what tells how good the model is: "loss", or what `compute_metrics` calls it.
        facts: further results, known already.
    """
    args = trainer.args
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
    gather = gather_lsam if asynchronous else gather_data_parallel
    measured = gather(trainer, timer, metric)
    trainer.save_model()
    if args.process_index != 0:
        return None

    key = f"eval_{metric}"
    trainable = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    evaluated += [entry for entry in trainer.state.log_history if key in entry]
    before = evaluated[0]
    curves = {**measured.pop("curves"), key: [[entry["step"], entry[key]] for entry in evaluated]}
    seconds = training.metrics["train_runtime"]
    if not asynchronous:
        seconds -= before["eval_runtime"]  # Trainer's clock starts before `eval_on_start`
    return {
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
        **measured,
        "bytes_data_parallel": data_parallel_bytes(measured["steps_per_worker"], trainable),
        **provenance(),
        "configuration": without_secrets(values),
        "curves": curves,
    }


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration, tokens blanked."""
    return {key: f"<{key}>" if key.endswith("_token") and value else value for key, value in values.items()}


def gather_lsam(trainer: LSAMTrainer, timer: StepTimer, metric: str) -> dict[str, Any] | None:
    """What the workers measured, in the order of ranks, at worker 0; None at the others."""
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
    """As `gather_lsam`; what only LSAM has is None, and the loss is the workers' mean."""
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
    """A script: the command line in, a run, its results as a table out.

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
