"""Five methods for the loop of train.py: a worker with a server, or a member of a data-parallel group."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hf_lsam import LSAM, sam
from hf_lsam.batchnorm import running_statistics, tracking_layers
from hf_lsam.identity import Identity
from hf_lsam.parameters import ParameterLayout, data_parallel_bytes, trainable_parameters

# How the methods differ. `algorithm` None is data-parallel training; a `sam_rho` given here overrides the key.
METHODS: dict[str, dict[str, Any]] = {
    "lsam": {"algorithm": "lsam"},
    "easgd": {"algorithm": "easgd", "sam_rho": 0.0},
    "lsgd": {"algorithm": "lsgd", "sam_rho": 0.0},
    "ddp_sam": {"algorithm": None},
    "ddp": {"algorithm": None, "sam_rho": 0.0},
}


class Asynchronous:
    """A worker of LSAM, EASGD or LSGD.

    Args:
        model, optimizer: those of this worker.
        lsam: the fields of `LSAMArguments`.
        out: the output folder.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, lsam: dict[str, Any], out: Path):
        self._lsam = LSAM(model, optimizer, output_dir=out, **lsam)
        self.forward = model

    def __enter__(self) -> Asynchronous:
        self._lsam.__enter__()
        self.layout = self._lsam.worker.layout
        self.tensors = self._lsam.worker.parameters
        return self

    def __exit__(self, *error) -> None:
        self._lsam.__exit__(*error)

    def step(self, compute_loss: Callable[[], Tensor], rho: float) -> Tensor:
        self._lsam.sam_rho = rho
        return self._lsam.step(compute_loss)

    def vector(self) -> Tensor:
        worker = self._lsam.worker
        if self._lsam.arguments.batchnorm_statistics == "worker":
            with self._lsam.anchor():  # because this warns
                return worker.layout.read(
                    [tensor.cpu() for tensor in worker.parameters], torch.empty(worker.layout.numel)
                )
        return worker.anchor.cpu().clone()

    def drift(self, loss: float) -> float:
        return self._lsam.log(loss=loss)["lsam/drift"]

    def log_points(self, points: list[dict[str, Any]]) -> None:
        for point in points:
            self._lsam.log_evaluation(point["step"], eval_loss=point["loss"], eval_accuracy=point["accuracy"])

    def bytes(self, workers: int) -> int:
        link = self._lsam.worker.link.status
        return workers * (link.bytes_pushed + link.bytes_pulled)

    def metrics(self) -> dict[str, float]:
        return self._lsam.worker_summary()


_groups = itertools.count()


class DataParallel:
    """Data-parallel SAM or SGD: DDP averages the gradients that the optimizer steps with.

    Args:
        model, optimizer: those of this process.
        identity: this process among the workers.
        lsam: the fields of `LSAMArguments`.
        ascent_sync: perturb along the gradient of all workers' batches instead of only this worker's.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, identity: Identity, lsam, ascent_sync: bool):
        self._optimizer, self._ascent_sync, self._lsam = optimizer, ascent_sync, lsam
        self._workers, self._steps = identity.num_workers, 0
        self.forward: nn.Module = model
        device = next(model.parameters()).device
        if self._workers > 1:
            one_gpu_each = device.type == "cuda" and torch.cuda.device_count() >= identity.num_workers
            # A prefix per group: a process that trains again must not find the addresses of the previous group.
            store, rank, size = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(f"group {next(_groups)}", store)
            dist.init_process_group("nccl" if one_gpu_each else "gloo", store=store, rank=rank, world_size=size)
            ids = [device.index] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(model, device_ids=ids)
        named = trainable_parameters(model)
        self._parameters = [parameter for _, parameter in named]
        if lsam["batchnorm_statistics"] != "reestimate":
            named += running_statistics(model)
        self.layout = ParameterLayout(named)
        self.tensors = [tensor for _, tensor in named]
        self._batchnorm = tracking_layers(model)

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *error) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def step(self, compute_loss: Callable[[], Tensor], rho: float) -> Tensor:
        def one_pass() -> Tensor:
            loss = compute_loss()
            loss.backward()
            return loss.detach()

        def own_pass() -> Tensor:
            with nullcontext() if self._ascent_sync or self._workers == 1 else self.forward.no_sync():
                return one_pass()

        if rho:
            eps, adaptive = self._lsam["sam_eps"], self._lsam["sam_adaptive"]
            loss, _ = sam.gradient(self._parameters, own_pass, one_pass, rho, eps, adaptive, self._batchnorm)
        else:
            loss = one_pass()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1
        return loss

    def vector(self) -> Tensor:
        return self.layout.read([t.cpu() for t in self.tensors], torch.empty(self.layout.numel))

    def drift(self, loss: float) -> None:
        return None

    def bytes(self, workers: int) -> int:
        reductions = 2 if self._ascent_sync and self._lsam["sam_rho"] else 1
        return reductions * data_parallel_bytes([self._steps] * workers, sum(p.numel() for p in self._parameters))

    def metrics(self) -> dict[str, float]:
        return {"steps": self._steps, "trainable_parameters": sum(p.numel() for p in self._parameters)}
