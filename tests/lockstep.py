"""A worker that steps on request: the problem that the lock-step test runs in processes and in a simulation.

As a script (`lockstep.py RUN_DIR RANK [STRENGTH COUPLING]`) it joins a running server and obeys one request per line:
"step" trains one step, waits for the answer to its push, if it made one, and pulls the newest anchor; "period" trains
tau steps and waits for the answer; "pull" pulls the newest anchor; "digest" prints hashes of x and y; "finish" pushes
what is left, takes the final anchor, and prints the same hashes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from hf_lsam.algorithms import WorkerSettings
from hf_lsam.parameters import ParameterLayout
from hf_lsam.sam import perturb, restore
from hf_lsam.transport.base import Link
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.transport.shared_memory import SharedMemoryLink
from hf_lsam.worker import Worker

SYNC_STEPS = 4
ETA, MOMENTUM, RHO = 0.05, 0.5, 0.05


def initial_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 4), (5,), (2, 5)]]


class LockstepNet(nn.Module):
    """Two layers."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.out = initial_parameters()


def batch_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(generator: torch.Generator) -> torch.Tensor:
    """A batch, [8, 4]."""
    return torch.randn(8, 4, generator=generator)


def loss_of(model: LockstepNet, x: torch.Tensor) -> torch.Tensor:
    prediction = torch.tanh(x @ model.weight.T + model.bias) @ model.out.T
    return (prediction - x[:, :2]).square().mean()


def digest(parameters, anchor) -> list[str]:
    return [
        hashlib.sha256(torch.cat([t.detach().flatten() for t in tensors]).numpy().tobytes()).hexdigest()
        for tensors in (parameters, [anchor])
    ]


class LockstepProblem:
    """SAM with SGD on a two-layer regression; each rank has its own data."""

    def __init__(self, rank: int):
        self.generator = batch_generator(100 + rank)
        self.model = LockstepNet()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, ETA, MOMENTUM)

    def make_worker(self, link: Link, settings: WorkerSettings) -> Worker:
        return Worker(list(self.model.named_parameters()), link, settings)

    def run_period(self, worker: Worker) -> None:
        for _ in range(SYNC_STEPS):
            self.step(worker)
        worker.link.settle()

    def step(self, worker: Worker) -> None:
        x = draw(self.generator)
        loss_of(self.model, x).backward()
        moved = perturb(self.parameters, rho=RHO)
        loss_of(self.model, x).backward()
        restore(moved)
        self.optimizer.step()
        self.optimizer.zero_grad()
        worker.after_optimizer_step([ETA] * len(self.parameters))


def main(run_dir: str, rank: int, strength: float = 1.0, coupling: str = "merge") -> None:
    torch.set_num_threads(1)
    problem = LockstepProblem(rank)
    layout = ParameterLayout(list(problem.model.named_parameters()))
    link = SharedMemoryLink(RunFolder(Path(run_dir)), rank, layout, torch.device("cpu"))
    worker = problem.make_worker(link, WorkerSettings(SYNC_STEPS, strength, coupling))
    print(json.dumps("joined"), flush=True)
    for request in sys.stdin:
        reply = None
        if request == "period\n":
            problem.run_period(worker)
            reply = "pushed"
        elif request == "step\n":
            problem.step(worker)
            link.settle()
            worker.pull_newest()
            reply = "stepped"
        elif request == "finish\n":
            worker.finish()
            reply = digest(problem.parameters, worker.anchor)
        elif request == "pull\n":
            worker.pull_newest()
        elif request == "digest\n":
            reply = digest(problem.parameters, worker.anchor)
        print(json.dumps(reply), flush=True)
    link.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *([float(sys.argv[3]), sys.argv[4]] if len(sys.argv) > 3 else []))
