"""One worker trains where there is nothing of Linux's; several are refused there, with what to do instead.

The other systems are pretended, in a process of its own: what they lack is taken away before hf_lsam is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launch import PATHS, write_script

SCRIPT = """
import json, os, runpy, socket, sys
from pathlib import Path

# These know the system that they are on.
import accelerate, click, peft, psutil, rich, safetensors.torch, torch, tqdm, transformers
import accelerate.commands.launch
from transformers import Trainer

OUT = Path(sys.argv[1])
opened = []
pretending = False


def watch(event, arguments):
    if pretending and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(arguments[0])
        if path.startswith(("/dev/shm", "/proc/self/fd")):
            opened.append(path)
        if sys.platform == "win32" and os.path.isdir(path):
            raise PermissionError(path)  # folders cannot be opened there


sys.addaudithook(watch)
for module in ("fcntl", "resource", "pwd", "grp"):
    sys.modules[module] = None
for name in ("getuid", "geteuid", "posix_fallocate", "sched_getaffinity", "eventfd", "memfd_create"):
    delattr(os, name)
for name in ("O_PATH", "O_DIRECTORY", "EFD_NONBLOCK", "EFD_CLOEXEC", "MFD_CLOEXEC"):
    delattr(os, name)
del socket.AF_UNIX
sys.platform = "win32"
pretending = True

from models import arguments, blobs, net, vector

import hf_lsam.cli
from hf_lsam import LSAM, LSAMConfig, LSAMTrainer

model = net()
fields = dict(max_steps=6, sync_steps=2, save_strategy="steps", save_steps=3)
trainer = LSAMTrainer(model=model, args=arguments(LSAMConfig, OUT / "run", **fields), train_dataset=blobs())
trainer.train()
moved = (vector(model) - vector(net())).norm().item()
through = vector(model)
other = net(seed=5)
again = LSAMTrainer(model=other, args=arguments(LSAMConfig, OUT / "run", **fields), train_dataset=blobs())
again.train(resume_from_checkpoint=str(OUT / "run" / "checkpoint-3"))

in_loop = net()
with LSAM(in_loop, torch.optim.SGD(in_loop.parameters(), lr=0.1), output_dir=OUT / "loop") as lsam:
    for row in blobs(8).rows:
        lsam.step(lambda: in_loop(row["x"][None], row["labels"][None])["loss"])


def error_of(call):
    try:
        call()
    except (ValueError, SystemExit) as error:
        return str(error)
    return None


def serve():
    sys.argv = ["server", "--run_dir", str(OUT / "served")]
    runpy.run_module("hf_lsam.server", run_name="__main__")


refused = {}
for sys.platform in ("win32", "darwin", "freebsd14"):
    os.environ["WORLD_SIZE"] = "2"
    launched = error_of(lambda: arguments(LSAMConfig, OUT))
    os.environ.pop("WORLD_SIZE")
    external = error_of(lambda: LSAM(net(), None, server_address=str(OUT)))
    own_transport = error_of(lambda: arguments(LSAMConfig, OUT, server_address="mine://there"))
    refused[sys.platform] = [launched, external, error_of(serve), own_transport]
sys.platform = "linux"
pretending = False
report = dict(
    moved=moved, resumed=torch.equal(vector(other), through), opened=opened, refused=refused,
    sealed=(OUT / "run" / "checkpoint-6" / "lsam_complete.json").exists(),
    looped=(vector(in_loop) - vector(net())).norm().item(),
)
(OUT / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("platforms")
    command = [sys.executable, "-W", "ignore", write_script(folder / "script.py", SCRIPT), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "report.json").read_text())


def test_one_worker_trains_saves_and_resumes_without_anything_of_linux(report):
    assert report["moved"] > 0.05
    assert report["looped"] > 0.05
    assert report["sealed"]
    assert report["resumed"]
    assert report["opened"] == []


@pytest.mark.parametrize(
    ("platform", "instead"),
    [("win32", r"in WSL"), ("darwin", r"on Linux, a container too"), ("freebsd14", r"on Linux")],
)
def test_several_workers_are_refused_elsewhere(report, platform, instead):
    launched, external, server, own_transport = report["refused"][platform]
    assert launched == external == server
    assert "Train with one worker (plain `python script.py`" in launched
    assert f"or run several {instead}" in launched
    assert own_transport is None or "mine" in own_transport
