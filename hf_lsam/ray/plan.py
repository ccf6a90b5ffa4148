"""What is to run on a cluster, and whether it can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from .cluster import Needs
from .servers import SNAPSHOT

FOLDER = "ray"  # in the run's folder: logs, the secret, what is kept of the root


@dataclass(frozen=True)
class Plan:
    """What is to run.

    Args:
        words: the user's script and its arguments, what follows `python`.
        num_workers: as many as there are to be.
        run_dir: folder that all nodes share, the `output_dir` of the script.
        min_workers: none starts before there is room for as many; with fewer the run goes on and says so.
        needs: what a worker takes of its node.
        max_restarts: how often another worker may take a number whose worker has ended, its node being alive.
        resume: go on from the anchor that `run_dir` keeps, if it does.
        shared_memory_dir: where each node exchanges vectors.
        report_seconds: between two lines about each worker.
    """

    words: Sequence[str]
    num_workers: int
    run_dir: Path
    min_workers: int = 1
    needs: Needs = field(default_factory=Needs)
    max_restarts: int = 3
    resume: bool = False
    shared_memory_dir: Path = Path("/dev/shm")
    report_seconds: float = 30.0

    def check(self) -> None:
        """
        Raises:
            ValueError: if it cannot be.
        """
        if not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers must be from 1 to num_workers, got min_workers={self.min_workers} and "
                f"num_workers={self.num_workers}."
            )
        if self.needs.cpus <= 0 or not 0 <= self.needs.gpus <= 1:
            raise ValueError(
                f"A worker takes some CPU and at most one GPU, on which it trains, got {self.needs}. Use "
                "gpus_per_worker=0 to train on CPU, a fraction to share a GPU, and more workers for more GPUs."
            )
        if not self.words:
            raise ValueError("There is no script to run: name it after `--`, with its arguments.")
        if not self.words[0].startswith("-") and not Path(self.words[0]).exists():
            raise ValueError(
                f"There is no script {self.words[0]} here, in {Path.cwd()}, which is where the workers start. Start "
                "from its folder, or send it along: ray job submit --working-dir."
            )
        if not self.resume and (self.run_dir / FOLDER / "root" / SNAPSHOT).exists():
            raise ValueError(
                f"{self.run_dir} keeps the anchor of a run, and a new run would write over it. Go on with it "
                "(--resume), or choose another folder."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, this process is the only driver of `run_dir`, on this machine and where file locks cross the network.

        Raises:
            RuntimeError: if another one is.
        """
        folder = self.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / "driver.lock").acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"Another driver keeps the run of {self.run_dir}: two would place its workers twice. Wait for its end, "
                "or choose another folder."
            ) from None
        with lock:
            yield
