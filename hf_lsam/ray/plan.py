"""What is to run on a cluster, and whether it can run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from .cluster import Needs
from .servers import SNAPSHOT

FOLDER = "ray"  # in the run's folder: logs, the secret, the saved state of the root


@dataclass(frozen=True)
class Plan:
    """What is to run.

    Args:
        words: the user's script and its arguments: what follows `python`.
        num_workers: how many workers to run, as far as there is room.
        run_dir: folder that all nodes share, the `output_dir` of the script.
        min_workers: no worker starts before there is room for this many; if fewer run later, the run continues and
            logs a warning.
        needs: the resources that a worker takes on its node.
        max_restarts: how often another worker may take over a number whose worker has ended while its node was alive.
        resume: continue from the anchor that `run_dir` keeps, if there is one.
        shared_memory_dir: where each node exchanges vectors.
        report_seconds: seconds between two log lines about each worker.
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
        """Checks that this can run from here.

        Raises:
            ValueError: if it cannot.
        """
        if not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers must be from 1 to num_workers, got min_workers={self.min_workers} and "
                f"num_workers={self.num_workers}."
            )
        if self.needs.cpus <= 0 or not 0 <= self.needs.gpus <= 1:
            raise ValueError(
                f"A worker needs some CPU and at most one GPU, got {self.needs}. Use gpus_per_worker=0 to train "
                "on CPU, a fraction to share a GPU, and more workers for more GPUs."
            )
        if not self.words:
            raise ValueError("There is no script to run: name it after `--`, with its arguments.")
        if not self.words[0].startswith("-") and not Path(self.words[0]).exists():
            raise ValueError(
                f"There is no script {self.words[0]} in {Path.cwd()}, where the workers start. Start from its "
                "folder, or upload it with ray job submit --working-dir."
            )
        if not self.resume and (self.run_dir / FOLDER / "root" / SNAPSHOT).exists():
            raise ValueError(
                f"{self.run_dir} holds the anchor of another run, which a new run would overwrite. Continue that "
                "run (--resume), or choose another folder."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Makes this process the only driver of `run_dir` inside the `with` block: on this machine, and on others as
        far as file locks cross the network.

        Raises:
            RuntimeError: if another process is its driver.
        """
        folder = self.run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(folder / "driver.lock").acquire(timeout=0)
        except Timeout:
            raise RuntimeError(
                f"Another driver is running {self.run_dir}, and a second one would start its workers twice. Wait "
                "until it has ended, or choose another folder."
            ) from None
        with lock:
            yield
