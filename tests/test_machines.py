"""Several machines: relays between their workers and the global server, over real networks where this host has any."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from launch import write_script
from netns import Machine, machines, why_not

TESTS = Path(__file__).parent
SCRIPT = """
import hashlib, json, os, sys, time
from pathlib import Path

import torch
from models import arguments, blobs, net, vector
from transformers import TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
FIELDS = json.loads(sys.argv[2])
PAUSE = FIELDS.pop("pause", 0.0)
STOP_AT = FIELDS.pop("stop_at", {}).get(str(RANK))
progress = OUT / f"progress{RANK}"


class Watch(TrainerCallback):
    versions = []

    def on_step_end(self, args, state, control, **keywords):
        time.sleep(PAUSE)
        progress.write_text(str(state.global_step))
        self.versions.append(trainer.worker.version)
        control.should_training_stop = control.should_training_stop or state.global_step == STOP_AT


fields = dict(sam_rho=0.05, sync_steps=4, coupling_strength=0.2, per_device_train_batch_size=4, num_train_epochs=50)
args = arguments(LSAMConfig, OUT / "out" / os.environ["GROUP_RANK"], **{**fields, **FIELDS})
trainer = LSAMTrainer(model=net(RANK), args=args, train_dataset=blobs(64), callbacks=[Watch()])
error = None
try:
    trainer.train()
except Exception as caught:
    error = f"{type(caught).__name__}: {caught}"
report = dict(
    end=hashlib.sha256(vector(trainer.model).numpy().tobytes()).hexdigest(),
    versions=Watch.versions,
    steps=trainer.state.global_step,
    local_rank=args.identity.local_rank,
    machine=args.identity.machine,
    error=error,
)
(OUT / f"rank{RANK}.new").write_text(json.dumps(report))
os.rename(OUT / f"rank{RANK}.new", OUT / f"rank{RANK}.json")
"""


class Launches:
    """`accelerate launch` on each machine of a run.

    Args:
        folder: of this test.
        workers: how many on each machine.
        on: where they are started; None: all on this one, over loopback.
        fields: of the configuration of the run.
    """

    def __init__(self, folder: Path, workers: list[int], on: list[Machine] | None = None, **fields):
        self.folder, self.workers = folder, workers
        script = write_script(folder / "script.py", SCRIPT)
        address = "127.0.0.1" if on is None else on[0].address
        port = free_port() if on is None else 29500
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
        self.processes = []
        for machine, count in enumerate(workers):
            command = [] if on is None else list(on[machine].prefix)
            command += [sys.executable, "-m", "torch.distributed.run" if len(set(workers)) > 1 else ""]
            command = command[:-1] + ["accelerate.commands.launch"]
            command += ["--multi_gpu", "--num_processes", str(sum(workers)), "--num_machines", str(len(workers))]
            command += ["--machine_rank", str(machine), "--main_process_ip", address, "--main_process_port", str(port)]
            command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            command += [str(script), str(folder), json.dumps(fields)]
            log = (folder / f"launch{machine}.log").open("w")
            self.processes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            )
            log.close()
