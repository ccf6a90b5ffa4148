"""memory.py: what it says is what is really allocated, counted as the bytes of the tensors that are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lsam import NesterovAdamW
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.cli.doctor import memory_findings
from hf_lsam.joining import Alone
from hf_lsam.loop import LoopArguments
from hf_lsam.memory import server_bytes, shared_bytes, worker_bytes
from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.core import ServerCore
from hf_lsam.transport.base import JoinRequest
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.worker import MISSED_ANCHORS, Worker

NUMEL = 100_000


def storages(root: Any) -> dict[int, int]:
    """Address -> bytes of all memory that tensors hold which `root` leads to."""
    found, seen, todo = {}, set(), [root]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
            todo += [each.grad] if each.is_leaf else []
        elif isinstance(each, dict):
            todo += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple, set)):
            todo += each
        elif type(each).__module__.startswith(("hf_lsam", "torch.optim")):
            todo += vars(each).values() if hasattr(each, "__dict__") else []
    return found


def bytes_a_parameter(root: Any, without: Any = ()) -> float:
    kept = storages(root)
    return round(sum(size for place, size in kept.items() if place not in storages(without)) / NUMEL, 2)


SETTINGS = [
    ({}, {}),
    ({"coupling": "decoupled"}, {}),
    ({"keeps_anchor_move": True}, {}),
    ({}, {"anchor_optimizer": "nesterov"}),
    ({"coupling": "decoupled"}, {"anchor_optimizer": "adam", "anchor_momentum_correction": 0.1}),
    ({"algorithm": "easgd"}, {"algorithm": "easgd"}),
    ({"algorithm": "lsgd"}, {"algorithm": "lsgd"}),
]


@pytest.mark.parametrize(("of_worker", "of_server"), SETTINGS)
def test_what_a_worker_and_a_server_keep_is_what_is_told(of_worker, of_server):
    worker_settings, server_settings = WorkerSettings(2, **of_worker), ServerSettings(2, **of_server)

    def run(alone: bool) -> tuple[Worker, nn.Parameter, ServerCore]:
        x = nn.Parameter(torch.ones(NUMEL))
        named = [("x", x)]
        if alone:
            link = Alone().join(JoinRequest(ParameterLayout(named), [x.detach()], server_settings))
        else:
            link = InProcessLink(ServerCore(torch.ones(NUMEL), server_settings))
        worker = Worker(named, link, worker_settings)
        worker.adopt_anchor()
        for _ in range(4):  # two exchanges: all that is made when it is first needed is there
            x.data += 0.1
            worker.after_optimizer_step([0.1])
        return worker, x, link._core

    worker, x, core = run(alone=True)
    assert bytes_a_parameter(worker, x) == worker_bytes(worker_settings, server_settings)
    assert bytes_a_parameter(core) == server_bytes(server_settings)

    worker, x, core = run(alone=False)
    assert bytes_a_parameter(worker, [x, core]) == worker_bytes(worker_settings)
    assert bytes_a_parameter(core) == server_bytes(server_settings)


def test_the_defaults_are_those_of_the_documentation():
    worker, server = WorkerSettings(4), ServerSettings(4)
    assert worker_bytes(worker, server) == worker_bytes(worker, server, accelerator=True) == 16
    assert (worker_bytes(worker), worker_bytes(worker, accelerator=True), server_bytes(server)) == (12, 16, 8)
    arguments, parameter = LoopArguments(), nn.Parameter(torch.zeros(1))
    of = {
        optimizer: server_bytes(arguments.server_settings(4, arguments.shared_momentum(optimizer([parameter]), 2)))
        for optimizer in (torch.optim.AdamW, NesterovAdamW)
    }
    assert of == {torch.optim.AdamW: 12, NesterovAdamW: 8}


@pytest.mark.parametrize(("of_worker", "of_server"), SETTINGS)
def test_what_a_worker_keeps_on_an_accelerator_is_what_is_told(of_worker, of_server):
    """On the meta device: vectors are made, and hold nothing."""
    x = nn.Parameter(torch.empty(NUMEL, device="meta"))
    link = InProcessLink(ServerCore(torch.ones(NUMEL), ServerSettings(2, **of_server)))
    worker = Worker([("x", x)], link, WorkerSettings(2, **of_worker))
    kept = [*vars(worker).values(), *getattr(worker._algorithm, "_known", [])]
    vectors = {each.untyped_storage()._cdata: each.untyped_storage() for each in kept if isinstance(each, Tensor)}
    told = worker_bytes(worker.settings, accelerator=True)
    assert round(sum(storage.nbytes() for storage in vectors.values()) / NUMEL, 2) == told


class Late(InProcessLink):
    """Looks at what is handed in when it is next asked, as a copy that takes its time would."""

    def __init__(self, core: ServerCore):
        super().__init__(core)
        self._under_way, self.looked = None, 0

    @property
    def can_push(self) -> bool:
        return self._under_way is None

    def push(self, total: Tensor, steps: int, version: int, loss: float = 0.0) -> None:
        self._status = self._status.after_push(0)
        self._under_way = total, total.clone(), steps, version, loss

    def answer(self) -> None:
        total, before, *others = self._under_way
        assert torch.equal(total, before)
        self._under_way, self.looked = None, self.looked + 1
        super().push(total, *others)


@pytest.mark.parametrize("algorithm", ["lsam", "easgd", "lsgd"])
def test_what_is_handed_in_stays_as_it_is_until_it_was_taken(algorithm):
    """Of a method that does not gather it step by step, on which one vector for both counts."""
    x = nn.Parameter(torch.zeros(4))
    core = ServerCore(torch.zeros(4), ServerSettings(2, algorithm=algorithm, moving_rate=0.1))
    link = Late(core)
    worker = Worker([("x", x)], link, WorkerSettings(2, coupling_strength=0.5, algorithm=algorithm))
    assert not worker._algorithm.accumulates
    worker.adopt_anchor()
    for step in range(1, 41):
        x.data += step
        worker.after_optimizer_step([0.1])
        if step == 21:  # stands still while others move the anchor far on, with a push under way
            link._status = replace(link.status, counted_at=None)
            core.anchor.version += 2 * MISSED_ANCHORS
            worker.pull_newest()
            assert torch.equal(x, worker.anchor)
            core.anchor.vector += 1.0
            core.anchor.version += 1
            worker.pull_newest()  # an anchor that does not hold the push: x has nothing of it any more
        if link._under_way and step % 3 == 0:
            link.answer()
    assert link.looked >= 8


def test_the_exchange_takes_in_shared_memory_what_is_told(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    run = {"fingerprint": "00", "settings": ServerSettings(4).as_dict()}
    folder = RunFolder.create(path, torch.zeros(NUMEL), 3, [], run)
    for number in range(3):
        folder.make_mailbox(number)
    vectors = [file.stat().st_size for file in path.iterdir() if file.name.startswith(("anchor_", "mailbox_"))]
    assert sum(vectors) == shared_bytes(3) * NUMEL


def test_the_doctor_says_it():
    said = [finding.text for alone in (True, False) for finding in memory_findings(alone, 10**9)]
    assert said[0].endswith("LSAM keeps 16 bytes a trained parameter in each worker: 14.90 GiB.")
    assert said[1].endswith("keeps 12 bytes (on a GPU 16) a trained parameter in each worker: 11.18 or 14.90 GiB.")
