"""The data-parallel baseline: workers that wait for each other at every step."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..batchnorm import tracking_layers
from ..optimizers import momentum_buffers
from ..parameters import ParameterLayout, data_parallel_bytes, trainable_parameters
from .gradient import PLAIN, Gradient
from .setting import Loss, Machine, MakeOptimizer, MakeScheduler, Moment


class DataParallel:
    """The baseline: n workers with one model, whose gradients are averaged at every step (see `Cluster`).

    Each worker computes SAM's perturbation on its own batch, without an all-reduce. A step takes as long as that of the
    slowest worker, plus a ring all-reduce over the slowest link: 2 (n - 1) messages, each an n-th of the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        loss: Loss,
        machines: Sequence[Machine],
        gradient: Gradient = PLAIN,
        make_scheduler: MakeScheduler | None = None,
        seed: int = 0,
    ):
        self._model = copy.deepcopy(model)
        named = trainable_parameters(self._model)
        self.layout = ParameterLayout(named)
        self._parameters = [parameter for _, parameter in named]
        self._optimizer = make_optimizer(self._parameters)
        self._scheduler = make_scheduler(self._optimizer) if make_scheduler else None
        self._loss, self._machines, self._gradient = loss, machines, gradient
        self._batchnorm = tracking_layers(self._model)
        self._jitter = torch.Generator().manual_seed(seed)
        self._seed = seed

    def run(self, steps: int, moments: int = 1) -> Iterator[Moment]:
        """Makes `steps` steps; see `Cluster.run`."""
        workers, size = len(self._machines), 4 * self.layout.numel
        due = {round(steps * (index + 1) / moments) for index in range(moments)}
        all_reduce = max(2 * (workers - 1) * machine.transfer(size / workers) for machine in self._machines)
        now, states = 0.0, []
        with torch.random.fork_rng(devices=[]):
            for worker in range(workers):
                torch.manual_seed(self._seed + worker)
                states.append(torch.get_rng_state())
        for step in range(1, steps + 1):
            directions = None
            if self._gradient.sam_direction == "momentum":
                directions = momentum_buffers(self._optimizer, self._parameters)
            for worker in range(workers):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(states[worker])
                    loss = self._loss(self._model, worker)
                    self._gradient.add_to(self._parameters, loss, self._batchnorm, directions, -1.0)
                    states[worker] = torch.get_rng_state()
            torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], workers)
            self._gradient.clip(self._parameters)
            self._optimizer.step()
            self._optimizer.zero_grad()
            if self._scheduler is not None:
                self._scheduler.step()
            draws = torch.randn(workers, generator=self._jitter).tolist()
            ends = [machine.end_of_step(now, draw) for machine, draw in zip(self._machines, draws, strict=True)]
            now = max(ends) + all_reduce
            if step in due:
                x = self.layout.read(self._parameters, torch.empty(self.layout.numel))
                yield Moment(now, step, step * workers, data_parallel_bytes([step] * workers, self.layout.numel), x)
