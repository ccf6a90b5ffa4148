"""Does the server leak? Workers join and are killed for as long as you like; its memory and descriptors must stay flat.

    python scripts/stress/soak.py --minutes 10

Eight small workers train with one server; every few seconds one is killed and another joins. Prints JSON: the server's
resident memory and open descriptors at every sample, and their change from the first third of the run to the last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import psutil
import torch

from recipes.common.progress import Progress, add_quiet
from scripts.stress.chaos import Cluster

WORKERS, ENDLESS = 8, 10**9
MEMORY_GROWTH, DESCRIPTOR_GROWTH = 2.0, 1.0  # MiB and descriptors, from the first third to the last


def soak(minutes: float, every: float, seed: int, progress: Progress) -> dict:
    """Runs the test; returns the samples and the conclusions from them."""
    generator = random.Random(seed)
    samples: list[dict] = []
    killed = 0
    with tempfile.TemporaryDirectory(prefix="hf_lsam-soak-") as scratch:
        cluster = Cluster(Path(scratch) / "run", Path(scratch) / "log")
        try:
            for _ in range(WORKERS):
                cluster.start_worker(steps=ENDLESS)
            server = psutil.Process(cluster.server.pid)
            begin = time.monotonic()
            next_kill, end = begin + every, begin + 60 * minutes
            while (now := time.monotonic()) < end:
                cluster.look_after(0.2)
                if now < next_kill:
                    continue
                progress.advance((now - next_kill + every) / 60)
                next_kill = now + every
                victim = generator.choice(list(cluster.workers.values()))
                victim.kill()
                killed += 1
                cluster.start_worker(steps=ENDLESS)
                samples.append(
                    {
                        "seconds": round(now - begin, 1),
                        "resident_mib": round(server.memory_info().rss / 2**20, 2),
                        "descriptors": server.num_fds(),
                        "mailboxes": len(list(cluster.folder.glob("mailbox_*"))),
                    }
                )
            restarts = cluster.restarts
        finally:
            cluster.kill_all()
    third = max(1, len(samples) // 3)

    def growth(name: str) -> float:
        return round(mean(s[name] for s in samples[-third:]) - mean(s[name] for s in samples[:third]), 2)

    report = {
        "minutes": minutes,
        "workers": WORKERS,
        "killed": killed,
        "server_restarts": restarts,
        "resident_mib_growth": growth("resident_mib"),
        "descriptor_growth": growth("descriptors"),
        "most_mailboxes": max(s["mailboxes"] for s in samples),
        "samples": samples,
    }
    flat = report["resident_mib_growth"] <= MEMORY_GROWTH and report["descriptor_growth"] <= DESCRIPTOR_GROWTH
    return {"flat": flat and not restarts, **report}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    add_quiet(parser)
    arguments = parser.parse_args()
    torch.optim.SGD([torch.zeros(1)])  # loads what the forked server would otherwise load, which would look like growth
    with Progress(arguments.minutes, "minutes", arguments.quiet) as progress:
        report = soak(arguments.minutes, arguments.every, arguments.seed, progress)
    print(json.dumps(report))
    return int(not report["flat"])


if __name__ == "__main__":
    sys.exit(main())
