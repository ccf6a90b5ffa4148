"""Whether a slow worker slows a fast one: LSAM against plain DDP.

    python scripts/benchmarks/asynchrony.py --output benchmarks/async.json

Two workers fine-tune MiniLM on CPU, one thread each, started through `accelerate launch`, first with LSAMTrainer, then
with Trainer (DDP). Worker 1 is slowed down in two of three kinds of block, which alternate within a run, so that the
machine's noise affects all equally:

    free    no pause
    sleep   after each step, worker 1 sleeps for 1.5 times as long as one of its steps takes without a pause
    busy    the same pause, spent on forward and backward passes of a spare model

Worker 0's step is compared with its own step in free blocks. Workers share caches and memory, so a sleeping neighbour
can make worker 0 faster, which would hide waiting. In busy blocks worker 1 is just as slow, but the machine is as
loaded as in free ones. A step lasts from one `on_step_begin` to the next. LSAM's workers are not in lock step, so their
blocks are spans of time, and steps that cross the end of a block are left out; DDP's are, and their blocks are counted
in steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.files import write_atomically
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.benchmarks.step import LEARNING_RATE, MODEL_PACKAGE, RHO, SYNC_STEPS, SyntheticTokens, load_minilm
from scripts.common.benchmark import write_benchmark
from scripts.common.launches import launch

NAME = "async"  # of benchmarks/async.json
KINDS = ("free", "sleep", "busy")
METHODS = ("lsam", "ddp")
PAUSE = 1.5  # worker 1's pause, in units of its own step
UNCOUNTED = 1  # steps at the beginning of a run that only warm up


class Blocks(TrainerCallback):
    """Pauses worker 1 in its blocks, and records in which kind of block each step of this worker was.

    Args:
        rank: rank of this worker.
        warmup: steps before the first block; the pause is 1.5 times their median.
        rounds: how often the blocks free, sleep and busy are repeated.
        block: length of a block: a number of steps or, with `clock`, of seconds.
        clock: a file by which the workers agree on when the first block begins, or None to count steps.
        spare: the model that is trained during a busy pause.
        batch: one batch for it.
    """

    def __init__(
        self, rank: int, warmup: int, rounds: int, block: float, clock: Path | None, spare: nn.Module, batch: dict
    ):
        self._rank, self._warmup, self._clock = rank, warmup, clock
        self._kinds = KINDS * rounds
        self._block = block
        self._spare, self._batch = spare, batch
        self._start: float | None = None
        self._begin: tuple[float, int | None] | None = None
        self._free: list[float] = []
        self.steps: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.monotonic()
        block = self._block_at(now, state.global_step)
        if self._begin is not None:
            begin, before = self._begin
            if before is None and state.global_step > UNCOUNTED:
                self._free.append(now - begin)
            # In lock step, a step belongs to the block in which it began; otherwise it must lie entirely in one block.
            if before is not None and before < len(self._kinds) and (self._clock is None or before == block):
                self.steps[self._kinds[before]].append(now - begin)
        self._begin = (now, block)

    def on_step_end(self, args, state, control, **kwargs):
        block = self._begin[1]
        if self._clock is not None:
            self._agree(state.global_step)
            if (self._block_at(time.monotonic(), state.global_step) or 0) >= len(self._kinds):
                control.should_training_stop = True
        if self._rank == 1 and block is not None and block < len(self._kinds) and self._kinds[block] != "free":
            self._pause(PAUSE * statistics.median(self._free), busy=self._kinds[block] == "busy")

    def _block_at(self, now: float, step: int) -> int | None:
        if self._clock is None:
            return None if step < self._warmup else int((step - self._warmup) // self._block)
        return None if self._start is None or now < self._start else int((now - self._start) // self._block)

    def _agree(self, step: int) -> None:
        """Announces that this worker has warmed up; the first block begins once both have."""
        if self._start is not None:
            return
        mine, other = (self._clock.with_suffix(f".{rank}") for rank in (self._rank, 1 - self._rank))
        if step >= self._warmup and not mine.exists():
            write_atomically(mine, str(time.monotonic()))
        if mine.exists() and other.exists():
            self._start = max(float(mine.read_text()), float(other.read_text()))

    def _pause(self, seconds: float, busy: bool) -> None:
        end = time.monotonic() + seconds
        while busy and time.monotonic() < end:
            self._spare(**self._batch).loss.backward()
            self._spare.zero_grad()
        time.sleep(max(0.0, end - time.monotonic()))


def work(arguments: argparse.Namespace) -> None:
    """What each of the two processes does."""
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    lsam = arguments.worker == "lsam"
    steps = arguments.warmup + len(KINDS) * arguments.rounds * arguments.block_steps + 1
    options = {
        "output_dir": str(arguments.folder),
        "use_cpu": True,
        "max_steps": 10**6 if lsam else steps,
        "per_device_train_batch_size": arguments.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    data = SyntheticTokens(64 * arguments.batch, arguments.length)
    batch = {
        name: torch.stack([row[name] for row in map(data.__getitem__, range(arguments.batch))]) for name in data[0]
    }
    if lsam:
        args = LSAMConfig(sam_rho=RHO, sync_steps=SYNC_STEPS, num_workers=2, **options)
        trainer = LSAMTrainer(model=load_minilm(), args=args, train_dataset=data)
        clock = arguments.folder / "clock"
    else:
        args = TrainingArguments(ddp_backend="gloo", ddp_find_unused_parameters=False, **options)
        trainer = Trainer(model=load_minilm(), args=args, train_dataset=data)
        clock = None
    block = arguments.block_seconds if lsam else arguments.block_steps
    blocks = Blocks(rank, arguments.warmup, arguments.rounds, block, clock, load_minilm().train(), batch)
    trainer.add_callback(blocks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    report = {"steps": blocks.steps, "exchange": trainer.worker_summary() if lsam else None}
    (arguments.folder / f"worker_{rank}.json").write_text(json.dumps(report))


def measure(method: str, arguments: argparse.Namespace) -> list[dict]:
    """Runs two workers; returns the measurements of both."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--worker", method, "--folder", folder]
        for name in ("batch", "length", "warmup", "rounds", "block_steps", "block_seconds"):
            options += [f"--{name}", str(getattr(arguments, name))]
        launch(2, __file__, options)
        return [json.loads((Path(folder) / f"worker_{rank}.json").read_text()) for rank in (0, 1)]


def summarize(method: str, reports: list[dict]) -> list[dict]:
    """One row per kind of block."""
    rows = []
    for kind in KINDS:
        row = {"method": method, "worker_1": kind}
        for rank, report in enumerate(reports):
            steps, free = report["steps"][kind], report["steps"]["free"]
            if not steps or not free:
                raise ValueError(f"worker {rank} made no whole step in a block: lengthen the blocks or add rounds.")
            median = statistics.median(steps)
            row[f"worker_{rank}_n"] = len(steps)
            row[f"worker_{rank}_median_step_s"] = median
            row[f"worker_{rank}_ratio"] = median / statistics.median(free)
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    header = ["method", "worker 1", "worker 1's step", "worker 0's step", "of its free step", "n"]
    return markdown_table(
        header,
        [
            [
                row["method"],
                row["worker_1"],
                f"{row['worker_1_median_step_s'] * 1e3:.0f} ms",
                f"{row['worker_0_median_step_s'] * 1e3:.0f} ms",
                f"{row['worker_0_ratio']:.3f}",
                str(row["worker_0_n"]),
            ]
            for row in rows
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="of each worker")
    parser.add_argument("--length", type=int, default=64, help="tokens an example")
    parser.add_argument("--warmup", type=int, default=6, help="steps before the first block")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of each kind")
    parser.add_argument("--block_seconds", type=float, default=12.0, help="length of a block of LSAM")
    parser.add_argument("--block_steps", type=int, default=6, help="length of a block of DDP")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)  # what the launched processes are given
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    if arguments.warmup < UNCOUNTED + 2:
        parser.error(f"--warmup must be at least {UNCOUNTED + 2}: the pause is set by the steps in it")
    reports = {method: measure(method, arguments) for method in track(METHODS, "methods", arguments.quiet)}
    rows = [row for method in METHODS for row in summarize(method, reports[method])]
    print(table(rows))
    names = ("batch", "length", "warmup", "rounds", "block_seconds", "block_steps")
    parameters = {
        "model": MODEL_PACKAGE,
        "sync_steps": SYNC_STEPS,
        "pause_in_steps": PAUSE,
        "threads_per_worker": 1,
        **{name: getattr(arguments, name) for name in names},
    }
    write_benchmark(
        arguments.output, NAME, parameters, rows, lsam_workers=[report["exchange"] for report in reports["lsam"]]
    )


if __name__ == "__main__":
    main()
