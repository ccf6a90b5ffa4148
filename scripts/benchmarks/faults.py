"""How a worker is affected by another one's death, and how soon the server notices it.

    python scripts/benchmarks/faults.py --output benchmarks/faults.json

Two external workers of a server that was started manually, one thread each. One makes local steps without a pause
(matrix products, the coupling, an exchange every 4 steps). The other does the same until it is killed with SIGKILL; a
new one takes its place, and so on. In between, an unrelated process multiplies as many matrices, so that the machine is
as loaded after a kill as before. Reported over the kills:

1. seconds from the kill until the server has dropped the worker,
2. the survivor's median step in the time between a kill and the next join, divided by its median step in an equally
   long time before; and its slowest step in each of the two, divided by the median before.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
from torch import nn

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.coupling import couple_and_accumulate
from hf_lsam.identity import Identity
from hf_lsam.run import Run
from hf_lsam.server.lifetime import run_server
from hf_lsam.transport.ownership import is_served
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark
from scripts.stress.chaos import processes

NAME = "faults"  # of benchmarks/faults.json
SYNC_STEPS = 4
SIDE = 256  # size of the matrices that a step multiplies
GONE = re.compile(r"^(\d+\.\d+) worker \d+ is gone", re.MULTILINE)


def serve(run_dir: Path, log: Path) -> None:
    """The body of the server process; its log begins each line with the time, in seconds."""
    logging.basicConfig(filename=log, level=logging.INFO, format="%(created).6f %(message)s", force=True)
    run_server(run_dir, idle_timeout=60.0)


def work(run_dir: Path, numel: int, pipe: Connection) -> None:
    """The body of a worker: announces that it has joined, steps until it is told to end, and reports (time, seconds) of
    each step."""
    torch.set_num_threads(1)
    x = nn.Parameter(torch.zeros(numel))
    matrix = torch.randn(SIDE, SIDE)
    run = Run(Identity(), run_dir, run_dir / "log", str(run_dir))
    steps = []
    try:
        worker = run.join([("x", x)], WorkerSettings(SYNC_STEPS), ServerSettings(SYNC_STEPS))
        pipe.send("joined")
        while not pipe.poll():
            begin = time.perf_counter()
            for _ in range(4):
                matrix @ matrix
            worker.after_optimizer_step([0.1])
            steps.append((time.time(), time.perf_counter() - begin))
        worker.finish()
    finally:
        run.leave()
    pipe.send(steps)


def multiply(begin: Event, numel: int) -> None:
    """The body of the process that keeps the machine busy while `begin` is set."""
    torch.set_num_threads(1)
    x, y, total = (torch.zeros(numel) for _ in range(3))
    matrix = torch.randn(SIDE, SIDE)
    while True:
        begin.wait()
        for _ in range(4):
            matrix @ matrix
        couple_and_accumulate([x], [y], [total], 0.1)


def measure(kills: int, seconds: float, numel: int, quiet: bool) -> dict:
    """Kills `kills` workers next to one that keeps going; returns what that one and the server's log say about it."""
    with tempfile.TemporaryDirectory(prefix="hf_lsam-bench-", dir="/dev/shm") as scratch:
        folder, log = Path(scratch) / "run", Path(scratch) / "log"
        server = processes.Process(target=serve, args=(folder, log))
        server.start()
        while not is_served(folder):
            time.sleep(0.01)

        def start() -> tuple[processes.Process, Connection]:
            near, far = processes.Pipe()
            worker = processes.Process(target=work, args=(folder, numel, far))
            worker.start()
            near.recv()
            return worker, near

        idle_core = processes.Event()
        processes.Process(target=multiply, args=(idle_core, numel), daemon=True).start()
        survivor, pipe = start()
        killed = []
        for _ in track(range(kills), "kills", quiet):
            idle_core.clear()
            victim, _ = start()
            time.sleep(seconds)
            killed.append(time.time())
            os.kill(victim.pid, signal.SIGKILL)
            idle_core.set()
            victim.join()
            time.sleep(seconds)
        pipe.send("end")
        steps = pipe.recv()
        survivor.join()
        server.terminate()
        server.join()
        dropped = [float(match) for match in GONE.findall(log.read_text())]
    rows = []
    for at, gone in zip(killed, dropped, strict=True):
        before = [taken for when, taken in steps if at - seconds < when <= at]
        after = [taken for when, taken in steps if at < when <= at + seconds]
        usual = statistics.median(before)
        rows.append(
            {
                "drop_s": gone - at,
                "median_step_s": usual,
                "ratio": statistics.median(after) / usual,
                "slowest_before": max(before) / usual,
                "slowest_after": max(after) / usual,
            }
        )
    return {"kills": rows, "n": len(rows)}


def table(results: dict) -> str:
    kills = results["kills"]

    def median(key: str) -> float:
        return statistics.median(kill[key] for kill in kills)

    drops = [kill["drop_s"] for kill in kills]
    rows = [
        ("from SIGKILL of a worker until it is dropped", f"{median('drop_s'):.3f} s, at most {max(drops):.3f} s"),
        ("another worker's median step after the kill, of that before", f"{median('ratio'):.3f} x"),
        ("its slowest step before the kill, of the median", f"{median('slowest_before'):.2f} x"),
        ("its slowest step after the kill, of the median before", f"{median('slowest_after'):.2f} x"),
    ]
    return markdown_table(["what", "median over the kills", "n"], [[*row, str(len(kills))] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1.0, help="measured before each kill, and after it")
    parser.add_argument("--numel", type=int, default=1_000_000, help="parameters of a worker, float32")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    arguments = parser.parse_args()
    torch.optim.SGD([torch.zeros(1)])  # loads what every forked process would otherwise have to load
    results = measure(arguments.kills, arguments.seconds, arguments.numel, arguments.quiet)
    print(table(results))
    parameters = {
        "numel": arguments.numel,
        "seconds": arguments.seconds,
        "sync_steps": SYNC_STEPS,
        "threads_per_worker": 1,
    }
    write_benchmark(arguments.output, NAME, parameters, results)


if __name__ == "__main__":
    main()
