"""How fast a server takes pushes, against a plain copy of the same bytes.

    python scripts/benchmarks/server.py --output benchmarks/server.json

k sender processes push vectors to a server process (`python -m hf_lsam.server`) through shared memory, as workers do,
without a pause between pushes. Within one run these windows take turns:

    copy        one thread copies a vector from one buffer to another, all else idle: the yardstick
    end to end  senders write their vector into the mailbox, push it and wait for the reply, as a worker would
    absorb      the mailboxes are full already and are pushed again and again: the server's work alone
    sum         the same, each push said to cover one step: a period takes 16 times as many pushes, so what remains is
                checking and adding, and next to nothing of moving and publishing the anchor

Absorbed bytes are those of accepted pushes. In the first two a push covers tau steps, as a worker's does: every k-th
one completes a period, so with one sender each moves the anchor and publishes it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from hf_lsam.algorithms import ServerSettings
from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.lifetime import start_server
from hf_lsam.transport.mailbox import FLOAT_BYTES, RunFolder
from hf_lsam.transport.shared_memory import SharedMemoryLink
from recipes.common.progress import add_quiet, pairs, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark

NAME = "server"  # of benchmarks/server.json
SYNC_STEPS = 16
MODES = ("end to end", "absorb", "sum")
MARGIN = 0.2  # share of a window that is not counted, at its begin


def layout_of(numel: int) -> ParameterLayout:
    return ParameterLayout([("vector", torch.empty(numel, device="meta"))])


def schedule(rounds: int) -> list[str]:
    """What each window of a run is for."""
    return ["copy", *MODES] * rounds


def send(run_dir: Path, worker: int, rounds: int, seconds: float) -> list[float]:
    """What one sender process does: joins, says so on stdout, reads from stdin when the first window begins.

    Returns:
        when each push was acknowledged, on the monotonic clock, which the processes of a machine share.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run_dir)
    vector = torch.full((folder.numel,), 1e-3 * (worker + 1))
    link = SharedMemoryLink(folder, worker, layout_of(folder.numel), torch.device("cpu"))
    link._mailbox.copy_(vector)
    accepted = []
    print("ready", flush=True)
    end = float(sys.stdin.readline())
    for mode in schedule(rounds):
        begin, end = end, end + seconds
        time.sleep(max(0.0, begin - time.monotonic()))
        while mode != "copy" and time.monotonic() < end:
            if mode == "end to end":
                link.push(vector, SYNC_STEPS, 0)
            else:
                # What `push` does, less the copy into the mailbox.
                link._announce(SYNC_STEPS if mode == "absorb" else 1, 0)
            link.settle()
            accepted.append(time.monotonic())
    if link.status.refused:
        raise RuntimeError(f"the server refused {link.status.refused} pushes of sender {worker}")
    link.finish(False, -1, torch.empty_like(vector))
    link.close()
    return accepted


def serve(senders: int, megabytes: float, rounds: int, seconds: float, shared_memory_dir: str) -> dict[str, list]:
    """One run: a fresh server, `senders` processes, `rounds` rounds of windows.

    Returns:
        of each window, in turn: bytes a second, and for all but "copy" the pushes counted.
    """
    numel = int(megabytes * 1e6 / FLOAT_BYTES)
    path = Path(tempfile.mkdtemp(prefix="hf_lsam-", dir=shared_memory_dir))
    run = {"fingerprint": layout_of(numel).fingerprint.hex(), "settings": ServerSettings(SYNC_STEPS).as_dict()}
    folder = RunFolder.create(path, torch.zeros(numel), senders, layout_of(numel).manifest, run)
    command = [sys.executable, __file__, "--send", str(path), "--rounds", str(rounds), "--seconds", str(seconds)]
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        try:
            processes.append(start_server(path, log))
            for worker in range(senders):
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                processes.append(subprocess.Popen([*command, "--worker", str(worker)], **pipes))
            server, *sending = processes
            if any(process.stdout.readline() != "ready\n" for process in sending):
                raise RuntimeError(f"a sender did not start (see above); the server's log:\n{log.read_text()}")
            start = time.monotonic() + 0.5
            for process in sending:
                process.stdin.write(f"{start}\n")
                process.stdin.flush()
            copies = {}
            for window, mode in enumerate(schedule(rounds)):
                if mode == "copy":
                    begin = start + window * seconds
                    time.sleep(max(0.0, begin + MARGIN * seconds - time.monotonic()))
                    copies[window] = copy_speed(numel, begin + seconds)
            outputs = [process.communicate(timeout=120)[0] for process in sending]
            if any(process.returncode for process in sending):
                raise RuntimeError(f"a sender failed (see above); the server's log:\n{log.read_text()}")
            server.wait(timeout=30)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.communicate()
            folder.remove()
    accepted = sorted(moment for output in outputs for moment in json.loads(output))
    results: dict[str, list] = {mode: [] for mode in ("copy", *MODES)}
    for window, mode in enumerate(schedule(rounds)):
        if mode == "copy":
            results[mode].append({"bytes_per_s": copies[window]})
            continue
        begin, end = start + (window + MARGIN) * seconds, start + (window + 1) * seconds
        # From one acknowledgement to another: no push is counted in part.
        moments = [moment for moment in accepted if begin <= moment <= end]
        if len(moments) < 3:
            raise ValueError(f"{len(moments)} pushes of {megabytes:g} MB in {end - begin:.1f} s: raise --seconds.")
        pushes = len(moments) - 1
        speed = pushes * numel * FLOAT_BYTES / (moments[-1] - moments[0])
        results[mode].append({"bytes_per_s": speed, "pushes": pushes})
    return results


def copy_speed(numel: int, end: float) -> float:
    """Bytes a second of a plain copy by one thread: the median over repetitions until `end` (monotonic clock)."""
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
    needed = (senders + 2) * megabytes * 1e6
    free = shutil.disk_usage(shared_memory_dir).free
    if free < needed:
        raise OSError(
            f"{shared_memory_dir} has {free / 1e6:.0f} MB free; {senders} senders of {megabytes:g} MB and two copies "
            f"of the anchor need {needed / 1e6:.0f} MB. Enlarge it (`mount -o remount,size=...`), pass "
            "--shared_memory_dir, or fewer --senders."
        )


def measure(arguments: argparse.Namespace) -> list[dict]:
    """One row a vector size, number of senders and mode; ratios are taken within a round, then their median."""
    rows = []
    for megabytes, senders in track(pairs(arguments.megabytes, arguments.senders), "settings", arguments.quiet):
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
        copy = f"{modes[0]['median_copy_bytes_per_s'] / 1e9:.2f} GB/s"
        lines.append([f"{megabytes:g} MB", str(senders), copy, *speeds])
    return markdown_table(["vector", "senders", "plain copy", *MODES], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[90.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind, in turns")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a window")
    parser.add_argument("--shared_memory_dir", default="/dev/shm")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    parser.add_argument("--send", type=Path, help=argparse.SUPPRESS)  # what a sender process is started with
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send is not None:
        print(json.dumps(send(arguments.send, arguments.worker, arguments.rounds, arguments.seconds)))
        return
    require_room(arguments.shared_memory_dir, max(arguments.senders), max(arguments.megabytes))
    rows = measure(arguments)
    print(table(rows))
    parameters = {
        "senders": arguments.senders,
        "megabytes": arguments.megabytes,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "server": ServerSettings(SYNC_STEPS).as_dict(),
    }
    write_benchmark(arguments.output, NAME, parameters, rows)


if __name__ == "__main__":
    main()
