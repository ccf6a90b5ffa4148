"""Does a run take as long as its simulation says, and end with the same error?

    python scripts/experiments/confirm_simulation.py --dataset parquet \\
        --train_file train.parquet --eval_file test.parquet

Two processes with one thread each, started by the launcher, and a server train what simulate_images.py trains; the
processes share the steps of the run. Where worker 1 is slow, it sleeps after each step for as long as the step took. A
preceding run measures how long a step of each worker takes, which is all that the virtual clock is given.
`--output_dir` receives confirmed.json and confirmed.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hf_lsam import LSAM
from hf_lsam.files import write_atomically
from hf_lsam.identity import Identity
from recipes.common.configuration import parse_configuration
from recipes.common.image_data import ImageDataArguments
from recipes.common.progress import add_quiet, track
from recipes.common.results import REPOSITORY, provenance, write_json
from recipes.common.tables import markdown_table, mean_and_spread
from scripts.common.launches import launch
from scripts.experiments.simulate_images import SHORT, SMALL_IMAGES, Run, Task, loss_of, simulate

METHOD = {"lsam": {"exchange_bits": 32}}  # within a machine, vectors are float32
PACES = {"alike": False, "worker 1 at half speed": True}  # whether it sleeps
CALIBRATION_SEED = 100


def train(run: Run, data: str, slow: bool, folder: Path) -> dict[str, Any]:
    """One worker's part of a run.

    Args:
        run, data: see `simulate_images.Task`.
        slow: whether worker 1 sleeps.
        folder: for the server's log.

    Returns:
        `begin` and `end` on the machine's monotonic clock, the number of `steps`, `step_seconds` (their mean), and the
        anchor's `error` at worker 0.
    """
    torch.set_num_threads(1)
    rank, task = Identity.from_environment().rank, Task(run, data)
    model, optimizer = task.model, task.optimizer(list(task.model.parameters()))
    steps = 0
    with LSAM(model, optimizer, sam_rho=0.0, share_steps=True, max_steps=run.steps, output_dir=folder) as lsam:
        schedule = lsam.schedule(task.scheduler(optimizer))
        begin = now = time.monotonic()
        for batch in lsam.batches(task.stream(rank)):
            lsam.step(lambda batch=batch: loss_of(model, batch))
            schedule.step()
            if slow and rank == 1:
                time.sleep(time.monotonic() - now)
            now = time.monotonic()
            steps += 1
    errors = task.errors(model) if rank == 0 else {}
    return {"begin": begin, "end": now, "steps": steps, "step_seconds": (now - begin) / steps, **errors}


def in_processes(runs: Sequence[tuple[Run, bool]], data: str, quiet: bool) -> list[list[dict[str, Any]]]:
    """What both workers return for each run, with or without a slow worker; all runs share one launch."""
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder, "plan.json")
        plan.write_text(json.dumps({"runs": [(asdict(run), slow) for run, slow in runs], "data": data}))
        launch(2, __file__, ["--plan", str(plan), *(["--quiet"] if quiet else [])])
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]


def work(plan: Path, quiet: bool) -> None:
    """What each of the two processes does."""
    planned, rank = json.loads(plan.read_text()), Identity.from_environment().rank
    runs = planned["runs"] if rank else track(planned["runs"], "runs in processes", quiet)
    made = [train(Run(**fields), planned["data"], slow, plan.parent) for fields, slow in runs]
    plan.with_name(f"{rank}.json").write_text(json.dumps(made))


def compare(run: Run, seeds: int, data: str, quiet: bool) -> list[dict[str, Any]]:
    """Pairs of a run in processes and its simulation, for all paces and seeds."""
    plans = [(replace(run, seed=seed), slow) for slow in PACES.values() for seed in (CALIBRATION_SEED, *range(seeds))]
    workers = in_processes(plans, data, quiet)
    pairs, machines = [], []
    for (planned, slow), *parts in track([*zip(plans, *workers, strict=True)], "simulations", quiet):
        if planned.seed == CALIBRATION_SEED:
            machines = [{"step_seconds": part["step_seconds"]} for part in parts]
            continue
        planned = replace(planned, machines=machines)
        point = simulate(planned, data, METHOD)["points"][-1]
        pairs.append(
            {
                "run": asdict(planned),
                "pace": next(name for name, sleeps in PACES.items() if sleeps == slow),
                "seconds": max(part["end"] for part in parts) - min(part["begin"] for part in parts),
                "steps": [part["steps"] for part in parts],
                "error": parts[0]["error"],
                "simulated": {"seconds": point["virtual_seconds"], "error": point["error"]},
                **provenance(),
            }
        )
    return pairs


def table(pairs: Sequence[dict[str, Any]]) -> str:
    """One line per pace: processes against simulation, over seeds."""
    rows = []
    for pace in PACES:
        own = [pair for pair in pairs if pair["pace"] == pace]
        ratios = [pair["simulated"]["seconds"] / pair["seconds"] for pair in own]
        rows.append(
            (
                pace,
                " and ".join(f"{statistics.fmean(pair['steps'][rank] for pair in own):.0f}" for rank in (0, 1)),
                f"{mean_and_spread([pair['seconds'] for pair in own], 1)} s",
                f"{mean_and_spread([pair['simulated']['seconds'] for pair in own], 1)} s",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{mean_and_spread([pair['error'] for pair in own], 1)} %",
                f"{mean_and_spread([pair['simulated']['error'] for pair in own], 1)} %",
            )
        )
    header = ("two workers", "steps", "time", "simulated", "ratio", "error", "simulated")
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quiet(parser)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=SHORT, help="of the run, for each worker")
    parser.add_argument("--learning_rate", type=float, default=0.1)
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "runs/simulate_images/tables")
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # what the launched processes are given
    arguments, words = parser.parse_known_args()
    if arguments.plan is not None:
        work(arguments.plan, arguments.quiet)
        return
    data = json.dumps(parse_configuration((ImageDataArguments,), [*SMALL_IMAGES, *words]))
    run = Run("LSAM without SAM", arguments.steps, arguments.learning_rate, machines=[{}, {}])
    pairs = compare(run, arguments.seeds, data, arguments.quiet)
    write_json(arguments.output_dir / "confirmed.json", {"experiment": "confirmed", "runs": pairs})
    write_atomically(arguments.output_dir / "confirmed.md", table(pairs) + "\n")
    print(table(pairs))


if __name__ == "__main__":
    main()
