"""What is no worker, or a broken one, talks to a real server: 110,000 messages that it reads, and nothing gives way."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from dataclasses import fields

import pytest
import torch

from hf_lsam.algorithms import ServerSettings
from hf_lsam.parameters import ParameterLayout
from hf_lsam.server.root import Root
from hf_lsam.server.service import Service
from hf_lsam.transport.channel import Channel
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.transport.messages import ANY_NUMBER, WORKER_MESSAGES, Heartbeat, Join, Push, Refusal, Welcome

MESSAGES = 110_000
NUMEL = 6
HEAD = struct.Struct("<IH")
MAGIC = 0x4C53414D
KINDS = [*WORKER_MESSAGES._numbers]
NUMBERS = (0, 1, 2, -1, 3, 7, 4096, 65534, 2**31 - 1, 2**31, 2**63 - 1, -(2**63))


class CountingService(Service):
    """Counts what joined workers said."""

    handled = 0

    def _handle(self, connection, message):
        self.handled += 1
        super()._handle(connection, message)


@pytest.fixture
def server(tmp_path):
    """A server that external workers join, in this process, driven by `turn`."""
    layout = ParameterLayout([("w", torch.zeros(NUMEL))])
    path = tmp_path / "run"
    path.mkdir()
    settings = ServerSettings(sync_steps=4, anchor_momentum_correction=0.0).as_dict()
    contents = {"fingerprint": layout.fingerprint.hex(), "settings": settings, "service": {"snapshot_seconds": 0.0}}
    folder = RunFolder.create(path, torch.zeros(NUMEL), 0, layout.manifest, contents)
    server = CountingService(folder, Root(folder))
    with server.listening():
        yield server


def fingerprint(server: Service) -> bytes:
    return bytes.fromhex(server.folder.run["fingerprint"])


def connect(server: Service) -> Channel:
    channel = server.folder.try_connect()
    server.turn(0.0)
    return channel


def join(server: Service, process: int) -> Channel:
    channel = connect(server)
    channel.send(Join(ANY_NUMBER, NUMEL, process, fingerprint(server)))
    server.turn(0.0)
    assert isinstance(channel.receive(), Welcome)
    return channel


def state_of(server: Service) -> dict[str, list]:
    """All that a message could change, but for who takes part."""
    state = {name: tensor.tolist() for name, tensor in server._core.state_tensors().items()}
    return {**state, "pushes": server._core.accepted_pushes, "counted": dict(server.counted._last)}


def raw(channel: Channel, data: bytes) -> None:
    """Sends bytes that need not be frames; the server may have hung up."""
    channel._socket.settimeout(0.0)
    with suppress(OSError):
        channel._socket.send(data)


def random_frame(generator: random.Random, kinds) -> bytes:
    """A message of one of the kinds, or one with a number that no kind has."""
    kind = generator.choice(kinds)
    if isinstance(kind, int):
        return (HEAD.pack(MAGIC, kind) + generator.randbytes(99))[: WORKER_MESSAGES.size]
    draw = {
        "int": lambda: generator.choice(NUMBERS) if generator.random() < 0.8 else generator.getrandbits(63),
        "bool": lambda: generator.random() < 0.5,
        "float": lambda: generator.choice([0.0, 1.0, float("nan"), float("inf"), -1e308]),
        "bytes": lambda: generator.randbytes(32),
        "Refusal": lambda: generator.choice([*Refusal]),
    }
    return WORKER_MESSAGES.pack(kind(*(draw[field.type]() for field in fields(kind))))


def garbled(generator: random.Random, frame: bytes) -> bytes:
    """A frame that is cut, stretched, changed in a few bits, or not one at all."""
    way = generator.randrange(5)
    if way == 0:
        return frame[: generator.randrange(len(frame))]
    if way == 1:
        return frame + generator.randbytes(generator.randrange(1, 200))
    if way == 2:
        changed = bytearray(frame)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        return bytes(changed)
    if way == 3:
        return generator.randbytes(generator.randrange(1, 128))
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_unknown_peers_change_nothing_whatever_they_send(server):
    generator = random.Random(0)
    worker = join(server, 1)
    worker.send(Push(1, 1, 0.0, True))
    server.turn(0.0)
    assert worker.receive().accepted
    before = state_of(server)
    not_join = [*(kind for kind in KINDS if kind is not Join), 0, 99, 65535]
    sent = 0
    while sent < MESSAGES // 2:
        channel = server.folder.try_connect()  # one each: the server hangs up at the first bad message
        frame = random_frame(generator, KINDS if generator.random() < 0.5 else not_join)
        raw(channel, frame if generator.random() < 0.3 else garbled(generator, frame))
        sent += 1
        server.turn(0.0)
        server.turn(0.0)
        channel.close()
    server.turn(0.0)
    assert state_of(server) == before
    assert list(server._workers) == [0]
    assert [path.name for path in server.folder.path.glob("mailbox_*")] == ["mailbox_0"]
    worker.send(Push(2, 4, 0.0, True))
    server.turn(0.0)
    assert worker.receive().accepted
    worker.close()


def test_a_worker_gone_mad_costs_only_itself(server):
    generator = random.Random(1)
    honest = join(server, 1)
    mailbox = server._workers[0].mailbox
    rounds = pushes = 0
    while server.handled < MESSAGES // 2:
        mad = join(server, 2 + rounds)
        number = next(n for n in server._workers if n != 0)
        server._workers[number].mailbox.fill_(generator.choice([0.0, float("nan"), float("inf")]))
        for push in range(1, 200):  # most are messages that a worker may send; the first that is not ends it
            steps = generator.choice([1, 4, 2**31 - 1])
            frame = WORKER_MESSAGES.pack(Push(push * 2**30, steps, 0.0, True))
            if generator.random() < 0.5:
                frame = random_frame(generator, [Heartbeat])
            elif generator.random() < 0.04:
                frame = random_frame(generator, [*KINDS, 0, 99])
            raw(mad, frame if generator.random() < 0.99 else garbled(generator, frame))
        for _ in range(3):
            server.turn(0.0)
        mad.close()
        server.turn(0.0)
        assert list(server._workers) == [0]
        rounds += 1
        if rounds % 20 == 0:  # the honest worker is served as before
            mailbox.fill_(0.0)
            pushes += 1
            honest.send(Push(pushes, 4, 0.0, True))
            server.turn(0.0)
            assert honest.receive().accepted
    assert pushes > 10
    assert server.counted._last[1] == pushes
    assert server._core.anchor.vector.isfinite().all()
    assert server.save()
    honest.close()


@pytest.mark.parametrize("second", [1, 2, 3, -5])
def test_a_push_that_is_replayed_or_comes_out_of_order_is_not_counted(server, second):
    worker = join(server, 1)
    worker.send(Push(3, 4, 0.0, True))
    server.turn(0.0)
    assert worker.receive().accepted
    before = state_of(server)
    worker.send(Push(second, 4, 0.0, True))
    server.turn(0.0)
    assert state_of(server) == before
    with pytest.raises(ConnectionError):
        worker.receive(5.0)
    worker.close()


def test_an_unknown_peer_that_says_nothing_holds_up_nobody_and_is_turned_away(server, monkeypatch):
    silent = [connect(server) for _ in range(70)]
    assert len(server._connections._selector.get_map()) == 1 + 64
    monkeypatch.setattr("hf_lsam.server.service.JOIN_SECONDS", -1.0)
    server._sweep_at = 0.0
    server.turn(0.0)
    assert len(server._connections._selector.get_map()) == 1
    monkeypatch.undo()
    join(server, 1).close()
    for channel in silent:
        channel.close()
