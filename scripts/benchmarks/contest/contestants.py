"""The contestants: each takes the same steps of the same task, and averages in its own way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from hf_lsam import LSAM
from scripts.benchmarks.contest.place import Place
from scripts.benchmarks.contest.tasks import Images, Sentences

PARTS = ("race", "links", "straggler", "killed", "cut")  # of `peers.py`
PERIOD = 4  # steps between two averages
RHO = 0.02
OUTER = {"lr": 0.7, "momentum": 0.9, "nesterov": True}


class DataParallel:
    """DDP, with or without pytorch_optimizer's SAM; a single worker has nothing to reduce."""

    def __init__(self, task: Images | Sentences, place: Place, sam: bool):
        self.forward: nn.Module = task.model
        if place.workers > 1:
            dist.init_process_group("gloo")
            self.forward = DistributedDataParallel(task.model)
        optimizer, options = task.optimizer
        self._sam = sam
        if sam:
            from pytorch_optimizer import SAM

            self._optimizer = SAM(task.model.parameters(), optimizer, rho=RHO, **options)
            self.stepped = self._optimizer.base_optimizer
        else:
            self._optimizer = self.stepped = optimizer(task.model.parameters(), **options)
        self._parameters = list(task.model.parameters())

    def __enter__(self) -> DataParallel:
        return self

    def __exit__(self, *error) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def step(self, loss: Callable[[], Tensor]) -> None:
        if self._sam:
            with self.forward.no_sync() if dist.is_initialized() else nullcontext():
                loss().backward()
            self._optimizer.step(lambda: loss().backward())
        else:
            loss().backward()
            self._optimizer.step()
        self._optimizer.zero_grad()

    def batches(self, stream: Iterable, steps: int) -> Iterable:
        return itertools.islice(stream, steps)

    def schedule(self, scheduler: LambdaLR) -> Any:
        return scheduler

    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]


class AccelerateLocalSGD(DataParallel):
    """accelerate's LocalSGD, which averages once more at the end."""

    def __init__(self, task: Images | Sentences, place: Place):
        optimizer, options = task.optimizer
        self.stepped = optimizer(task.model.parameters(), **options)
        self._parameters = list(task.model.parameters())
        self._accelerator = Accelerator(cpu=True)
        self.forward, self._optimizer = self._accelerator.prepare(task.model, self.stepped)
        self._local_sgd = LocalSGD(self._accelerator, self.forward, PERIOD)

    def __enter__(self) -> AccelerateLocalSGD:
        self._local_sgd.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self._local_sgd.__exit__(kind, error, traceback)
        super().__exit__()

    def step(self, loss: Callable[[], Tensor]) -> None:
        self._accelerator.backward(loss())
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._local_sgd.step()


class TorchftDiLoCo(DataParallel):
    """torchft's DiLoCo: each worker is its own replica group, and worker 0's machine runs the lighthouse."""

    def __init__(self, task: Images | Sentences, place: Place):
        from torchft import Manager, ProcessGroupGloo
        from torchft.local_sgd import DiLoCo

        optimizer, options = task.optimizer
        self.forward = task.model
        self._parameters = list(task.model.parameters())
        self._optimizer = self.stepped = optimizer(task.model.parameters(), **options)
        self._store = dist.TCPStore(place.address, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(),
            load_state_dict=task.model.load_state_dict,
            state_dict=task.model.state_dict,
            min_replica_size=1,
            use_async_quorum=False,
            rank=0,
            world_size=1,
            store_addr=place.address,
            store_port=self._store.port,
            lighthouse_addr=f"http://{place.first}:{place.port}",
            replica_id=f"worker_{place.rank}",
            hostname=place.address,
            init_sync=False,  # all start from the same weights
        )
        outer = torch.optim.SGD(task.model.parameters(), **OUTER)
        self._diloco = DiLoCo(self._manager, [task.model], self.stepped, outer, PERIOD)

    def __enter__(self) -> TorchftDiLoCo:
        self._diloco.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._diloco.__exit__(*error)
        self._manager.shutdown(wait=False)

    def step(self, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        self.stepped.step()
        self.stepped.zero_grad()


class Asynchronous:
    """hf_lsam's loop."""

    def __init__(self, task: Images | Sentences, place: Place, sam: bool, **lsam: Any):
        optimizer, options = task.optimizer
        self.forward = task.model
        self.stepped = optimizer(task.model.parameters(), **options)
        budget = {"max_steps": task.steps} if lsam.get("share_steps") else {}
        self._lsam = LSAM(
            task.model,
            self.stepped,
            sam_rho=RHO if sam else 0.0,
            output_dir=place.folder,
            shared_memory_dir=place.folder,
            **lsam,
            **budget,
        )
        self._shares = bool(budget)

    def __enter__(self) -> Asynchronous:
        self._lsam.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._lsam.__exit__(*error)

    def step(self, loss: Callable[[], Tensor]) -> None:
        self._lsam.step(loss)

    def batches(self, stream: Iterable, steps: int) -> Iterable:
        return self._lsam.batches(stream) if self._shares else itertools.islice(stream, steps)

    def schedule(self, scheduler: LambdaLR) -> Any:
        return self._lsam.schedule(scheduler) if self._shares else scheduler

    def parameters(self) -> list[Tensor]:
        """The newest anchor that has arrived; after the run, the final one."""
        if self._lsam.session.finished:
            return [parameter.detach().clone() for parameter in self.forward.parameters()]
        worker = self._lsam.worker
        held = [torch.empty_like(parameter) for parameter in worker.parameters]
        worker.layout.write(worker.anchor, held)
        return held


@dataclass(frozen=True)
class Contestant:
    """A contestant, with SAM's gradient or without, and the parts in which it takes part.

    Args:
        make: makes it, from a task and a place.
        sam: whether `make` is passed `sam`, and a step has two passes.
        package: the package without which it is left out.
        fields: further arguments of `make`.
        parts: the parts of the script in which it takes part.
        on_links_only: whether to leave it out on one machine, where it is the same as another contestant.
    """

    label: str
    make: Callable
    sam: bool = False
    package: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = PARTS
    on_links_only: bool = False

    @property
    def gradient(self) -> str:
        return "SAM" if self.sam else "plain"


WITH_SAM = ("race", "straggler")  # SAM changes neither what the links carry nor the effect of a worker's death
CONTESTANTS = [
    Contestant(
        "ddp, SAM of pytorch_optimizer",
        DataParallel,
        True,
        "pytorch_optimizer",
        {"sam": True},
        WITH_SAM,
    ),
    Contestant("hf_lsam", Asynchronous, True, fields={"sam": True}, parts=WITH_SAM),
    Contestant(
        "hf_lsam, 32 bits",
        Asynchronous,
        True,
        fields={"sam": True, "exchange_bits": 32},
        parts=("race",),
        on_links_only=True,
    ),
    Contestant("ddp", DataParallel, fields={"sam": False}),
    Contestant("local sgd of accelerate", AccelerateLocalSGD),
    Contestant("diloco of torchft", TorchftDiLoCo, package="torchft"),
    Contestant("hf_lsam", Asynchronous, fields={"sam": False}),
    Contestant(
        "hf_lsam, 32 bits",
        Asynchronous,
        fields={"sam": False, "exchange_bits": 32},
        parts=("race", "links"),
        on_links_only=True,
    ),
    Contestant("hf_lsam, share_steps", Asynchronous, fields={"sam": False, "share_steps": True}, parts=("straggler",)),
]
