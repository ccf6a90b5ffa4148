"""How fast a server takes pushes, compared with a plain copy of the same bytes.

    python scripts/benchmarks/server.py --output benchmarks/server.json

k sender processes push vectors to a server process (`python -m hf_lsam.server`) through shared memory, as workers do,
without a pause between pushes. Within one run these windows alternate:

    copy        one thread copies a vector from one buffer to another while everything else is idle: the yardstick
    end to end  senders write their vector into the mailbox, push it and wait for the reply, as a worker would
    absorb      the mailboxes are already full and are pushed again and again: the server's work alone
    sum         the same, but each push claims to cover one step: a period takes 16 times as many pushes, so what
                remains is checking and adding, with almost no moving and publishing of the anchor

Absorbed bytes are those of accepted pushes. In "end to end" and "absorb" a push covers tau steps, as a worker's does:
every k-th push completes a period, so with one sender each push moves the anchor and publishes it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from hf_lsam.algorithms import ServerSettings
from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.lifetime import start_server
from hf_lsam.transport.mailbox import FLOAT_BYTES, RunFolder
from hf_lsam.transport.shared_memory import SharedMemoryLink
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark

NAME = "server"  # of benchmarks/server.json
SYNC_STEPS = 16
VECTOR = "vector"  # file in the run folder with the vector that all senders push
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["scripts.benchmarks.server"])  # so that senders share its imports, and their memory
MODES = ("end to end", "absorb", "sum")
MARGIN = 0.2  # share of a window, at its beginning, that is not counted


def layout_of(numel: int) -> ParameterLayout:
    return ParameterLayout([("vector", torch.empty(numel, device="meta"))])


def schedule(rounds: int) -> list[str]:
    """What each window of a run is for."""
    return ["copy", *MODES] * rounds


def send(run_dir: Path, worker: int, rounds: int, seconds: float, pipe: Connection) -> None:
    """One sender process: announces that it has joined, receives the time at which the first window begins, and reports
    at the end.

    The report is the time at which each push was acknowledged, on the monotonic clock, which the processes of a machine
    share.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run_dir)
    # One file for all senders: another vector for each mailbox would not fit on a small machine.
    vector = torch.from_file(str(run_dir / VECTOR), shared=True, size=folder.numel)
    link = SharedMemoryLink(folder, worker, layout_of(folder.numel), torch.device("cpu"))
    assert link.mailbox is not None  # the server has welcomed it
    link.mailbox.copy_(vector)
    accepted = []
    pipe.send("ready")
    end = pipe.recv()
    for mode in schedule(rounds):
        begin, end = end, end + seconds
        time.sleep(max(0.0, begin - time.monotonic()))
        while mode != "copy" and time.monotonic() < end:
            if mode == "end to end":
                link.push(vector, SYNC_STEPS, 0)
            else:
                link.push(link.mailbox, SYNC_STEPS if mode == "absorb" else 1, 0)  # the vector is there already
            link.settle()
            accepted.append(time.monotonic())
    if link.status.refused:
        raise RuntimeError(f"the server refused {link.status.refused} pushes of sender {worker}")
    link.finish(False, -1, link.mailbox)  # nobody needs the mailbox any longer, so the anchor may be written there
    link.close()
    pipe.send(accepted)


def serve(senders: int, megabytes: float, rounds: int, seconds: float, shared_memory_dir: str) -> dict[str, list]:
    """One run: a fresh server, `senders` processes, `rounds` rounds of windows.

    Returns:
        for each window, in order: bytes per second and, except for "copy", the pushes counted.
    """
    numel = int(megabytes * 1e6 / FLOAT_BYTES)
    path = Path(tempfile.mkdtemp(prefix="hf_lsam-", dir=shared_memory_dir))
    run = {"fingerprint": layout_of(numel).fingerprint.hex(), "settings": ServerSettings(SYNC_STEPS).as_dict()}
    folder = RunFolder.create(path, torch.zeros(numel), senders, layout_of(numel).manifest, run)
    torch.from_file(str(path / VECTOR), shared=True, size=numel).fill_(1e-3)
    server, sending, pipes = None, [], []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        try:
            server = start_server(path, log)
            for worker in range(senders):
                pipe, theirs = CONTEXT.Pipe()
                pipes.append(pipe)
                sending.append(CONTEXT.Process(target=send, args=(path, worker, rounds, seconds, theirs)))
                sending[-1].start()
                theirs.close()
            copies = {}
            try:
                for pipe in pipes:
                    pipe.recv()
                start = time.monotonic() + 0.5
                for pipe in pipes:
                    pipe.send(start)
                for window, mode in enumerate(schedule(rounds)):
                    if mode == "copy":
                        begin = start + window * seconds
                        time.sleep(max(0.0, begin + MARGIN * seconds - time.monotonic()))
                        copies[window] = copy_speed(numel, begin + seconds)
                accepted = sorted(moment for pipe in pipes for moment in pipe.recv())
            except EOFError:
                raise RuntimeError(f"a sender failed (see above); the server's log:\n{log.read_text()}") from None
            for process in sending:
                process.join()
            server.wait(timeout=30)
        finally:
            for process in sending:
                process.kill()
                process.join()
            if server is not None:
                server.kill()
                server.wait()
            folder.remove()
    results: dict[str, list] = {mode: [] for mode in ("copy", *MODES)}
    for window, mode in enumerate(schedule(rounds)):
        if mode == "copy":
            results[mode].append({"bytes_per_s": copies[window]})
            continue
        begin, end = start + (window + MARGIN) * seconds, start + (window + 1) * seconds
        # From one acknowledgement to another, so that no push is counted in part.
        moments = [moment for moment in accepted if begin <= moment <= end]
        if len(moments) < 3:
            raise ValueError(f"{len(moments)} pushes of {megabytes:g} MB in {end - begin:.1f} s: raise --seconds.")
        pushes = len(moments) - 1
        speed = pushes * numel * FLOAT_BYTES / (moments[-1] - moments[0])
        results[mode].append({"bytes_per_s": speed, "pushes": pushes})
    return results


def copy_speed(numel: int, end: float) -> float:
    """Bytes per second of a plain copy by one thread: the median over repetitions until `end` (monotonic clock)."""
    torch.set_num_threads(1)
    source, target = torch.full((numel,), 1.0), torch.zeros(numel)
    target.copy_(source)
    times = []
    while time.monotonic() < end or not times:
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return source.nbytes / statistics.median(times)


def require_room(shared_memory_dir: str, senders: int, megabytes: float) -> None:
    """Raises OSError if the vectors of the largest run do not fit."""
    needed = (senders + 3) * megabytes * 1e6
    free = shutil.disk_usage(shared_memory_dir).free
    if free < needed:
        raise OSError(
            f"{shared_memory_dir} has {free / 1e6:.0f} MB free; {senders} senders of {megabytes:g} MB, what they "
            f"push and two copies of the anchor need {needed / 1e6:.0f} MB. Enlarge it (`mount -o remount,size=...`), "
            "pass --shared_memory_dir, or fewer --senders."
        )


def measure(arguments: argparse.Namespace) -> list[dict]:
    """One row per vector size, number of senders and mode; ratios are taken within a round, then their median."""
    rows = []
    for megabytes, senders in track([*product(arguments.megabytes, arguments.senders)], "settings", arguments.quiet):
        results = serve(senders, megabytes, arguments.rounds, arguments.seconds, arguments.shared_memory_dir)
        copies = [result["bytes_per_s"] for result in results["copy"]]
        for mode in MODES:
            speeds = [result["bytes_per_s"] for result in results[mode]]
            ratios = [speed / copy for speed, copy in zip(speeds, copies, strict=True)]
            rows.append(
                {
                    "megabytes": megabytes,
                    "senders": senders,
                    "mode": mode,
                    "n": len(speeds),
                    "pushes": sum(result["pushes"] for result in results[mode]),
                    "median_bytes_per_s": statistics.median(speeds),
                    "median_copy_bytes_per_s": statistics.median(copies),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    cells = {(row["megabytes"], row["senders"], row["mode"]): row for row in rows}
    lines = []
    for megabytes, senders in dict.fromkeys((row["megabytes"], row["senders"]) for row in rows):
        modes = [cells[megabytes, senders, mode] for mode in MODES]
        speeds = [f"{row['median_bytes_per_s'] / 1e9:.2f} GB/s, {row['ratio']:.2f}" for row in modes]
        for i, row in enumerate(modes):
            if "ratio_before" in row:
                speeds[i] += f" (before: {row['ratio_before']:.2f})"
        copy = f"{modes[0]['median_copy_bytes_per_s'] / 1e9:.2f} GB/s"
        lines.append([f"{megabytes:g} MB", str(senders), copy, *speeds])
    return markdown_table(["vector", "senders", "plain copy", *MODES], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[90.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind, in turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    parser.add_argument("--shared_memory_dir", default="/dev/shm")
    parser.add_argument("--before", type=Path, help="what this script wrote on an earlier commit, to stand beside")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    arguments = parser.parse_args()
    require_room(arguments.shared_memory_dir, max(arguments.senders), max(arguments.megabytes))
    rows = measure(arguments)
    before = {} if arguments.before is None else json.loads(arguments.before.read_text())
    for row in rows:
        for old in before.get("results", ()):
            if all(row[key] == old[key] for key in ("megabytes", "senders", "mode")):
                row["ratio_before"] = old["ratio"]
    print(table(rows))
    parameters = {
        "senders": arguments.senders,
        "megabytes": arguments.megabytes,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "server": ServerSettings(SYNC_STEPS).as_dict(),
        **({"before": before["provenance"]["commit"]} if before else {}),
    }
    write_benchmark(arguments.output, NAME, parameters, rows)


if __name__ == "__main__":
    main()
