"""A worker that takes its turn: the problem that the lock-step test runs in processes and in a simulation.

As a script (`lockstep.py RUN_DIR RANK`) it joins a running server and obeys one request a line: "period" trains tau
steps and pushes, "pull" takes the newest anchor, "digest" prints hashes of x and y.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from hf_lsam.parameters import ParameterLayout
from hf_lsam.sam import perturb, restore
from hf_lsam.transport.link import MailboxLink
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.worker import Link, Worker, WorkerSettings

SYNC_STEPS = 4


def initial_parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(11)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 4), (5,), (2, 5)]]


def digest(parameters, anchor) -> list[str]:
    return [
        hashlib.sha256(torch.cat([t.detach().flatten() for t in tensors]).numpy().tobytes()).hexdigest()
        for tensors in (parameters, [anchor])
    ]


class LockstepProblem:
    """SAM with SGD on a two-layer regression; each rank has data of its own."""

    def __init__(self, rank: int):
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.parameters = initial_parameters()
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.05, momentum=0.5)

    def make_worker(self, link: Link, settings: WorkerSettings) -> Worker:
        named = [(str(index), parameter) for index, parameter in enumerate(self.parameters)]
        return Worker(named, link, settings)

    def run_period(self, worker: Worker) -> None:
        for _ in range(SYNC_STEPS):
            x = torch.randn(8, 4, generator=self.generator)
            self._backward(x)
            moved = perturb(self.parameters, rho=0.05)
            self._backward(x)
            restore(moved)
            self.optimizer.step()
            self.optimizer.zero_grad()
            worker.after_optimizer_step([0.05] * len(self.parameters))
        worker.link.settle()

    def _backward(self, x: torch.Tensor) -> None:
        weight, bias, out = self.parameters
        prediction = torch.tanh(x @ weight.T + bias) @ out.T
        (prediction - x[:, :2]).square().mean().backward()


def main(run_dir: str, rank: int) -> None:
    torch.set_num_threads(1)
    problem = LockstepProblem(rank)
    layout = ParameterLayout([(str(index), parameter) for index, parameter in enumerate(problem.parameters)])
    link = MailboxLink(RunFolder(Path(run_dir)), rank, layout, torch.device("cpu"))
    worker = problem.make_worker(link, WorkerSettings(SYNC_STEPS))
    print(json.dumps("joined"), flush=True)
    for request in sys.stdin:
        reply = None
        if request == "period\n":
            problem.run_period(worker)
            reply = "pushed"
        elif request == "pull\n":
            worker.pull_newest()
        elif request == "digest\n":
            reply = digest(problem.parameters, worker.anchor)
        print(json.dumps(reply), flush=True)
    link.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
