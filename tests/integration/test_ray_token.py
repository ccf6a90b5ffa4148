"""A Ray cluster that asks for a token takes in nobody without it, and who is refused is told what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launch import free_port, wait_until

pytest.importorskip("ray")

STORE = 80 * 2**20  # of objects, bytes: Ray takes no less


def tokens(folder: Path, token: str) -> dict[str, str]:
    """What a process needs in its environment to show `token`."""
    path = folder / token
    path.write_text(f"{token}-0123456789abcdef")
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a cluster of one node that asks for a token, and the folder of tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:  # Ray's sockets lie below this: its name is short
        port = next(port for port in iter(free_port, None) if port < 10_000)  # from there on its workers listen
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=1"]
        command += [f"--object-store-memory={STORE}", "--include-dashboard=false", f"--temp-dir={scratch}", "--block"]
        log = folder / "ray.log"
        with log.open("w") as out:
            environment = {**os.environ, **tokens(folder, "right"), "RAY_USAGE_STATS_ENABLED": "0"}
            process = psutil.Popen(command, env=environment, stdout=out, stderr=out)
        started = []
        try:
            wait_until(lambda: "runtime started" in log.read_text(), log.read_text)
            started = process.children(recursive=True)
            yield f"127.0.0.1:{port}", folder
        finally:
            for each in [process, *started]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait()


def test_who_does_not_show_the_clusters_token_is_refused_and_told_which_it_needs(head, tmp_path):
    address, folder = head
    processes = []
    for shown in (tokens(folder, "wrong"), {"RAY_AUTH_MODE": "disabled"}):  # at once: Ray tries for 20 s
        out = tmp_path / f"out-{len(processes)}"
        command = [sys.executable, "-m", "hf_lsam.ray", "--address", address, "--num_workers", "1"]
        command += ["--run_dir", str(out), "--", __file__]
        environment = {**os.environ, **shown}
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate()[1] for process in processes]
    for process, said in zip(processes, errors, strict=True):
        assert process.returncode == 1, said
        assert f"Could not connect to a Ray cluster at address={address}" in said
        assert "this process needs it too: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in said
    assert not list(tmp_path.rglob("secret"))  # nothing has begun
