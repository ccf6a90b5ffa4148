"""How fast a server takes pushes, against a plain copy of the same bytes.

    python scripts/bench_server.py --output benchmarks/server.json

k sender processes push vectors to a server process (`python -m hf_lsam.server`) through shared memory, as workers do,
without a pause between pushes. In turns, within one run:

    copy        one thread copies a vector from one buffer to another: the yardstick, measured with the machine idle
    end to end  senders write their vector into the mailbox, push it and wait for the reply, as a worker would
    absorb      the mailboxes are full already and are pushed again and again: the server's work alone

Absorbed bytes are those of accepted pushes. Each push covers tau steps, so every k-th one completes a period, moves
the anchor and publishes it; that work is part of what is measured, and `updates` says how often it was done.
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
from reporting import provenance

from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.core import ServerSettings
from hf_lsam.server.process import start_server
from hf_lsam.transport.link import MailboxLink
from hf_lsam.transport.mailbox import FLOAT_BYTES, Kind, Message, RunFolder

SYNC_STEPS = 16
MODES = ("end to end", "absorb")


def layout_of(numel: int) -> ParameterLayout:
    return ParameterLayout([("vector", torch.empty(numel, device="meta"))])


def send(run_dir: Path, worker: int, mode: str, seconds: float) -> dict[str, list[float]]:
    """What one sender process does.

    Returns:
        `window`, when it began and stopped pushing, and `accepted`, when each push was acknowledged; all on the
        monotonic clock, which the processes of a machine share.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run_dir)
    vector = torch.full((folder.numel,), 1e-3 * (worker + 1))
    if mode == "absorb":
        folder.mailbox(worker).copy_(vector)
    link = MailboxLink(folder, worker, layout_of(folder.numel), torch.device("cpu"))
    accepted = []
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        if mode == "absorb":
            # What `push` does, less the copy into the mailbox: that holds the vector since before the start.
            link._push_frame = Message(Kind.PUSH, worker, a=SYNC_STEPS, b=0)
        else:
            link.push(vector, SYNC_STEPS, 0)
        link.settle()
        accepted.append(time.monotonic())
    end = time.monotonic()
    refused = link.refused
    link.finish(False, -1, torch.empty_like(vector))
    link.close()
    if refused:
        raise RuntimeError(f"the server refused {refused} pushes of sender {worker}")
    return {"window": [begin, end], "accepted": accepted}


def serve(senders: int, megabytes: float, mode: str, seconds: float, shared_memory_dir: str) -> dict:
    """One turn: a fresh server and `senders` fresh processes.

    Returns:
        bytes_per_s, pushes, updates, and seconds of the window in which all senders pushed.
    """
    numel = int(megabytes * 1e6 / FLOAT_BYTES)
    path = Path(tempfile.mkdtemp(prefix="hf_lsam-", dir=shared_memory_dir))
    run = {"fingerprint": layout_of(numel).fingerprint.hex(), "settings": ServerSettings(SYNC_STEPS).as_dict()}
    folder = RunFolder.create(path, torch.zeros(numel), senders, layout_of(numel).manifest, run)
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        server = start_server(path, log)
        command = [sys.executable, __file__, "--send", str(path), "--mode", mode, "--seconds", str(seconds)]
        processes = [
            subprocess.Popen([*command, "--worker", str(worker)], stdout=subprocess.PIPE, text=True)
            for worker in range(senders)
        ]
        try:
            reports = []
            for process in processes:
                output, _ = process.communicate(timeout=seconds + 300)
                if process.returncode:
                    raise RuntimeError(f"a sender failed (see above); the server's log:\n{log.read_text()}")
                reports.append(json.loads(output))
            server.wait(timeout=30)
            updates = folder.version
        finally:
            for process in [*processes, server]:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            folder.remove()
    begin = max(report["window"][0] for report in reports)
    end = min(report["window"][1] for report in reports)
    begin += 0.2 * (end - begin)  # the first touch of every page is behind us by then
    # From one acknowledgement to another: no push is counted in part.
    moments = sorted(moment for report in reports for moment in report["accepted"] if begin <= moment <= end)
    if len(moments) < 3:
        raise ValueError(f"{len(moments)} pushes of {megabytes} MB in {end - begin:.1f} s: raise --seconds.")
    elapsed = moments[-1] - moments[0]
    return {
        "bytes_per_s": (len(moments) - 1) * numel * FLOAT_BYTES / elapsed,
        "pushes": len(moments) - 1,
        "updates": updates,
        "seconds": elapsed,
    }


def copy_speed(megabytes: float, seconds: float) -> float:
    """Bytes a second of a plain copy by one thread, median over its repetitions."""
    torch.set_num_threads(1)
    source = torch.full((int(megabytes * 1e6 / FLOAT_BYTES),), 1.0)
    target = torch.zeros_like(source)
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return source.nbytes / statistics.median(times)


def require_room(shared_memory_dir: str, senders: int, megabytes: float) -> None:
    """Raises:
    OSError: if the vectors of the largest turn do not fit.
    """
    needed = (senders + 2) * megabytes * 1e6
    free = shutil.disk_usage(shared_memory_dir).free
    if free < needed:
        raise OSError(
            f"{shared_memory_dir} has {free / 1e6:.0f} MB free; {senders} senders of {megabytes:g} MB and two copies "
            f"of the anchor need {needed / 1e6:.0f}. Enlarge it (`mount -o remount,size=...`), pass "
            "--shared_memory_dir, or fewer --senders."
        )


def measure(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    for megabytes in arguments.megabytes:
        copies: list[float] = []
        turns: dict[tuple[int, str], list[dict]] = {(k, mode): [] for k in arguments.senders for mode in MODES}
        for _ in range(arguments.rounds):
            for (senders, mode), results in turns.items():
                copies.append(copy_speed(megabytes, min(1.0, arguments.seconds)))
                result = serve(senders, megabytes, mode, arguments.seconds, arguments.shared_memory_dir)
                results.append({**result, "copy_bytes_per_s": copies[-1]})
        for (senders, mode), results in turns.items():
            rows.append(
                {
                    "megabytes": megabytes,
                    "senders": senders,
                    "mode": mode,
                    "n": len(results),
                    "pushes": sum(result["pushes"] for result in results),
                    "updates": sum(result["updates"] for result in results),
                    "median_bytes_per_s": statistics.median(result["bytes_per_s"] for result in results),
                    "median_copy_bytes_per_s": statistics.median(copies),
                    "ratio": statistics.median(
                        result["bytes_per_s"] / result["copy_bytes_per_s"] for result in results
                    ),
                    "rounds": results,
                }
            )
    return rows


def table(rows: list[dict]) -> str:
    lines = [
        "| vector | senders | absorbed end to end | of a copy | absorbed, mailboxes full | of a copy | plain copy |",
        "|---|---|---|---|---|---|---|",
    ]
    cells = {(row["megabytes"], row["senders"], row["mode"]): row for row in rows}
    for megabytes, senders in dict.fromkeys((row["megabytes"], row["senders"]) for row in rows):
        whole, absorb = (cells[megabytes, senders, mode] for mode in MODES)
        lines.append(
            f"| {megabytes:g} MB | {senders} | {whole['median_bytes_per_s'] / 1e9:.2f} GB/s | {whole['ratio']:.2f} "
            f"| {absorb['median_bytes_per_s'] / 1e9:.2f} GB/s | {absorb['ratio']:.2f} "
            f"| {whole['median_copy_bytes_per_s'] / 1e9:.2f} GB/s |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[90.0, 1.0])
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind, interleaved")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long the senders push in a turn")
    parser.add_argument("--shared_memory_dir", default="/dev/shm")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--send", type=Path, help=argparse.SUPPRESS)  # what a sender process is started with
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.send is not None:
        print(json.dumps(send(arguments.send, arguments.worker, arguments.mode, arguments.seconds)))
        return
    require_room(arguments.shared_memory_dir, max(arguments.senders), max(arguments.megabytes))
    rows = measure(arguments)
    print(table(rows))
    if arguments.output is not None:
        report = {
            "benchmark": "server",
            "command": " ".join(["python", "scripts/bench_server.py", *sys.argv[1:]]),
            "provenance": provenance(),
            "parameters": {
                "senders": arguments.senders,
                "megabytes": arguments.megabytes,
                "rounds": arguments.rounds,
                "seconds": arguments.seconds,
                "sync_steps": SYNC_STEPS,
                "server": ServerSettings(SYNC_STEPS).as_dict(),
            },
            "results": rows,
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
