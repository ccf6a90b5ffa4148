"""The benchmark scripts run and report what they say, at sizes where their figures mean nothing."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from launch import ROOT, run_script
from netns import why_not

from recipes.common.image_data import write_example_images

SCRIPTS = ROOT / "scripts/benchmarks"


def report_of(script: str, output: Path, *arguments: str) -> dict:
    done = run_script(SCRIPTS / script, *arguments, "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["command"].startswith(f"python scripts/benchmarks/{script} {arguments[0]}")
    assert report["provenance"].keys() >= {"commit", "versions", "hardware", "date"}
    assert done.stdout.startswith("| ")
    return report


def test_bench_step(tmp_path):
    variants = ["plain", "lsam", "lsam quarter", "lsam server", "davda54"]
    size = ("--batch", "4", "--length", "8", "--rounds", "2", "--steps", "1", "--exchange_steps", "17", "--no_memory")
    report = report_of("step.py", tmp_path / "step.json", *size, "--variants", *variants)
    assert report["parameters"]["batch"] == 4
    assert report["parameters"]["length"] == 8
    assert report["parameters"]["trainable_parameters"] == 22_713_986
    rows = {row["variant"]: row for row in report["results"]}
    assert list(rows) == variants
    assert rows["plain"]["ratio"] == 1.0
    for row in rows.values():
        assert row["n"] == 2
        assert len(row["ratios"]) == 2
        assert row["median_step_s"] > 0
    assert rows["lsam server"]["exchange_n"] == 17
    assert 0 < rows["lsam server"]["exchange_share"] < 1


def test_bench_images(tmp_path):
    size = ("--batch", "2", "--processes", "1", "--rounds", "1", "--steps", "1")
    size += ("--throughput_rounds", "1", "--throughput_steps", "2")
    report = report_of("images.py", tmp_path / "images.json", *size)
    results = report["results"]
    assert [row["allocator"] for row in results["step"]] == ["default", "keeping"]
    assert all(row["n"] == len(row["ratios"]) == 1 for row in results["step"])
    assert [row["kind"] for row in results["throughput"]] == ["independent", "lsam", "sam"]
    for row in results["throughput"]:
        assert row["images_per_second"] > 0
    assert results["throughput"][0]["ratio"] == 1.0


def test_bench_step_measures_memory(tmp_path):
    size = ("--batch", "2", "--length", "8", "--rounds", "1", "--steps", "1", "--exchange_steps", "0")
    report = report_of("step.py", tmp_path / "step.json", *size, "--variants", "plain", "lsam")
    plain, lsam = report["results"]
    vector = 4 * report["parameters"]["trainable_parameters"]
    assert plain["peak_memory_ratio"] == 1.0
    assert plain["peak_memory_bytes"] > 3 * vector  # a gradient and AdamW's two moments
    assert lsam["peak_memory_bytes"] > plain["peak_memory_bytes"] + 2 * vector  # y and the running sum at least


def test_bench_async(tmp_path):
    size = ("--batch", "1", "--length", "4", "--warmup", "3", "--rounds", "1", "--block_seconds", "6")
    report = report_of("asynchrony.py", tmp_path / "async.json", *size, "--block_steps", "2")
    assert [(row["method"], row["worker_1"]) for row in report["results"]] == [
        (method, kind) for method in ("lsam", "ddp") for kind in ("free", "sleep", "busy")
    ]
    for row in report["results"]:
        assert row["worker_0_n"] >= 1
        assert row["worker_1_n"] >= 1
        assert row["worker_0_median_step_s"] > 0
        if row["worker_1"] == "free":
            assert row["worker_0_ratio"] == row["worker_1_ratio"] == 1.0
        if row["method"] == "ddp":
            assert row["worker_0_n"] == row["worker_1_n"] == 2
    assert [worker["trainable_parameters"] for worker in report["lsam_workers"]] == [22_713_986] * 2


def test_bench_server(tmp_path):
    size = ("--senders", "1", "2", "--megabytes", "0.1", "--rounds", "2", "--seconds", "0.8")
    report = report_of("server.py", tmp_path / "server.json", *size)
    rows = report["results"]
    assert [(row["senders"], row["mode"]) for row in rows] == [
        (senders, mode) for senders in (1, 2) for mode in ("end to end", "absorb", "sum")
    ]
    for row in rows:
        assert row["megabytes"] == 0.1
        assert row["n"] == len(row["ratios"]) == 2
        assert row["pushes"] >= 4
        assert row["median_bytes_per_s"] > 0


def test_bench_links(tmp_path):
    megabits = () if why_not() else ("100",)
    size = ("--numel", "5000", "--bits", "8", "32", "--rounds", "2", "--megabits", *megabits)
    rows = report_of("links.py", tmp_path / "links.json", *size)["results"]
    assert [(row["megabits"], row["bits"], row["bytes"], row["mode"]) for row in rows] == [
        (rate, bits, size, mode)
        for rate in (None, *map(int, megabits))
        for bits, size in ((8, 5135), (32, 20000))
        for mode in ("tcp", "curve", "link")
    ]
    for row in rows:
        assert row["n"] == len(row["seconds"]) == 2
        assert row["median_s"] > 0
        if row["mode"] == "tcp":
            assert row["ratio"] == 1.0


def test_bench_peers(tmp_path):
    images = write_example_images(tmp_path / "images", 16)
    size = ("--parts", "race", "straggler", "killed", "--megabits", "--dataset", "folder", "--data_dir", str(images))
    size += ("--batch", "4", "--steps", "8", "--points", "2")
    results = report_of("peers.py", tmp_path / "peers.json", *size)["results"]
    diloco = ["diloco of torchft"] * (find_spec("torchft") is not None)
    plain = ["ddp", "local sgd of accelerate", *diloco, "hf_lsam"]
    race = [(row["gradient"], row["contestant"], row["steps"]) for row in results["race"]]
    assert race == [
        ("SAM", "ddp, SAM of pytorch_optimizer", [8, 8]),
        ("SAM", "hf_lsam", [8, 8]),
        *(("plain", name, [8, 8]) for name in plain),
    ]
    for row in results["race"]:
        assert [point["step"] for point in row["points"]] == [4, 8]
        assert row["ratio"] > 0
        assert 0 <= row["points"][-1]["accuracy"] <= 1
    *own, shared = results["straggler"]
    assert [row["steps"] for row in own] == [[8, 8]] * len(race)
    assert 16 <= sum(shared["steps"]) <= 18  # each may have begun one more
    for row in own:
        if row["contestant"] != "hf_lsam":  # in step, a pause changes nothing but the time
            loss, without = (each["points"][-1]["loss"] for each in (row, row["without"]))
            assert loss == pytest.approx(without, rel=1e-3)
    outcomes = {row["contestant"]: row["outcome"] for row in results["killed"]}
    assert outcomes == {name: "error" if name in plain[:2] else "finished" for name in plain}


def test_bench_server_says_how_much_room_it_needs():
    done = run_script(SCRIPTS / "server.py", "--senders", "3", "--megabytes", "1e9")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "3 senders of 1e+09 MB, what they push and two copies of the anchor need 6000000000 MB" in done.stderr


def test_gpu_check_without_a_gpu():
    script = ROOT / "scripts/stress/gpu_check.sh"
    done = subprocess.run([str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("gpu_check: no CUDA device is available here, so nothing can be checked.\n")


@pytest.mark.parametrize("script", ["step.py", "asynchrony.py"])
def test_bad_arguments_are_refused(script):
    bad = {"step.py": ("--variants", "lsam"), "asynchrony.py": ("--warmup", "2")}[script]
    done = run_script(SCRIPTS / script, *bad)
    assert done.returncode == 2
    assert "error: --" in done.stderr


def test_bench_faults(tmp_path):
    size = ("--kills", "2", "--seconds", "0.3", "--numel", "1000")
    results = report_of("faults.py", tmp_path / "faults.json", *size)["results"]
    assert results["n"] == len(results["kills"]) == 2
    for kill in results["kills"]:
        assert kill["drop_s"] > 0
        assert kill["slowest_after"] >= kill["ratio"] > 0


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_long_work_shows_how_long_it_will_take(terminal, quiet):
    script = "import time\nfrom recipes.common.progress import track\n"
    script += f"for _ in track(range(4), 'runs', {quiet}): time.sleep(0.2)"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    errors = theirs if terminal else subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
    out, said = process.communicate()
    os.close(theirs)
    if terminal:
        said = b""
        with suppress(OSError):  # its end has been closed
            while chunk := os.read(ours, 4096):
                said += chunk
    os.close(ours)
    assert (process.returncode, out) == (0, b"")
    if terminal and not quiet:
        assert b"%|" in said
        assert b"to go" in said
    else:
        assert said.split() == b"runs: 4 of 4".split()
