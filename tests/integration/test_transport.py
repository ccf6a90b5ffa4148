"""The contract of a transport: one that this package does not know is written, named in one line, and trained over."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pipe_transport
import pytest
import torch
from lockstep import SYNC_STEPS, LockstepProblem, digest, initial_parameters
from models import arguments, blobs, net, vector
from pipe_transport import PipeTransport

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.identity import Identity
from hf_lsam.joining import TRANSPORTS, Timeouts, transport_of
from hf_lsam.parameters import ParameterLayout
from hf_lsam.run import Run
from hf_lsam.server.core import ServerCore
from hf_lsam.transport import messages
from hf_lsam.transport.base import JoinRequest, Link, LinkStatus, ServerGone, Transport
from hf_lsam.transport.in_process import InProcessLink


@pytest.fixture
def pipes(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "pipe", PipeTransport)


@contextmanager
def served(path: Path, workers: int, settings: ServerSettings, ends_with: int = 0) -> Iterator[str]:
    """Inside, a process serves the pipes at the address; it ends by itself, with a code."""
    command = [sys.executable, pipe_transport.__file__, str(path), str(workers), json.dumps(settings.as_dict())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline() == "listening\n"
            yield f"pipe://{path}"
        except BaseException:
            server.kill()
            raise
    assert server.returncode == ends_with


def test_workers_over_a_new_transport_are_workers_of_one_process_bit_for_bit(tmp_path, pipes):
    settings = ServerSettings(SYNC_STEPS, 0.7, 0.3)
    order = [0, 1, 1, 0, 0, 1, 0, 1]

    def end(problems, workers) -> list[list[str]]:
        for rank in order:
            problems[rank].run_period(workers[rank])
            for worker in workers:
                worker.pull_newest()
        for worker in workers:
            worker.finish()
        return [digest(problem.parameters, worker.anchor) for problem, worker in zip(problems, workers, strict=True)]

    with served(tmp_path / "socket", 2, settings) as address:
        problems = [LockstepProblem(rank) for rank in range(2)]
        transports = [transport_of(address, Timeouts()) for _ in problems]
        links = join_both(transports, problems, settings)
        workers = [p.make_worker(link, WorkerSettings(SYNC_STEPS)) for p, link in zip(problems, links, strict=True)]
        over_pipes = end(problems, workers)
        statuses = [link.status for link in links]
        for link, transport in zip(links, transports, strict=True):
            link.close()
            transport.leave(finished=True)

    core = ServerCore(torch.cat([p.detach().flatten() for p in initial_parameters()]), settings)
    problems = [LockstepProblem(rank) for rank in range(2)]
    links = [InProcessLink(core, rank) for rank in range(2)]
    workers = [p.make_worker(link, WorkerSettings(SYNC_STEPS)) for p, link in zip(problems, links, strict=True)]
    assert end(problems, workers) == over_pipes
    for over_pipe, here in zip(statuses, [link.status for link in links], strict=True):
        assert (over_pipe.accepted, over_pipe.staleness_sum) == (here.accepted, here.staleness_sum)
        assert over_pipe.finished
        assert here.finished
        assert over_pipe.bytes_pushed == 4 * core.anchor.vector.numel() * here.accepted


def join_both(transports: list[Transport], problems: list[LockstepProblem], settings: ServerSettings) -> list[Link]:
    """A worker is let in when all are there."""
    requests = [
        JoinRequest(ParameterLayout(list(p.model.named_parameters())), [q.detach() for q in p.parameters], settings)
        for p in problems
    ]
    with ThreadPoolExecutor() as pool:
        links = list(pool.map(lambda pair: pair[0].join(pair[1]), zip(transports, requests, strict=True)))
    return sorted(links, key=lambda link: link.worker)


def test_a_trainer_joins_by_the_address_of_a_new_transport(tmp_path, pipes):
    with served(tmp_path / "socket", 1, ServerSettings(sync_steps=4)) as address:
        fields = {"sync_steps": 4, "max_steps": 24, "sam_rho": 0.05, "server_address": address, "share_steps": True}
        trainer = LSAMTrainer(model=net(), args=arguments(LSAMConfig, tmp_path, **fields), train_dataset=blobs())
        before = vector(trainer.model)
        trainer.train()
    worker, summary = trainer.worker, trainer.worker_summary()
    assert worker.local_steps == worker.link.steps_begun == 24
    assert worker.version == worker.link.status.accepted >= 1  # with one worker each push is an update
    assert summary["pushes"] + summary["skipped_pushes"] >= 24 // 4
    assert summary["bytes_pushed"] == 4 * worker.layout.numel * summary["pushes"]
    assert torch.equal(vector(trainer.model), worker.anchor)
    assert not torch.equal(worker.anchor, before)


def test_a_server_that_has_ended_is_an_error_of_the_contract(tmp_path, pipes):
    with served(tmp_path / "socket", 1, ServerSettings(SYNC_STEPS), ends_with=1) as address:
        run = Run(Identity(), tmp_path, tmp_path / "log", address)
        worker = run.join([("x", torch.nn.Parameter(torch.zeros(3)))], WorkerSettings(SYNC_STEPS), ServerSettings(4))
        worker.link._connection.send_bytes(b"no frame")
        with pytest.raises(ServerGone):
            worker.finish()
        run.leave(failed=True)


def test_an_address_that_no_transport_knows_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(ValueError, match=r"there is no transport for pigeon://.*file://"):
        Run(Identity(), tmp_path, tmp_path / "log", "pigeon://roof")


def test_a_status_is_a_value_and_nobody_writes_it():
    status = LinkStatus()
    with pytest.raises(FrozenInstanceError):
        status.accepted = 1
    answered = status.after_push(8).after_answer(True, 3, 2).after_push(8).after_answer(False, 5)
    assert (answered.accepted, answered.refused, answered.refused_in_a_row, answered.counted_at) == (1, 1, 1, 5)
    assert (answered.staleness_sum, answered.staleness_max, answered.bytes_pushed) == (2, 2, 16)
    assert answered.after_push(8).counted_at is None
    assert status == LinkStatus()


@pytest.mark.parametrize("vocabulary", [messages.WORKER_MESSAGES, messages.MACHINE_MESSAGES], ids=["worker", "machine"])
def test_every_message_comes_out_of_its_frame_as_it_went_in_and_of_one_size(vocabulary):
    values = {"int": -(2**63), "bool": True, "float": 0.5, "bytes": bytes(range(32)), "Refusal": messages.Refusal.TAKEN}
    for kind in vocabulary._numbers:
        message = kind(*(values[field.type] for field in fields(kind)))
        frame = vocabulary.pack(message)
        assert len(frame) == vocabulary.size
        assert vocabulary.unpack(frame) == message
        assert type(vocabulary.unpack(frame)) is kind


@pytest.mark.parametrize("change", [{0: 1}, {4: 99}, {4: 8, 6: 77}], ids=["another protocol", "no kind", "no reason"])
def test_a_frame_that_is_no_message_is_an_error(change):
    frame = bytearray(messages.WORKER_MESSAGES.pack(messages.Refused(messages.Refusal.TAKEN)))
    assert frame[4] == 8
    for position, byte in change.items():
        frame[position] = byte
    with pytest.raises(ValueError, match=r"not a frame|not a valid Refusal"):
        messages.WORKER_MESSAGES.unpack(bytes(frame))
