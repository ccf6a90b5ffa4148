"""What LSAM costs an image loop.

    python scripts/benchmarks/images.py --output benchmarks/images.json

ResNet-20, SGD with momentum, random images, channels last. Two questions:

1. A step of a lone `LSAM` worker, which has two forward-backward passes, against two steps of a plain PyTorch loop. The
   loops alternate, a few steps each, in several processes one after the other, because the places that malloc happens
   to choose favour one loop or the other by several per cent for as long as a process lives. The median over processes
   of each one's median over rounds is reported: once with glibc's malloc as it is, which returns the memory of a pass
   to the system and takes it back page by page, and once told to keep it, for both loops.
2. Images per second of two workers: two independent LSAM processes, two workers of one LSAM run with its server, and
   two processes of data-parallel SAM. These alternate too; each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from hf_lsam import LSAM, vision
from hf_lsam.identity import Identity
from recipes.cifar10_resnet20.methods import Asynchronous, DataParallel
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark
from scripts.common.launches import launch

NAME = "images"  # of benchmarks/images.json
RHO, SYNC_STEPS, LEARNING_RATE, MOMENTUM = 0.1, 16, 0.1, 0.9
LSAM_FIELDS = {"sam_rho": RHO, "sync_steps": SYNC_STEPS}
ALLOCATORS = {
    "default": {},
    "keeping": {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 30)},  # bytes
}
KINDS = {
    "independent": "two LSAM processes, nothing shared",
    "lsam": "two workers of one LSAM run",
    "sam": "data-parallel SAM, two processes",
}


def problem(batch: int):
    torch.manual_seed(0)
    model = vision.resnet20().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return model, optimizer, images, torch.randint(0, 10, (batch,))


def step_ratios(batch: int, rounds: int, steps: int) -> dict:
    """Medians over rounds: seconds per step of both loops, and the ratio of an LSAM step to two plain ones."""
    model, optimizer, images, labels = problem(batch)
    other, other_optimizer, *_ = problem(batch)
    seconds: dict[str, list[float]] = {"plain": [], "lsam": []}
    ratios = []

    def plain() -> None:
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    lsam = LSAM(other, other_optimizer, **LSAM_FIELDS)
    with lsam:
        for number in range(rounds + 1):
            medians = {}
            for name, step in (
                ("plain", plain),
                ("lsam", lambda: lsam.step(lambda: cross_entropy(other(images), labels))),
            ):
                taken = []
                for _ in range(steps * (2 if name == "plain" else 1)):
                    begin = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - begin)
                medians[name] = statistics.median(taken)
            if number:  # the first round warms up
                for name, median in medians.items():
                    seconds[name].append(median)
                ratios.append(medians["lsam"] / (2 * medians["plain"]))
    return {
        "plain_step_s": statistics.median(seconds["plain"]),
        "lsam_step_s": statistics.median(seconds["lsam"]),
        "ratio": statistics.median(ratios),
    }


def work(kind: str, batch: int, steps: int, folder: Path) -> float:
    """Images per second of this process, over its steps after a warm-up of one period."""
    torch.set_num_threads(1)
    model, optimizer, images, labels = problem(batch)
    fields = {**LSAM_FIELDS, "sam_eps": 1e-12, "sam_adaptive": False, "batchnorm_statistics": "reestimate"}
    if kind == "sam":
        method = DataParallel(model, optimizer, Identity.from_environment(), fields, ascent_sync=False)
    else:
        method = Asynchronous(model, optimizer, LSAM_FIELDS, folder)
    with method:
        for step in range(SYNC_STEPS + steps):
            if step == SYNC_STEPS:
                begin = time.perf_counter()
            method.step(lambda: cross_entropy(method.forward(images), labels), RHO)
        return steps * batch / (time.perf_counter() - begin)


def step_cost(allocator: str, batch: int, rounds: int, steps: int) -> dict:
    """`step_ratios` in a new process, because malloc reads its settings when a process starts."""
    with tempfile.NamedTemporaryFile() as file:
        command = [sys.executable, str(Path(__file__).resolve()), "--work", "step", "--batch", str(batch)]
        command += ["--rounds", str(rounds), "--steps", str(steps), "--output", file.name]
        subprocess.run(command, env={**os.environ, **ALLOCATORS[allocator]}, check=True)
        return json.load(file)


def over_processes(allocator: str, costs: list[dict]) -> dict:
    """The medians over processes of what `step_ratios` returned in each."""
    medians = {key: statistics.median(cost[key] for cost in costs) for key in ("plain_step_s", "lsam_step_s", "ratio")}
    return {"allocator": allocator, **medians, "ratios": [cost["ratio"] for cost in costs], "n": len(costs)}


def throughput(kind: str, batch: int, steps: int) -> float:
    """Images per second of two processes together."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).resolve())
        options = ["--work", kind, "--batch", str(batch), "--steps", str(steps), "--output", folder]
        if kind == "independent":
            several = [subprocess.Popen([sys.executable, script, *options]) for _ in range(2)]
            if any(process.wait() for process in several):
                raise RuntimeError(f"a process of {kind} failed; its error stands above")
        else:
            launch(2, script, options)
        return sum(float(path.read_text()) for path in Path(folder).iterdir() if path.suffix == ".rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8, help="in which the step's cost is measured")
    parser.add_argument("--rounds", type=int, default=3, help="of such a process")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a loop in a round")
    parser.add_argument("--throughput_rounds", type=int, default=4)
    parser.add_argument("--throughput_steps", type=int, default=64)
    parser.add_argument(
        "--work", choices=["step", *KINDS], help=argparse.SUPPRESS
    )  # what a process of `throughput` is told
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    arguments = parser.parse_args()
    if arguments.work == "step":
        arguments.output.write_text(json.dumps(step_ratios(arguments.batch, arguments.rounds, arguments.steps)))
        return
    if arguments.work:
        rate = work(arguments.work, arguments.batch, arguments.steps, arguments.output)
        with tempfile.NamedTemporaryFile("w", suffix=".rate", dir=arguments.output, delete=False) as file:
            file.write(str(rate))
        return
    costs: dict[str, list[dict]] = {allocator: [] for allocator in ALLOCATORS}
    for _, allocator in track([*product(range(arguments.processes), ALLOCATORS)], "step costs", arguments.quiet):
        costs[allocator].append(step_cost(allocator, arguments.batch, arguments.rounds, arguments.steps))
    steps = [over_processes(allocator, several) for allocator, several in costs.items()]
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _, kind in track([*product(range(arguments.throughput_rounds), KINDS)], "throughput rounds", arguments.quiet):
        rates[kind].append(throughput(kind, arguments.batch, arguments.throughput_steps))
    rows = []
    for kind, label in KINDS.items():
        ratios = [own / alone for own, alone in zip(rates[kind], rates["independent"], strict=True)]
        rows.append(
            {
                "kind": kind,
                "label": label,
                "images_per_second": statistics.median(rates[kind]),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "n": len(ratios),
            }
        )
    results = {"step": steps, "throughput": rows}
    print(table(results))
    parameters = {
        "model": "resnet20, 32x32",
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "throughput_steps": arguments.throughput_steps,
        "threads": torch.get_num_threads(),
        **LSAM_FIELDS,
    }
    write_benchmark(arguments.output, NAME, parameters, results)


def table(results: dict) -> str:
    lines = []
    for row in results["step"]:
        measured = f"{row['lsam_step_s'] * 1e3:.0f} ms, {2 * row['plain_step_s'] * 1e3:.0f} ms"
        what = f"an LSAM step, two passes of a plain loop (malloc: {row['allocator']})"
        lines.append([what, measured, f"{row['ratio']:.3f}", str(row["n"])])
    for row in results["throughput"]:
        lines.append([row["label"], f"{row['images_per_second']:.0f} images/s", f"{row['ratio']:.3f}", str(row["n"])])
    return markdown_table(["what", "measured", "ratio", "n"], lines)


if __name__ == "__main__":
    main()
