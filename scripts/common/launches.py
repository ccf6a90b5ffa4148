"""Many runs in few launches: finished runs are kept, and the others share the startup of their processes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from hf_lsam.identity import Identity
from recipes.common.progress import Progress
from scripts.common.names import names_of


def launch_command(processes: int) -> list[str]:
    """The command that starts a script in that many processes on this machine, without the script and its arguments."""
    if processes == 1:
        return [sys.executable]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    command += ["--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, "--main_process_port", "0"]


def launch(processes: int, script: str, arguments: Sequence[str]) -> None:
    """Runs a script in that many processes on this machine, and keeps their output out of the caller's own.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    subprocess.run([*launch_command(processes), script, *arguments], check=True, stdout=sys.stderr)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds the option that `finished` passes to the processes it starts; with it, a script calls `make_runs`."""
    parser.add_argument("--runs", type=Path, help=argparse.SUPPRESS)


def in_folders_of_their_own(runs: Sequence[dict[str, Any]], runs_dir: Path) -> list[dict[str, Any]]:
    """The runs' values, each with an `output_dir` in `runs_dir` named after all the others (see `names_of`)."""
    names = names_of([{key: value for key, value in run.items() if key != "output_dir"} for run in runs])
    return [{**run, "output_dir": str(runs_dir / name)} for run, name in zip(runs, names, strict=True)]


def finished(
    script: str, runs: Sequence[dict[str, Any]], quiet: bool, with_trainer: bool = False
) -> list[dict[str, Any]]:
    """The results of the runs, in their order; missing runs are made first.

    Args:
        script: the script to launch, with the option of `add_runs`.
        runs: for each run, the value of every key, including `output_dir`, which receives results.json, and
            `num_workers`.
        quiet: plain lines instead of a progress bar.
        with_trainer: whether the runs use Trainer. A process with Trainer is either an asynchronous worker or a member
            of a data-parallel group for as long as it lives, so one launch cannot make runs of both kinds.

    Raises:
        subprocess.CalledProcessError: if a run fails. Runs that finished before it are kept.
    """
    folders = [Path(values["output_dir"]) for values in runs]
    batches: dict[tuple[int, bool], dict[Path, dict[str, Any]]] = {}
    for folder, values in zip(folders, runs, strict=True):
        if not (folder / "results.json").exists():
            kind = (values["num_workers"], with_trainer and values["method"] == "lsam")
            batches.setdefault(kind, {})[folder] = values
    for (workers, _), batch in batches.items():
        several = list(batch.values())
        with tempfile.NamedTemporaryFile("w", suffix=".json") as plan:
            json.dump(several, plan)
            plan.flush()
            launch(workers, str(Path(script).resolve()), ["--runs", plan.name, *(["--quiet"] if quiet else [])])
    return [json.loads((folder / "results.json").read_text()) for folder in folders]


def make_runs(
    plan: Path, run: Callable[[dict[str, Any]], dict[str, Any] | None], quiet: bool, keep_model: bool = True
) -> None:
    """Makes runs one after the other, as one process of their launch; process 0 shows progress.

    Args:
        plan: the JSON file that `--runs` names.
        run: makes one run from the value of every key; returns its results at process 0, None at the others.
        quiet: plain lines instead of a progress bar.
        keep_model: whether to keep the weights that a run has saved; its results are always kept.
    """
    several = json.loads(plan.read_text())
    first = Identity.from_environment().rank == 0
    with Progress(len(several), "runs", quiet) if first else nullcontext() as progress:
        for values in several:
            results = run(values)
            if results is not None:
                reached = f"eval_{results['metric']}" if "metric" in results else "accuracy"
                progress.say(f"{values['method']}, seed {values['seed']}: {reached} {results[reached]:.4f}")
                progress.advance()
                for weights in () if keep_model else Path(values["output_dir"]).glob("*.safetensors"):
                    weights.unlink()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
