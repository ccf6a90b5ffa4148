"""On a Ray cluster of several nodes: what dies is replaced, and what Ray takes with it saves first."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from launch import PATHS, SHARED_MEMORY, own_processes, own_shared_memory, wait_until, write_script

from hf_lsam.checkpoint import load_tensors
from hf_lsam.cli import main
from hf_lsam.cli.monitor import run_state, worker_states
from hf_lsam.record import read_record
from hf_lsam.transport.ownership import dead_launches

pytest.importorskip("ray")
from ray.cluster_utils import Cluster

from hf_lsam.cli.doctor_ray import _room
from hf_lsam.ray import launch
from hf_lsam.ray.cluster import Needs, Node

NODES = 3
STORE = 80 * 2**20  # of objects, in /dev/shm, bytes: Ray takes no less, and nothing of ours is ever in it
RECONNECT_SECONDS = "3"  # for which Ray waits for a head that is gone
SCRIPT_NAME = "linear.py"

SCRIPT = """
import json
import os
import sys
import time
from pathlib import Path

import torch

from hf_lsam import LSAM

out = Path(sys.argv[1])
fields = {"sync_steps": 2, "snapshot_seconds": 0.2, "server_timeout": 240.0, "max_steps": 10**6}
fields |= json.loads(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
inputs = torch.randn(64, 4)
data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
loader = torch.utils.data.DataLoader(data, batch_size=8)
lsam = LSAM(model, torch.optim.SGD(model.parameters(), 0.05), output_dir=out, share_steps=True, **fields)
rank = lsam.arguments.identity.rank
try:
    with lsam:
        for step, (x, y) in enumerate(lsam.batches(lsam.shard(loader))):
            lsam.step(lambda: (model(x) - y).square().mean())
            if step == 0:
                print(f"process {os.getpid()} trains")
            if lsam.stop_requested:
                lsam.save(out / "saved")
                raise SystemExit(143)
            time.sleep(0.02)
except RuntimeError as error:
    lsam.session.save_worker(out / "alone" / str(rank))
    print(type(error).__name__, error)
    raise
if rank == 0:
    torch.save(model.state_dict(), out / "model.pt")
"""


# --- the cluster: a head without room for workers, and nodes with room for one each ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets lie below this, and their names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", scratch)
        patch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", RECONNECT_SECONDS)
        patch.setenv("PYTHONPATH", PATHS)
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        Path(scratch, "ray").mkdir()
        size = {"object_store_memory": STORE}
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **size})
        cluster.size, started = size, []
        try:
            for _ in range(NODES):
                cluster.add_node(num_cpus=1, num_gpus=1, **size)  # GPUs that are said to be there
            started = psutil.Process().children(recursive=True)
            yield cluster
        finally:
            started += psutil.Process().children(recursive=True)
            cluster.shutdown()
            for (
                process
            ) in started:  # what a raylet that was killed has left; other tests need multiprocessing's servers
                with suppress(psutil.NoSuchProcess):
                    if not any(word.startswith("from multiprocessing.") for word in process.cmdline()):
                        process.kill()


def processes_of_runs() -> list[psutil.Process]:
    """Drivers, servers and workers that this session has started; not Ray's own."""
    found = [psutil.Process(pid) for pid, command in own_processes() if "hf_lsam" in command or SCRIPT_NAME in command]
    return found


def doctor(*options: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-c", "from hf_lsam.cli import main; main()", "doctor", "--ray", *options]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return result.returncode, result.stdout


def server_address(pid: int) -> str:
    return psutil.Process(pid).environ()["HF_LSAM_SERVER_ADDRESS"]


@pytest.fixture(autouse=True)
def nothing_leaks(cluster):
    """In place of the one for all tests: Ray's own processes come and go with the cluster, ours do not stay."""
    yield
    try:
        wait_until(lambda: not processes_of_runs(), processes_of_runs)
    finally:
        for process in processes_of_runs():
            process.kill()
    left = own_shared_memory()
    assert left <= set(dead_launches(SHARED_MEMORY))  # of nodes that died; the next launch removes them
    for folder in left:
        shutil.rmtree(folder)


class Driver:
    """`python -m hf_lsam.ray` in a process of its own."""

    def __init__(
        self, cluster: Cluster, folder: Path, workers: int, script: dict[str, Any], *options: str, gpus: float = 0
    ):
        self.out = folder / "out"
        self._log = folder / "driver.log"
        write_script(folder / SCRIPT_NAME, SCRIPT)
        command = [sys.executable, "-m", "hf_lsam.ray", "--address", cluster.address, "--num_workers", str(workers)]
        command += ["--gpus_per_worker", str(gpus), "--run_dir", str(self.out), *options, "--", SCRIPT_NAME]
        command += [str(self.out), json.dumps(script)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def begun(self) -> list[tuple[int, int]]:
        """(worker, pid), in the order in which they began."""
        return [(int(n), int(pid)) for n, pid in re.findall(r"worker (\d+) begins on \S+, pid (\d+)", self.log)]

    def trains(self, number: int) -> bool:
        """Whether a worker has made a step. One that has not has nothing to save, and on a signal leaves at once."""
        log = self.out / "ray" / f"worker-{number}.log"
        return f"process {dict(self.begun())[number]} trains" in log.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        wait_until(lambda: condition() or self.process.poll() is not None, self.logs)
        assert condition(), self.logs()

    def logs(self) -> str:
        return "\n".join(f"--- {path}\n{path.read_text()}" for path in [self._log, *self.out.glob("ray/*.log")])

    @property
    def root_log(self) -> str:
        path = self.out / "ray" / "root.log"
        return path.read_text() if path.exists() else ""

    @property
    def live(self) -> int:
        """n: the workers that the root counts, by its log."""
        machines: dict[str, int] = {}
        for machine, joined, live in re.findall(
            r"machine (\d+) (?:joined from \S+ with (\d+)|has (\d+) live|is gone|finished)",
            self.root_log.split("resumed the run")[-1],
        ):
            machines[machine] = int(joined or live or 0)
        return sum(machines.values())

    def roots(self) -> list[tuple[int, int]]:
        """Of each root that began: its first version, and the last one published before."""
        found = re.findall(r"resumed the run at version (\d+); the last published was (\d+)", self.root_log)
        return [(int(first), int(before)) for first, before in found]

    def root(self) -> psutil.Process:
        (root,) = (each for each in processes_of_runs() if "--listen" in each.cmdline())
        return root

    def snapshot(self) -> dict[str, torch.Tensor]:
        return load_tensors(self.out / "ray" / "root" / "snapshot.safetensors")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait()


def test_two_workers_train_their_steps_and_the_anchor_is_saved(cluster, tmp_path):
    driver = Driver(cluster, tmp_path, 2, {"max_steps": 100}, "--report_seconds", "1")
    assert driver.process.wait() == 0, driver.logs()
    record = read_record(driver.out)
    assert {rank: entries[-1]["error"] for rank, entries in record.workers.items()} == {0: None, 1: None}
    steps = [record.workers[rank][-1]["step"] for rank in range(2)]
    assert 200 <= sum(steps) < 300  # shared, but for those that were made while a count crossed
    assert run_state(record, worker_states(record)) == "finished"
    assert re.search(r"worker [01]: step \d+, loss [\d.]+, anchor \d+", driver.log)
    shown = CliRunner().invoke(main, ["monitor", str(driver.out), "--once"])
    assert shown.exit_code == 0
    rows = re.findall(r"^ *([01]) +finished +(\d+) ", shown.output, re.MULTILINE)  # a line a worker
    assert [(rank, int(step)) for rank, step in rows] == [("0", steps[0]), ("1", steps[1])]
    snapshot = driver.snapshot()
    assert snapshot["pushes"].tolist()[0] > 0
    weight, bias = torch.load(driver.out / "model.pt").values()
    saved = torch.cat([weight.flatten(), bias])
    assert torch.allclose(saved, snapshot["anchor"], atol=0.05)  # but for the last push of the other
    assert torch.allclose(saved, torch.tensor([1.0, 1, 1, 1, 0]), atol=0.1)
    with pytest.raises(ValueError, match=r"holds the anchor of another run.*--resume"):
        launch(["-m", "any"], 2, driver.out, gpus_per_worker=0)


def test_the_doctor_says_what_the_cluster_has_room_for_and_what_it_asks_to_trust(cluster, tmp_path):
    options = ["--address", cluster.address, "--run_dir", str(tmp_path / "out"), "--num_workers", "4"]
    code, said = doctor(*options, "--", "script.py")
    assert code == 0, said
    assert said.count("1 CPUs and 1 GPUs, room for 1 worker, with a relay.") == NODES
    assert f"{NODES} workers would train: 1 would wait for nodes that come." in said
    assert "whoever may use them runs code on every node" in said
    assert "not encrypted (RAY_USE_TLS=0)" in said
    code, said = doctor(*options, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="")
    assert code == 1
    assert re.search(r"Could not connect to a Ray cluster at .*token", said)


def test_an_address_where_nobody_listens_is_told_at_once():
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        for address, variables in (f"127.0.0.1:{port}", {}), ("auto", {"RAY_ADDRESS": f"127.0.0.1:{port}"}):
            code, said = doctor("--address", address, **variables)
            assert code == 1
            assert "Connection refused" in said
            assert "give the address of its head" in said


def test_the_doctor_says_what_there_is_no_room_for():
    node = Node("id", "here", 4, 0)
    (_, wrong) = _room([node], Needs(), None, 1)
    assert (wrong.mark, "--gpus_per_worker 0" in wrong.remedy) == ("wrong", True)
    (_, wrong) = _room([node], Needs(2, 0), None, 3)
    assert wrong.text.startswith("there is room for 2 workers of 2 CPU and 0 GPU each")


def test_a_plan_that_cannot_be_is_refused_before_anything_starts(tmp_path):
    for words, options, reason in [
        ([], {}, "no script to run"),
        (["nowhere.py"], {}, "no script nowhere.py in"),
        (["-m", "x"], {"min_workers": 3}, "min_workers must be from 1 to num_workers"),
        (["-m", "x"], {"gpus_per_worker": 2}, "at most one GPU, got"),
        (["-m", "x"], {"cpus_per_worker": 0}, "some CPU"),
    ]:
        with pytest.raises(ValueError, match=reason):
            launch(words, 2, tmp_path, **options)


def test_a_second_driver_of_a_run_is_refused_before_anything_starts(tmp_path):
    (tmp_path / "ray").mkdir()
    with FileLock(tmp_path / "ray/driver.lock"), pytest.raises(RuntimeError, match=r"Another driver is running"):
        launch(["-m", "x"], 2, tmp_path)


def test_what_dies_is_replaced_while_the_others_train_and_a_signal_has_all_save(cluster, tmp_path):
    driver = Driver(cluster, tmp_path, 3, {}, "--min_workers", "3", "--report_seconds", "1", gpus=1)

    def wait_for_live(n: int) -> None:
        driver.wait_for(lambda: driver.live == n)

    try:
        wait_for_live(3)
        assert sorted(number for number, _ in driver.begun()) == [0, 1, 2]
        for _, pid in driver.begun():
            assert psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] == "0"  # as Ray has it for each node

        # A worker.
        os.kill(dict(driver.begun())[1], signal.SIGKILL)
        driver.wait_for(lambda: len(driver.begun()) == 4)
        assert driver.begun()[-1][0] == 1
        assert "worker 1 was ended by SIGKILL" in driver.log
        assert "has 0 live workers" in driver.root_log
        wait_for_live(3)

        # The host of a worker, not the worker: it saves and leaves, and another one takes its place.
        orphan = psutil.Process(dict(driver.begun())[2])
        orphan.parent().kill()
        driver.wait_for(lambda: len(driver.begun()) == 5)
        assert driver.begun()[-1][0] == 2
        driver.wait_for(lambda: not orphan.is_running())
        assert (driver.out / "saved" / "2" / "lsam_worker.safetensors").exists()
        wait_for_live(3)

        # The root, between two snapshots.
        driver.wait_for(lambda: (driver.out / "ray" / "root" / "snapshot.safetensors").exists())
        os.kill(driver.root().pid, signal.SIGKILL)
        driver.wait_for(lambda: len(driver.roots()) == 2)
        wait_for_live(3)

        # The node that has the root. Its worker outlives Ray there, as it would a driver or a head.
        root, begun = driver.root(), driver.begun()
        of_node = {pid: server_address(pid)[-12:] for pid in dict(begun).values()}
        (node,) = (each for each in cluster.worker_nodes if f"root-{each.node_id[:12]}" in " ".join(root.cmdline()))
        (orphan,) = (pid for pid, name in of_node.items() if name == node.node_id[:12])
        pushes = driver.snapshot()["pushes"][0]
        cluster.remove_node(node, allow_graceful=False)
        driver.wait_for(lambda: len(driver.roots()) == 3)
        wait_for_live(2)
        assert not root.is_running()
        assert psutil.pid_exists(orphan)

        # A node comes.
        cluster.add_node(num_cpus=1, num_gpus=1, **cluster.size)
        driver.wait_for(lambda: len(driver.begun()) == len(begun) + 1)
        wait_for_live(3)
        number, _ = driver.begun()[-1]
        driver.wait_for(lambda: driver.trains(number))
        assert dict(begun)[number] == orphan
        os.kill(orphan, signal.SIGKILL)

        assert all(first > before for first, before in driver.roots())
        driver.wait_for(lambda: driver.snapshot()["pushes"][0] > pushes)
    finally:
        code = driver.end()
    assert code == 143, driver.logs()
    for number in range(3):
        saved = load_tensors(driver.out / "saved" / str(number) / "lsam_worker.safetensors")
        assert torch.allclose(saved["parameters"], torch.tensor([1.0, 1, 1, 1, 0]), atol=0.1)
    assert driver.snapshot()["anchor"].isfinite().all()
    assert driver.live == 0


def test_without_a_head_the_workers_go_on_alone_save_and_end_with_an_error(cluster, tmp_path):
    """The last test: the cluster does not outlive it."""
    driver = Driver(cluster, tmp_path, 2, {"server_timeout": 30.0})
    driver.wait_for(lambda: driver.live == 2 and driver.trains(0) and driver.trains(1))
    processes = processes_of_runs()
    servers = [process for process in processes if "hf_lsam.server" in process.cmdline()]
    workers = [psutil.Process(pid) for pid in dict(driver.begun()).values()]
    assert len(servers) == 3
    cluster.head_node.kill_gcs_server()
    assert driver.process.wait() == 1
    wait_until(lambda: not any(server.is_running() for server in servers), driver.logs)
    wait_until(lambda: not any(worker.is_running() for worker in workers), driver.logs)
    for number in range(2):
        assert (
            "ServerGone: The server process ended while worker" in (driver.out / f"ray/worker-{number}.log").read_text()
        )
        saved = load_tensors(driver.out / "alone" / str(number) / "lsam_worker.safetensors")
        assert torch.allclose(saved["parameters"], torch.tensor([1.0, 1, 1, 1, 0]), atol=0.1)
    assert driver.snapshot()["anchor"].isfinite().all()
