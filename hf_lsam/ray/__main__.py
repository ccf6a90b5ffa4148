"""`python -m hf_lsam.ray --num_workers N --run_dir DIR -- script.py ...`: trains on a Ray cluster.

The script is the one that `accelerate launch` would start, and its `output_dir` is DIR, a folder that all nodes share.
Under `ray job submit`, the same command runs the supervisor on the cluster as well.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .supervisor import launch

parser = argparse.ArgumentParser(
    prog="python -m hf_lsam.ray",
    description="Trains with LSAM on a Ray cluster: places workers, and starts again what dies.",
    usage="%(prog)s [options] -- script.py [arguments of the script]",
)
parser.add_argument(
    "--address", default="auto", help="HOST:PORT of the cluster's head; auto: RAY_ADDRESS, or here; local"
)
parser.add_argument("--num_workers", type=int, help="as many as the cluster has room for, at most these")
parser.add_argument("--min_workers", type=int, default=1, help="none starts before there is room for as many")
parser.add_argument("--gpus_per_worker", type=float, default=1.0, help="0 trains on CPU, a fraction shares a GPU")
parser.add_argument("--cpus_per_worker", type=float, default=1.0, help="Ray sets OMP_NUM_THREADS to it")
parser.add_argument("--run_dir", type=Path, help="output_dir of the script, which all nodes share")
parser.add_argument("--max_restarts", type=int, default=3, help="of each worker; those of lost nodes do not count")
parser.add_argument("--resume", action="store_true", help="go on from the anchor that run_dir keeps, if it does")
parser.add_argument(
    "--shared_memory_dir", type=Path, default=Path("/dev/shm"), help="where each node exchanges vectors"
)
parser.add_argument("--report_seconds", type=float, default=30.0, help="between two lines about each worker")


def parse(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The options by name, and the words after `--`."""
    end = words.index("--") if "--" in words else len(words)
    return vars(parser.parse_args(words[:end])), list(words[end + 1 :])


if __name__ == "__main__":
    options, script = parse(sys.argv[1:])
    if options["num_workers"] is None or options["run_dir"] is None:
        parser.error("--num_workers and --run_dir are needed: how many workers, and the output_dir of the script")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        launch(script, **options)
    except (RuntimeError, ValueError) as error:
        sys.exit(str(error))
