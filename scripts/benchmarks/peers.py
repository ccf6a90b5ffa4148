"""Two workers of hf_lsam against two workers of other methods that average, in one run.

    python scripts/benchmarks/peers.py --dataset parquet --train_file train.parquet --eval_file test.parquet \\
        --output benchmarks/peers.json

Contestants, with SAM's gradient or the plain one; those whose package is not installed are left out:

    ddp         torch's DistributedDataParallel over Gloo; with pytorch_optimizer's SAM, pass 1 is not reduced
    local sgd   accelerate's LocalSGD
    diloco      torchft's DiLoCo, with the outer step of its paper (arXiv 2311.08105): Nesterov, 0.7, momentum 0.9
    hf_lsam     `LSAM` as started by a launch of one or two machines, with its defaults except for the radius
    32 bits     the same with exchange_bits=32; on one machine vectors are float32 anyway

All have the same model, batches, optimizer, learning rate and number of steps. Methods that average periodically do so
every 4 steps, hf_lsam's default for two workers. A worker is a forked process with one thread. Each link is that of a
network namespace (which needs root and iproute2), and its bytes are those that the kernel has counted there.
`--parts` selects among:

    race       ResNet-20, CIFAR-10 at 16x16 pixels, SGD with momentum: the held-out loss over time, on this machine
               and over links
    links      MiniLM, 22.7 M parameters, AdamW, random tokens: the same without a loss
    straggler  the race on this machine; at each step, worker 1 sleeps for as long as a step of a lone process takes
    killed     worker 1 kills itself halfway (SIGKILL): what worker 0 does
    cut        the link of worker 1's machine goes silent halfway: what worker 0 does, for `--timeout` seconds

The time of a step is the median over periods of 4 steps, divided by 4, because most steps of a period exchange nothing.
It is compared with the same kind of step of a lone process in the same run. Two workers have two cores, so servers and
TLS take their time from them.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from recipes.common.image_data import ImageDataArguments, ImageSet, load_images
from recipes.common.progress import Progress, add_quiet
from recipes.common.tables import markdown_table
from scripts.benchmarks.contest.contestants import CONTESTANTS, PARTS, PERIOD, RHO, Contestant, DataParallel
from scripts.benchmarks.contest.processes import Job, Run, finish
from scripts.benchmarks.contest.tasks import WORKERS, Images, Sentences
from scripts.benchmarks.step import load_minilm
from scripts.common.benchmark import write_benchmark
from tests.netns import Machine, machines, why_not

NAME = "peers"  # of benchmarks/peers.json


def of_period(seconds: list[float]) -> float:
    """The time of a step: the median over periods of `PERIOD` steps, except the first, per step; if there are only few
    steps, their mean."""
    ends = seconds[PERIOD - 1 :: PERIOD]
    periods = [later - earlier for earlier, later in itertools.pairwise(ends)]
    return statistics.median(periods) / PERIOD if periods else seconds[-1] / len(seconds)


def measured(run: Run, printed: str, alone: float | None = None) -> dict[str, Any]:
    """The figures of a run without a fault.

    Args:
        printed: what its processes have printed, for errors.
        alone: seconds per step of a lone process.

    Raises:
        RuntimeError: if a worker failed.
    """
    reports = run.reports
    if any(report is None or "error" in report for report in reports):
        raise RuntimeError(f"{run.job.contestant.label} failed: {reports}\n{printed}")
    step = of_period(reports[0]["seconds"])
    return {
        "gradient": run.job.contestant.gradient,
        "contestant": run.job.contestant.label,
        "step_s": step,
        "ratio": step / (alone or step),
        "steps": [report["steps"] for report in reports],
        "sent_a_step": sum(report["sent"] for report in reports) / sum(report["steps"] for report in reports),
        "whole_s": max(report["whole_s"] for report in reports),
        "end_s": max(report["whole_s"] - report["seconds"][-1] for report in reports[:1]),
        "points": reports[0]["points"],
    }


def after_fault(run: Run, printed: str) -> dict[str, Any]:
    """What worker 0 did once worker 1 was gone."""
    at = run.steps[1][-1][1]
    before = [when for _, when in run.steps[0] if when <= at]
    after = [at, *(when for _, when in run.steps[0] if when > at)]
    report = run.reports[0]
    row = {
        "fault": run.job.fault,
        "contestant": run.job.contestant.label,
        "step_s": statistics.median(later - earlier for earlier, later in itertools.pairwise(before)),
        "steps_after": len(after) - 1,
        "longest_pause_s": max((later - earlier for earlier, later in itertools.pairwise(after)), default=0.0),
    }
    if report is None:
        return {**row, "outcome": "waits", "after_s": time.monotonic() - after[-1]}
    if "error" in report:
        return {**row, "outcome": "error", "after_s": report["at"] - after[-1], "error": report["error"]}
    return {**row, "outcome": "finished", "loss": report["points"][-1]["loss"]}


def seconds_to(loss: float, points: list[dict[str, Any]]) -> float | None:
    """The time at which a run's held-out loss first reached `loss`, interpolated linearly; None if it never did."""
    for number, point in enumerate(points):
        if point["loss"] <= loss:
            if number == 0:
                return point["s"]
            before = points[number - 1]
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return before["s"] + share * (point["s"] - before["s"])
    return None


class Measurement:
    """All parts of the script, one run after the other."""

    def __init__(self, arguments: argparse.Namespace, images: ImageSet):
        self._arguments, self._data = arguments, {Images: images, Sentences: load_minilm().train()}
        self._contestants = [
            each for each in CONTESTANTS if each.package is None or importlib.util.find_spec(each.package)
        ]
        self._alone: dict[tuple[type, bool], float] = {}
        self._undisturbed: dict[tuple[str, bool], dict[str, Any]] = {}  # races on this machine

    def of_part(self, part: str, on_links: bool = False) -> list[Contestant]:
        return [each for each in self._contestants if part in each.parts and (on_links or not each.on_links_only)]

    @property
    def rows(self) -> int:
        """The number of rows of all parts together."""
        parts, links = self._arguments.parts, len(self._arguments.megabits)
        on_links = sum(links * len(self.of_part(part, on_links=True)) for part in parts if part in ("race", "links"))
        return on_links + sum(len(self.of_part(part)) for part in parts)

    def of(self, part: str) -> Iterator[dict[str, Any]]:
        """The rows of a part."""
        return self.faults(part) if part in ("killed", "cut") else getattr(self, part)()

    def job(self, contestant: Contestant, task: type, **further: Any) -> Job:
        if task is Images:
            return Job(contestant, task, self._arguments.steps, self._arguments.batch, self._arguments.rate, **further)
        return Job(contestant, task, self._arguments.link_steps, 8, 2e-5, **further)

    def run(self, job: Job, hosts: list[Machine], workers: int = WORKERS) -> dict[str, Any]:
        alone = None if workers == 1 else self.alone(job.task, job.contestant.sam)
        run = Run(job, self._data[job.task], hosts, workers)
        (printed,) = finish([run])
        return measured(run, printed, alone)

    def alone(self, task: type, sam: bool) -> float:
        """Seconds per step of a lone process."""
        if (task, sam) not in self._alone:
            one = Contestant("one process", DataParallel, sam, fields={"sam": sam})
            job = self.job(one, task)
            self._alone[task, sam] = self.run(job, [], workers=1)["step_s"]
        return self._alone[task, sam]

    def over(self, part: str, task: type, points: int) -> Iterator[dict[str, Any]]:
        """The rows of the parts `race` and `links`."""
        for megabits in (None, *self._arguments.megabits):
            with ExitStack() as stack:
                hosts = stack.enter_context(machines(WORKERS)) if megabits else []
                for host in hosts:
                    host.throttle(megabits)
                for contestant in self.of_part(part, on_links=bool(megabits)):
                    row = self.run(self.job(contestant, task, points=points), hosts)
                    if part == "race" and not megabits:
                        self._undisturbed[contestant.label, contestant.sam] = row
                    yield {"megabits": megabits, **row}

    def race(self) -> Iterator[dict[str, Any]]:
        yield from self.over("race", Images, self._arguments.points)

    def links(self) -> Iterator[dict[str, Any]]:
        yield from self.over("links", Sentences, 0)

    def straggler(self) -> Iterator[dict[str, Any]]:
        for contestant in self.of_part("straggler"):
            without = self._undisturbed.get((contestant.label, contestant.sam))
            if without is None:
                without = self.run(self.job(contestant, Images, points=1), [])
            slowed = self.run(self.job(contestant, Images, points=1, pause=self.alone(Images, contestant.sam)), [])
            yield {
                **slowed,
                "without": without,
                "step_ratio": slowed["step_s"] / without["step_s"],
                "whole_ratio": slowed["whole_s"] / without["whole_s"],
            }

    def faults(self, fault: str) -> Iterator[dict[str, Any]]:
        """Runs all contestants at the same time, because most of the time is spent waiting."""
        contestants = self.of_part(fault)
        with ExitStack() as stack:
            hosts = stack.enter_context(machines(WORKERS * len(contestants))) if fault == "cut" else []
            runs = [
                Run(
                    self.job(contestant, Images, points=1, fault=fault),
                    self._data[Images],
                    hosts[WORKERS * number : WORKERS * (number + 1)],
                )
                for number, contestant in enumerate(contestants)
            ]
            for run, printed in zip(runs, finish(runs, self._arguments.timeout), strict=True):
                yield after_fault(run, printed)


def tables(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    def place(row: dict[str, Any]) -> str:
        return "this machine" if row["megabits"] is None else f"{row['megabits']:,} Mbit/s"

    def sent(row: dict[str, Any]) -> str:
        return "" if row["megabits"] is None else f"{row['sent_a_step'] / 1e6:.3g} MB"

    if rows := results.get("race"):
        worst = {
            kind: max(row["points"][-1]["loss"] for row in rows if row["gradient"] == kind)
            for kind in dict.fromkeys(row["gradient"] for row in rows)
        }
        lines = []
        for row in rows:
            last, first = row["points"][-1], seconds_to(worst[row["gradient"]], row["points"])
            lines.append(
                [
                    place(row),
                    row["gradient"],
                    row["contestant"],
                    f"{row['ratio']:.2f}",
                    sent(row),
                    f"{first:.1f} s",
                    f"{row['whole_s']:.1f} s",
                    f"{last['loss']:.3f}",
                    f"{100 * last['accuracy']:.1f} %",
                ]
            )
        reached = ", ".join(f"{loss:.3f} ({kind})" for kind, loss in worst.items())
        header = ["ResNet-20 over", "gradient", "contestant", "step, of one process's", "sent a step and worker"]
        header += [f"to the loss {reached}", "whole run", "held-out loss", "accuracy"]
        yield markdown_table(header, lines)
    if rows := results.get("links"):
        yield markdown_table(
            ["MiniLM over", "gradient", "contestant", "step, of one process's", "sent a step and worker", "end of run"],
            [
                [
                    place(row),
                    row["gradient"],
                    row["contestant"],
                    f"{row['ratio']:.2f}",
                    sent(row),
                    f"{row['end_s']:.1f} s",
                ]
                for row in rows
            ],
        )
    if rows := results.get("straggler"):
        yield markdown_table(
            [
                "beside a straggler",
                "gradient",
                "worker 0's step, of that without",
                "whole run, of that without",
                "loss",
            ],
            [
                [
                    row["contestant"],
                    row["gradient"],
                    f"{row['step_ratio']:.2f}",
                    f"{row['whole_ratio']:.2f}",
                    f"{row['points'][-1]['loss']:.3f}, without {row['without']['points'][-1]['loss']:.3f}",
                ]
                for row in rows
            ],
        )
    if rows := results.get("killed", []) + results.get("cut", []):
        # hf_lsam's worker 0 completes its steps and then waits for the other machine; the others wait within a step.
        said = {
            "finished": "goes on to the end; longest pause {longest_pause_s:.1f} s",
            "error": "ends with an error after {after_s:.1f} s: {error}",
            "waits": "makes {steps_after} more steps, and then waits: still after {after_s:.0f} s, when it was ended",
        }
        yield markdown_table(
            ["worker 1", "contestant", "worker 0"],
            [[row["fault"], row["contestant"], said[row["outcome"]].format(**row)] for row in rows],
        )


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    return "\n\n".join(tables(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(ImageDataArguments):
        if each.name in ("dataset", "data_dir", "train_file", "eval_file"):
            parser.add_argument(f"--{each.name}", default=each.default, help=each.metadata["help"])
    parser.add_argument("--train_images", type=int, default=7680)
    parser.add_argument("--eval_images", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--megabits", type=int, nargs="*", default=[1000, 100], help="a second, of the links")
    parser.add_argument("--steps", type=int, default=96, help="of the race, a worker")
    parser.add_argument("--link_steps", type=int, default=8, help="of MiniLM, a worker")
    parser.add_argument("--batch", type=int, default=32, help="of the race, a worker")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of the race, at its highest")
    parser.add_argument("--points", type=int, default=6, help="at which the race measures the loss")
    parser.add_argument("--timeout", type=float, default=75.0, help="seconds without a step before a run is ended")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    arguments = parser.parse_args()
    if (arguments.megabits or "cut" in arguments.parts) and (reason := why_not()):
        parser.error(f"--megabits and the part cut need networks of their own: {reason}. Leave both out.")
    torch.set_num_threads(1)  # before processes are forked
    data = {name: getattr(arguments, name) for name in ("dataset", "data_dir", "train_file", "eval_file")}
    images = load_images(
        ImageDataArguments(
            **data, image_size=16, max_train_images=arguments.train_images, max_eval_images=arguments.eval_images
        )
    )
    measurement = Measurement(arguments, images)
    names = ("megabits", "steps", "link_steps", "batch", "rate", "points", "timeout", "train_images", "eval_images")
    parameters = {
        **{name: getattr(arguments, name) for name in names},
        "sam_rho": RHO,
        "averages_every": PERIOD,
        "threads_per_worker": 1,
        **{each: version(each) for each in ("pytorch_optimizer", "torchft") if importlib.util.find_spec(each)},
    }
    results: dict[str, list[dict[str, Any]]] = {}
    with Progress(measurement.rows, "rows", arguments.quiet) as progress:
        for part in arguments.parts:
            results[part] = []
            for row in measurement.of(part):
                results[part].append(row)
                progress.advance()
            write_benchmark(arguments.output, NAME, parameters, results)  # so that an interruption keeps complete parts
    print(table(results))


if __name__ == "__main__":
    main()
