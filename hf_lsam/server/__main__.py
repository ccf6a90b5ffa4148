"""`python -m hf_lsam.server --run_dir DIR`: the server process of one run.

By hand, in an empty or a new folder, it waits for workers that join it by `server_address=DIR`, as many as come and as
long as they stay. It ends on SIGTERM or Ctrl-C, or after `--idle_timeout` seconds without a worker, and keeps its last
snapshot; the same command with `--resume` goes on from there.
"""

import argparse
import logging
import sys
from pathlib import Path

from .process import run_server

parser = argparse.ArgumentParser(prog="python -m hf_lsam.server", description="Aggregates the anchor of one LSAM run.")
parser.add_argument("--run_dir", type=Path, required=True, help="run folder; new or empty for a run that others join")
parser.add_argument(
    "--resume",
    type=Path,
    nargs="?",
    const=True,
    help="go on from the folder's newest snapshot, or begin with the server state in this file",
)
parser.add_argument("--idle_timeout", type=float, default=600.0, help="seconds without a worker until it ends")
parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
arguments = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
try:
    run_server(arguments.run_dir, arguments.resume, idle_timeout=arguments.idle_timeout, parent=arguments.parent)
except RuntimeError as error:
    sys.exit(str(error))
