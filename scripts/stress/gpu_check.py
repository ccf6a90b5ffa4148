"""Checks that need a GPU. Run it with scripts/stress/gpu_check.sh; it needs no network and no data. The checks, without
the measurement of what a step costs, are also tests: `pytest -m gpu`.

Exit status: 0 if every check holds, 1 if one does not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, PrinterCallback, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer, sam
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.identity import Identity
from hf_lsam.parameters import trainable_parameters
from hf_lsam.transport.mailbox import FLOAT_BYTES
from recipes.common.results import provenance
from recipes.common.tables import markdown_table
from scripts.benchmarks.step import SYNC_STEPS, SyntheticTokens, make_trainer, served_run
from scripts.common.launches import launch_command

# Small enough for the exchange to fit in the 64 MB of shared memory that containers often have.
SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
BASE_SHAPE = (32, 128)  # batch, tokens
VARIANTS = ("plain", "lsam", "lsam quarter", "lsam server")


def bert(dropout: float = 0.0, **sizes) -> nn.Module:
    """A BERT with random weights, the same at every call; without `sizes` it is BERT-base, 109 M parameters."""
    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)
    return BertForSequenceClassification(config)


class EasyTokens(Dataset):
    """The first token determines the label, which a small model learns within a few dozen steps. No attention mask."""

    def __init__(self, rows: int, length: int = 32):
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(10, SMALL["vocab_size"], (rows, length), generator=generator)
        self._labels = torch.randint(0, 2, (rows,), generator=generator)
        self._tokens[:, 0] = 2 + self._labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._labels[index]}


def config(folder: str, steps: int, **options) -> LSAMConfig:
    quiet = {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    defaults = {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    return LSAMConfig(output_dir=folder, max_steps=steps, **{**quiet, **defaults, **options})


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


# --- fp16 with a gradient scaler ---


class OverflowTrainer(LSAMTrainer):
    """Makes one step overflow under fp16 scaling, and records every loss."""

    overflow_at = 10

    def __init__(self, *positional, **keywords):
        super().__init__(*positional, **keywords)
        self.losses: list[Tensor] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * 1e38 if self.state.global_step == self.overflow_at else loss


class SkipObserver(TrainerCallback):
    """Compares x, the running sum and the step count around the step that overflows."""

    def __init__(self, trainer: OverflowTrainer):
        self._trainer = trainer
        self.unchanged: dict[str, bool] = {}
        self.moved_later = False
        self.scales: list[float] = []

    def _state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._trainer.worker.state_tensors().items()}

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self._state()
        self.scales.append(self._trainer.accelerator.scaler.get_scale())

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - 1
        after = self._state()
        same = {name: torch.equal(value, after[name]) for name, value in self._before.items()}
        if done == self._trainer.overflow_at:
            self.unchanged = same
        if done > self._trainer.overflow_at + 1:
            self.moved_later = self.moved_later or not same["parameters"]


def check_fp16() -> str:
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, 80, fp16=True, sam_rho=0.05, sync_steps=4)
        trainer = OverflowTrainer(model=bert(**SMALL), args=args, train_dataset=EasyTokens(4096))
        observer = SkipObserver(trainer)
        trainer.add_callback(observer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    at = trainer.overflow_at
    losses = [loss.item() for step, loss in enumerate(trainer.losses) if step != at]
    first, last = statistics.mean(losses[:5]), statistics.mean(losses[-5:])
    require(all(observer.unchanged.values()), f"the skipped step changed the worker: {observer.unchanged}")
    require(observer.scales[at + 1] == observer.scales[at] / 2, f"the scale did not halve: {observer.scales}")
    require(observer.moved_later, "training did not go on after the skipped step")
    require(last < 0.5 * first, f"the loss did not fall: {first:.3f} to {last:.3f}")
    return f"skipped step left x, sum and counters untouched; loss {first:.3f} to {last:.3f}"


# --- device pinning: two workers share the available GPUs ---


def work(folder: Path) -> None:
    """What each process of the pinning check does."""
    rank = int(os.environ["RANK"])
    args = config(str(folder), 100, num_workers=2, sync_steps=4)
    trainer = LSAMTrainer(model=bert(**SMALL), args=args, train_dataset=EasyTokens(8192))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()])
    report = {
        "current_device": torch.cuda.current_device(),
        "model_device": weights.device.index,
        "anchor_device": trainer.worker.anchor.device.index,
        "group": torch.distributed.is_initialized(),
        "digest": hashlib.sha256(weights.cpu().numpy().tobytes()).hexdigest(),
        "allocated": [torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())],
        **trainer.worker_summary(),
    }
    (folder / f"report_{rank}.json").write_text(json.dumps(report))


def check_pinning() -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch_command(2), __file__, "--work", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
        require(run.returncode == 0, f"the launch failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        reports = [json.loads((Path(folder) / f"report_{rank}.json").read_text()) for rank in (0, 1)]
    gpus = torch.cuda.device_count()
    for rank, report in enumerate(reports):
        devices = [report["current_device"], report["model_device"], report["anchor_device"]]
        require(devices == [rank % gpus] * 3, f"worker {rank} is on {devices}, not on GPU {rank % gpus}")
        others = [held for index, held in enumerate(report["allocated"]) if index != rank % gpus]
        require(not any(others), f"worker {rank} holds memory on other GPUs: {others}")
        require(not report["group"], f"worker {rank} has a default process group")
        require(report["pushes"] > 0, f"worker {rank} pushed nothing")
    require(reports[0]["digest"] == reports[1]["digest"], "the workers ended with different anchors")
    pushes = ", ".join(str(report["pushes"]) for report in reports)
    return f"2 workers on {gpus} GPU(s), each on its own or sharing; {pushes} pushes; same final anchor, bit for bit"


# --- the exchange in parallel with the training stream ---


@contextmanager
def synchronising_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_side_stream() -> str:
    model = bert(**SMALL).cuda()
    named = trainable_parameters(model)
    parameters = [parameter for _, parameter in named]
    settings = ServerSettings(sync_steps=4)
    pulls = pushes = compared_pushes = compared_pulls = 0
    with tempfile.TemporaryDirectory() as scratch:
        run = served_run(Identity(), Path("/dev/shm"), Path(scratch) / "server.log")
        try:
            worker = run.join(named, WorkerSettings(sync_steps=4), settings)
            link, folder = worker.link, run.transport.folder
            require(len(link.outgoing.pinned) == 1, "the mailbox is not pinned")
            require(len(link.incoming.pinned) == 2, "the anchor slots are not pinned")
            sent: list[Tensor] = []
            push = link.push

            def noted_push(total: Tensor, steps: int, version: int, loss: float) -> None:
                sent.append(total.clone())
                push(total, steps, version, loss)

            link.push = noted_push
            mailbox = link.mailbox
            worker.adopt_anchor()
            rates = [1e-3] * len(named)
            for step in range(400):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                version, sent_before = worker.version, len(sent)
                with synchronising_is_an_error():
                    moved = sam.perturb(parameters, 0.05)
                    for parameter in parameters:
                        parameter.grad = torch.randn_like(parameter)
                    sam.restore(moved)
                    torch._foreach_add_([p.detach() for p in parameters], [p.grad for p in parameters], alpha=-rates[0])
                    worker.after_optimizer_step(rates)
                pushes += len(sent) > sent_before
                pulls += worker.version > version
                # The mailbox keeps a push until the next is written, never in the second step of a period.
                if sent and step % 4 == 1:
                    link.outgoing.wait()
                    require(torch.equal(mailbox, sent[-1].cpu()), f"push {len(sent)} arrived changed")
                    compared_pushes += 1
                if worker.version > version:
                    held = worker.anchor.cpu()
                    published = folder.slot(worker.version).clone()
                    if folder.is_whole(worker.version):
                        require(torch.equal(held, published), f"anchor {worker.version} arrived changed")
                        compared_pulls += 1
                sent = sent[-1:]
                time.sleep(0.001)
            worker.finish()
        finally:
            run.leave()
    require(pushes >= 10 and pulls >= 10, f"only {pushes} pushes and {pulls} pulls in 400 steps")
    require(compared_pulls > 0 and compared_pushes > 0, "nothing could be compared")
    return (
        f"400 steps without a synchronisation; {pushes} pushes ({compared_pushes} compared), {pulls} anchors "
        f"({compared_pulls} compared), all bit for bit"
    )


class SyncCounter(TrainerCallback):
    """Counts synchronising CUDA calls from the beginning of step `first` to the beginning of the last."""

    def __init__(self, first: int, last: int):
        self._first, self._last = first, last

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._first:
            torch.cuda.set_sync_debug_mode("warn")
        elif state.global_step == self._last:
            torch.cuda.set_sync_debug_mode("default")


@contextmanager
def counted_synchronisations() -> Iterator[list]:
    """Collects one warning for each synchronising CUDA call made while the debug mode is "warn"."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        torch.cuda.set_sync_debug_mode("default")
        caught[:] = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]


def synchronisations_per_step(variant: str) -> float:
    first, last = 4, 4 + 2 * SYNC_STEPS
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(variant, bert(**SMALL), (32, 32), last + 2, folder, use_cpu=False)
        trainer.train_dataset = EasyTokens(32 * (last + 4))
        trainer.add_callback(SyncCounter(first, last))
        with counted_synchronisations() as caught:
            trainer.train()
    return len(caught) / (last - first)


def synchronisations_per_pass() -> int:
    """The number of synchronising calls in a forward-backward pass of the model alone."""
    model = bert(**SMALL).cuda()
    rows = [EasyTokens(32)[index] for index in range(32)]
    batch = {name: torch.stack([row[name] for row in rows]).cuda() for name in rows[0]}
    model(**batch).loss.backward()
    with counted_synchronisations() as caught:
        torch.cuda.set_sync_debug_mode("warn")
        model(**batch).loss.backward()
    return len(caught)


def check_synchronisations() -> str:
    counts = {variant: synchronisations_per_step(variant) for variant in ("plain", "lsam", "lsam server")}
    per_pass = synchronisations_per_pass()
    text = ", ".join(f"{variant} {count:.3f}" for variant, count in counts.items()) + f"; a pass {per_pass}"
    require(counts["plain"] > 0, "no synchronisation was seen in a plain step either: the count does not work")
    allowed = counts["plain"] + per_pass  # SAM makes one more pass
    require(counts["lsam server"] <= allowed, f"LSAM synchronises more often a step: {text}")
    # A lone worker has the server in its process, which reads back once per period whether the push was finite.
    require(counts["lsam"] <= allowed + 1 / SYNC_STEPS, f"LSAM alone synchronises more often a step: {text}")
    return f"host-device synchronisations a step: {text}"


# --- torch.compile ---


def update_of(compiled: bool) -> Tensor:
    """How two LSAM steps with SGD move the parameters, float32 [d]."""
    model = bert(**SMALL)
    before = torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])
    with tempfile.TemporaryDirectory() as folder:
        args = config(folder, 2, torch_compile=compiled, optim="sgd", learning_rate=0.1, sync_steps=1)
        trainer = LSAMTrainer(model=model, args=args, train_dataset=EasyTokens(256))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    after = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return after.cpu() - before


def check_compile() -> str:
    eager, compiled = update_of(False), update_of(True)
    require(eager.norm().item() > 0, "two eager steps moved nothing")
    difference = (compiled - eager).norm().item() / eager.norm().item()
    require(difference < 1e-3, f"two compiled steps differ from eager ones by {difference:.1e} of their length")
    return f"two steps differ from eager by {difference:.1e} of their length"


# --- what it costs ---


class GpuStepTime(TrainerCallback):
    """Mean seconds per step, from the beginning of step `first` to that of step `last`, including the GPU's work."""

    def __init__(self, first: int, last: int):
        self._first, self._last = first, last
        self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in (self._first, self._last):
            torch.cuda.synchronize()
            if state.global_step == self._first:
                self._begin = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self._begin) / (self._last - self._first)


def measure_costs(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds per step and peak allocated bytes of each variant, in turns: BERT-base, bf16 autocast, AdamW."""
    weights = bert(dropout=0.1)
    variants = list(VARIANTS)
    needed = 3 * FLOAT_BYTES * sum(parameter.numel() for parameter in weights.parameters())
    if shutil.disk_usage("/dev/shm").free < needed:
        print(f"/dev/shm has less than {needed / 1e6:.0f} MB free: `lsam server` is left out", file=sys.stderr)
        variants.remove("lsam server")
    costs: dict[str, dict[str, list[float]]] = {variant: {"step_s": [], "peak_bytes": []} for variant in variants}
    first, last = 8, 8 + 32
    for _ in range(rounds):
        for variant, cost in costs.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            with tempfile.TemporaryDirectory() as folder:
                model = copy.deepcopy(weights)
                trainer = make_trainer(variant, model, BASE_SHAPE, last + 2, folder, use_cpu=False, bf16=True)
                trainer.train_dataset = SyntheticTokens(BASE_SHAPE[0] * (last + 4), BASE_SHAPE[1])
                timer = GpuStepTime(first, last)
                trainer.add_callback(timer)
                trainer.train()
            cost["step_s"].append(timer.seconds)
            cost["peak_bytes"].append(torch.cuda.max_memory_allocated())
            del trainer, model
    return costs


def summarize_costs(costs: dict[str, dict[str, list[float]]]) -> list[dict]:
    rows = []
    for variant, cost in costs.items():
        plain = costs["plain"]
        ratios = [ours / theirs for ours, theirs in zip(cost["step_s"], plain["step_s"], strict=True)]
        peak = statistics.median(cost["peak_bytes"])
        rows.append(
            {
                "variant": variant,
                "n": len(ratios),
                "median_step_s": statistics.median(cost["step_s"]),
                "ratio": statistics.median(ratios),
                "peak_bytes": peak,
                "peak_ratio": peak / statistics.median(plain["peak_bytes"]),
            }
        )
    return rows


CHECKS: dict[str, Callable[[], str]] = {
    "fp16 with a scaler": check_fp16,
    "device pinning": check_pinning,
    "side-stream copies": check_side_stream,
    "synchronisations": check_synchronisations,
    "torch.compile": check_compile,
}


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device is available here, so nothing can be checked.", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the step and memory ratios")
    parser.add_argument("--only", nargs="+", choices=[*CHECKS, "costs"], default=[*CHECKS, "costs"])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # what the launched workers are given
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work)
        return 0
    results = []
    for name, check in CHECKS.items():
        if name not in arguments.only:
            continue
        try:
            results.append({"check": name, "holds": True, "seen": check()})
        except Exception as error:  # a failing check must not hide the results of the others
            traceback.print_exc()
            results.append({"check": name, "holds": False, "seen": f"{type(error).__name__}: {error}"})
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    rows = [[row["check"], "yes" if row["holds"] else "NO", row["seen"].splitlines()[0]] for row in results]
    print(markdown_table(["check", "holds", "seen"], rows))
    costs = summarize_costs(measure_costs(arguments.rounds)) if "costs" in arguments.only else []
    if costs:
        print("\nBERT-base, bf16 autocast, AdamW, batch 32 of 128 tokens\n")
        rows = [
            [
                row["variant"],
                f"{row['median_step_s'] * 1e3:.1f} ms",
                f"{row['ratio']:.3f}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
                f"{row['peak_ratio']:.2f}",
            ]
            for row in costs
        ]
        print(markdown_table(["variant", "median step", "of plain", "peak memory", "of plain"], rows))
    if arguments.output is not None:
        report = {
            "benchmark": "gpu",
            "command": " ".join(["scripts/stress/gpu_check.sh", *sys.argv[1:]]),
            "provenance": provenance(),
            "parameters": {"rounds": arguments.rounds, "batch": BASE_SHAPE[0], "length": BASE_SHAPE[1]},
            "checks": results,
            "results": costs,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(row["holds"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
