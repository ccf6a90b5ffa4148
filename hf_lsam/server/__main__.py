"""`python -m hf_lsam.server --run_dir DIR`: the server process of one run."""

import argparse
import logging
from pathlib import Path

from .process import run_server

parser = argparse.ArgumentParser(prog="python -m hf_lsam.server", description="Aggregates the anchor of one LSAM run.")
parser.add_argument("--run_dir", type=Path, required=True, help="run folder that the first worker has prepared")
parser.add_argument("--resume", type=Path, help="server snapshot (safetensors) to continue from")
arguments = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
run_server(arguments.run_dir, arguments.resume)
