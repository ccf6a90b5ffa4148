"""The exchange between machines: who may join, what arrives, and what happens when the other side does not."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from launch import TIMEOUT, free_port
from netns import machines, why_not

from hf_lsam.compression import rounded
from hf_lsam.transport import gloo, peer
from hf_lsam.transport.gloo import JoinRefused, Listener, connect
from hf_lsam.transport.messages import JoinMachine, Live, Message, Refusal, Sum
from hf_lsam.transport.peer import Peer
from hf_lsam.transport.secret import new_secret, read_secret
from hf_lsam.transport.wire import MACHINE

SECRET = bytes(range(32))
FINGERPRINT = b"f" * 32
NUMEL = 300_000
SILENCE = 5.0  # seconds; a busy machine may keep a process from running for some

# The other side, as a process of its own: `node.py ROLE HOST PORT NUMEL`. It says on stdout what has happened.
NODE = """
import select, sys, time, torch
from hf_lsam.transport.gloo import Listener, connect
from hf_lsam.transport.messages import Live, Sum
from hf_lsam.transport.peer import Peer

role, host, port, numel = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
run = dict(secret=bytes(range(32)), run_id="run", fingerprint=b"f" * 32, numel=numel, silence=5.0)

def say(*words):
    print(*words, flush=True)

def messages(peer):
    while True:
        select.select([peer], [], [])
        try:
            message = peer.poll()
        except ConnectionError as error:
            say("lost:", error)
            return
        if message is not None:
            yield message

def post(peer, message, vector):
    while not peer.can_post:
        time.sleep(0.001)
    peer.post(message, vector)

def send_back(peer):
    for message, vector in messages(peer):
        peer.post(message, None if vector is None else vector.clone())

def exchange(peer, stream):
    peer.post(Live(0), torch.ones(numel))
    first = True
    for message, vector in messages(peer):
        if first:
            say("exchanged")
        first = False
        if stream:
            peer.post(message, vector.clone())

if role == "global":
    listener = Listener(host, port, allow_remote=True, **run)
    say(listener.address[1])
    while True:
        select.select([listener], [], [], 0.2)
        for peer in listener.accept():
            send_back(peer)
            peer.close()
if role == "liar":
    tell = Peer._send_frame
    Peer._send_frame = lambda self, what, message=None, bits=0, digest=bytes(32): tell(self, what, message, bits)
peer = connect((host, port), **run)
say("joined")
if role == "machine":
    send_back(peer)
elif role == "mute":
    time.sleep(600)
elif role == "liar":
    peer.post(Live(1), torch.ones(numel))
    send_back(peer)
elif role == "seeded":
    generator = torch.Generator().manual_seed(1)
    mine = [torch.randn(numel, generator=generator) for _ in range(8)]
    peer.post(Sum(8, 0), mine[0])
    number = 1
    for message, vector in messages(peer):
        if message == Live(9):
            break
        expected = torch.full((numel,), float(message.steps))
        assert torch.equal(vector, expected), message
        while not peer.can_post:
            time.sleep(0.001)
        if number < 8:
            peer.post(Sum(8, number), mine[number])
        number += 1
    say("all right", number)
else:
    stream = role == "stream"
    exchange(peer, stream)
    peer.close()
    peer = connect((host, port), **run)
    exchange(peer, stream)
peer.close()
"""


@pytest.fixture
def node(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts other sides; ends them with the test."""
    script = tmp_path / "node.py"
    script.write_text(NODE)
    started = []

    def start(
        role: str, address: tuple[str, int], numel: int = NUMEL, prefix: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        command = [*prefix, sys.executable, str(script), role, address[0], str(address[1]), str(numel)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as made:
        yield made


@contextmanager
def listening(**settings) -> Iterator[Listener]:
    defaults = {"host": "127.0.0.1", "port": 0, "secret": SECRET, "run_id": "run", "fingerprint": FINGERPRINT}
    made = Listener(**{**defaults, "numel": NUMEL, "silence": SILENCE, "handshake_timeout": 4.0, **settings})
    try:
        yield made
    finally:
        made.close()


def join(address: tuple[str, int], **different) -> Peer:
    settings = {"secret": SECRET, "run_id": "run", "fingerprint": FINGERPRINT, "numel": NUMEL, "timeout": TIMEOUT}
    return connect(address, **{**settings, "silence": SILENCE, **different})


def next_peer(listener: Listener) -> Peer:
    while True:  # pytest's timeout ends it
        select.select([listener], [], [], 0.1)
        if peers := listener.accept():
            return peers[0]


def next_message(peer: Peer) -> tuple[Message, torch.Tensor | None]:
    while True:
        select.select([peer], [], [])
        if (message := peer.poll()) is not None:
            return message


def arrived(peer: Peer) -> None:
    while not peer.can_post:
        select.select([peer], [], [], 0.01)


@contextmanager
def serving(listener: Listener) -> Iterator[list[Peer]]:
    """Lets the listener accept in a thread, while the test's own thread is the machine."""
    peers, ended = [], threading.Event()

    def accept() -> None:
        while not ended.is_set():
            select.select([listener], [], [], 0.05)
            peers.extend(listener.accept())

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield peers
    finally:
        ended.set()
        thread.join()
        for peer in peers:
            peer.close()


def read(connection: socket.socket, size: int) -> bytes:
    return gloo._read_exactly(connection, size, time.monotonic() + TIMEOUT)


def unproven(listener: Listener) -> tuple[socket.socket, bytes]:
    """A connection that has received its challenge."""
    connection = socket.create_connection(listener.address)
    assert listener.accept() == []
    return connection, read(connection, gloo._CHALLENGE.size)


def join_bytes(challenge: bytes, numel: int = NUMEL) -> bytes:
    """What a machine that knows the secret would say."""
    fields = gloo._JOIN.pack(gloo._MAGIC, b"n" * 32, gloo._run_digest("run"), FINGERPRINT, numel)
    return fields + gloo._proof(SECRET, MACHINE, challenge[8:] + fields)


def closed_by_listener(listener: Listener, connection: socket.socket) -> bool:
    """Waits until the listener has closed the connection; whatever it says before is dropped."""
    connection.setblocking(False)
    while True:
        assert listener.accept() == []
        try:
            if not connection.recv(4096):
                return True
        except BlockingIOError:
            time.sleep(0.01)
        except ConnectionResetError:
            return True


# --- secrets ---


def test_a_secret_is_read_as_it_was_written_and_never_overwritten(tmp_path):
    path = tmp_path / "secret"
    new_secret(path)
    assert path.stat().st_mode & 0o777 == 0o600
    secret = read_secret(path)
    assert len(secret) == 32
    with pytest.raises(FileExistsError):
        new_secret(path)
    assert read_secret(path) == secret
    assert list(tmp_path.iterdir()) == [path]
    new_secret(tmp_path / "other")
    assert read_secret(tmp_path / "other") != secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644, 0o777])
def test_a_secret_that_others_may_know_is_refused(tmp_path, mode):
    path = tmp_path / "secret"
    new_secret(path)
    path.chmod(mode)
    with pytest.raises(ValueError, match="chmod 600"):
        read_secret(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_of_another_user_is_refused(tmp_path):
    path = tmp_path / "secret"
    new_secret(path)
    os.chown(path, 65534, -1)
    with pytest.raises(ValueError, match="belongs to user 65534"):
        read_secret(path)


@pytest.mark.parametrize("content", [b"", b"no hex", b"ab" * 31, b"\xff" * 64])
def test_a_file_without_a_secret_is_refused(tmp_path, content):
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no secret"):
        read_secret(path)


# --- who may join ---


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"secret": b"x" * 32}, Refusal.SECRET),
        ({"run_id": "another run"}, Refusal.RUN),
        ({"fingerprint": b"g" * 32}, Refusal.FINGERPRINT),
        ({"numel": NUMEL + 1}, Refusal.LENGTH),
        (
            {"secret": b"x" * 32, "run_id": "another run"},
            Refusal.SECRET,
        ),  # without it, nothing else is told
    ],
)
def test_a_machine_that_does_not_belong_is_refused_with_the_reason(listener, caplog, different, reason):
    with serving(listener) as peers:
        with pytest.raises(JoinRefused, match=reason.name) as refused:
            join(listener.address, **different)
        assert refused.value.reason is reason
        assert f"refused a machine at 127.0.0.1: {reason.name}" in caplog.text
        assert peers == []
        join(listener.address).close()
        give_up = time.monotonic() + TIMEOUT
        while not peers and time.monotonic() < give_up:  # the other side may know of the link a moment later
            time.sleep(0.01)
        assert len(peers) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"secret": b"short"}, {"fingerprint": b"f"}, {"numel": 0}, {"silence": 0.1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_arguments_out_of_range_are_refused(listener, wrong):
    with pytest.raises(ValueError, match=r"not|less"), listening(**wrong):
        pass
    with pytest.raises(ValueError, match=r"not|less"):
        join(listener.address, **wrong)


@pytest.mark.parametrize(("host", "here"), [("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "::1")])
def test_other_machines_are_let_in_only_on_request(host, here):
    with pytest.raises(ValueError, match="allow_remote=True"), listening(host=host):
        pass
    with listening(host=host, allow_remote=True) as listener, serving(listener) as peers:
        join((here, listener.address[1])).close()
        assert len(peers) == 1


def test_a_machine_that_comes_before_the_server_waits_for_it(node):
    address = ("127.0.0.1", free_port())
    node("machine", address)
    time.sleep(0.5)
    with listening(port=address[1]) as listener:
        next_peer(listener).close()


def test_nobody_there_is_said_so():
    address = ("127.0.0.1", free_port())
    with pytest.raises(ConnectionError, match="Is the global server up"):
        join(address, timeout=0.1)


def test_a_recorded_join_does_not_work_twice(listener):
    first, challenge = unproven(listener)
    said = join_bytes(challenge)
    second, _ = unproven(listener)
    with first, second:
        first.sendall(said)
        second.sendall(said)
        while listener.accept() == [] and not select.select([second], [], [], 0.01)[0]:
            pass
        reply = read(second, gloo._ANSWER_BYTES)
        # A refusal for want of proof carries no proof either: the listener signs nothing for those without it.
        assert reply == gloo._ANSWER.pack(gloo._MAGIC, Refusal.SECRET) + bytes(32)
        assert closed_by_listener(listener, second)
        assert read(first, gloo._ANSWER_BYTES)[8] == 0


@pytest.mark.parametrize("trick", ["replay", "reflect", "nothing"])
def test_a_server_that_does_not_know_the_secret_is_not_joined(listener, trick):
    connection, challenge = unproven(listener)
    with connection:  # an attacker who has seen a good handshake
        said = join_bytes(challenge)
        connection.sendall(said)
        while not select.select([connection], [], [], 0.01)[0]:
            listener.accept()
        recorded = read(connection, gloo._ANSWER_BYTES)

    def impostor() -> None:
        with server.accept()[0] as machine:
            machine.sendall(challenge)
            its_join = read(machine, gloo._JOIN_BYTES)
            welcome = gloo._ANSWER.pack(gloo._MAGIC, 0)
            machine.sendall(
                {"replay": recorded, "reflect": welcome + its_join[-32:], "nothing": welcome + bytes(32)}[trick]
            )

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(JoinRefused) as refused:
            join(server.getsockname())
        thread.join()
    assert refused.value.reason is Refusal.SECRET


def test_a_connection_that_says_nothing_or_half_of_it_keeps_nobody_out():
    with listening(handshake_timeout=1.0) as listener:
        silent, _ = unproven(listener)
        half, challenge = unproven(listener)
        with silent, half:
            half.sendall(join_bytes(challenge)[:70])
            with serving(listener):
                join(listener.address).close()
            assert closed_by_listener(listener, silent)
            assert closed_by_listener(listener, half)


def test_pending_connections_are_limited_in_number():
    with listening(max_pending=3) as listener:
        inside = [unproven(listener)[0] for _ in range(3)]
        with socket.create_connection(listener.address) as one_more:
            assert closed_by_listener(listener, one_more)
        inside.pop().close()
        with serving(listener):
            join(listener.address).close()
        for connection in inside:
            connection.close()


@pytest.mark.parametrize("then", ["leaves", "is silent", "says nonsense"])
def test_a_machine_that_fails_half_way_through_its_join_keeps_nobody_out(listener, then):
    connection, challenge = unproven(listener)
    with connection:
        connection.sendall(join_bytes(challenge))
        while not select.select([connection], [], [], 0.01)[0]:
            listener.accept()
        assert read(connection, gloo._ANSWER_BYTES)[8] == 0
        if then == "leaves":
            connection.close()
        elif then == "says nonsense":
            connection.sendall(bytes(4096))
        with serving(listener) as peers:
            join(listener.address).close()
            assert len(peers) == 1


def test_ten_thousand_broken_handshakes_change_nothing(listener):
    dice = random.Random(0)

    def broken(challenge: bytes) -> bytes:
        good = bytearray(join_bytes(challenge))
        kind = dice.randrange(4)
        if kind == 0:
            return dice.randbytes(dice.randrange(1, 300))
        if kind == 1:
            return bytes(good[: dice.randrange(len(good))])
        if kind == 2:
            good[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
            return bytes(good)
        return gloo._MAGIC + dice.randbytes(dice.randrange(300))

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files(), threading.active_count()
    for _ in range(10_000):
        connection, challenge = unproven(listener)
        with connection:
            with suppress(ConnectionError):
                connection.sendall(broken(challenge))
        assert listener.accept() == []
    while files() != before[0]:
        assert listener.accept() == []
    assert (files(), threading.active_count()) == before
    with serving(listener) as peers:
        join(listener.address).close()
        assert len(peers) == 1


# --- what arrives ---


def test_vectors_arrive_bit_for_bit_in_order_in_both_directions_at_once(listener, node):
    process = node("seeded", listener.address)
    peer = next_peer(listener)
    generator = torch.Generator().manual_seed(1)
    expected = [torch.randn(NUMEL, generator=generator) for _ in range(8)]
    received = []
    for number in range(8):
        arrived(peer)
        peer.post(Sum(1, number), torch.full((NUMEL,), float(number)))
        message, vector = next_message(peer)
        assert message == Sum(8, number)
        received.append(vector.clone())
    for ours, its in zip(received, expected, strict=True):
        assert torch.equal(ours, its)
    peer.post(Live(9))
    assert process.stdout.read() == "joined\nall right 9\n"
    with pytest.raises(ConnectionError, match=r"closed the connection|Connection closed"):
        next_message(peer)
    peer.close()


def test_odd_bits_and_wide_integers_survive(listener, node):
    node("machine", listener.address)
    peer = next_peer(listener)
    bits = torch.arange(NUMEL, dtype=torch.int64).mul(2_654_435_761).to(torch.int32)  # NaNs and denormals among them
    message = JoinMachine(-(2**63), 2**63 - 1, -1, bytes(range(32)))
    peer.post(message, bits.view(torch.float32))
    answer, vector = next_message(peer)
    assert answer == message
    assert torch.equal(vector.view(torch.int32), bits)
    peer.close()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_vector_in_few_bits_arrives_as_it_was_rounded(listener, node, bits):
    node("machine", listener.address)
    peer = next_peer(listener)
    for number in range(2):
        vector = torch.randn(NUMEL, generator=torch.Generator().manual_seed(number))
        peer.post(Sum(number, 1), vector, bits)
        answer, back = next_message(peer)
        assert answer == Sum(number, 1)
        assert torch.equal(back, rounded(vector, bits))
        while not peer.can_post:
            time.sleep(0.001)
    peer.close()


def test_messages_without_vectors_keep_their_place_between_those_with(listener, node):
    node("machine", listener.address)
    peer = next_peer(listener)
    peer.post(Live(1), torch.ones(NUMEL))
    for kind in range(2, 50):
        peer.post(Live(kind))
    answers = [next_message(peer) for _ in range(49)]
    assert [message.workers for message, _ in answers] == list(range(1, 50))
    assert [vector is None for _, vector in answers] == [False] + [True] * 48
    peer.close()


def test_an_owner_that_does_not_poll_holds_the_other_side_up_and_loses_nothing(listener, node):
    node("mute", listener.address)
    peer = next_peer(listener)
    for number in range(2):  # its two buffers
        peer.post(Live(number), torch.ones(NUMEL))
        arrived(peer)
    peer.post(Live(2), torch.ones(NUMEL))
    time.sleep(0.3)
    assert not peer.can_post
    with pytest.raises(ValueError, match="only when `can_post`"):
        peer.post(Live(3), torch.ones(NUMEL))
    peer.close()


@pytest.mark.parametrize(
    "vector",
    [torch.ones(NUMEL - 1), torch.ones(NUMEL, dtype=torch.float64), torch.ones(NUMEL, 2)[:, 0]],
    ids=["length", "dtype", "strided"],
)
def test_a_vector_of_another_kind_is_refused(listener, node, vector):
    node("machine", listener.address)
    peer = next_peer(listener)
    with pytest.raises(ValueError, match=r"float32|contiguous"):
        peer.post(Live(1), vector)
    peer.close()


def test_what_has_arrived_is_delivered_before_the_loss_is_told(listener):
    with serving(listener) as peers:
        machine = join(listener.address)
        machine.post(Live(1), torch.full((NUMEL,), 7.0))
        machine.post(Live(2))
        arrived(machine)
        machine.close()
        message, vector = next_message(peers[0])
        assert message == Live(1)
        assert vector.eq(7.0).all()
        assert next_message(peers[0]) == (Live(2), None)
        with pytest.raises(ConnectionError):
            next_message(peers[0])


def test_the_loss_waits_for_a_message_that_the_other_side_was_told_has_arrived(listener, monkeypatch):
    go_on = threading.Event()
    tell = Peer._send_frame

    def pausing(self, what, *rest):
        tell(self, what, *rest)
        if what == peer._ARRIVED:
            go_on.wait(TIMEOUT)  # the thread that receives may be stopped anywhere

    with serving(listener) as peers:
        machine = join(listener.address)
        monkeypatch.setattr(Peer, "_send_frame", pausing)
        machine.post(Live(1))
        arrived(machine)
        machine.close()
        while peers[0]._lost is None:
            select.select([peers[0]], [], [], 0.01)
        assert peers[0].poll() is None
        go_on.set()
        assert next_message(peers[0]) == (Live(1), None)
        with pytest.raises(ConnectionError):
            next_message(peers[0])


# --- what goes wrong ---


@pytest.mark.parametrize("state", ["idle", "in a vector"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_dies_or_stops_is_noticed(listener, node, how, state):
    process = node("mute", listener.address)
    peer = next_peer(listener)
    if state == "in a vector":
        for number in range(2):
            peer.post(Live(number), torch.ones(NUMEL))
            arrived(peer)
        peer.post(Live(2), torch.ones(NUMEL))
        time.sleep(0.2)
    process.send_signal(how)
    with pytest.raises(ConnectionError, match="no sign of life" if how is signal.SIGSTOP else "[Cc]onnection"):
        next_message(peer)
    assert peer.poll() is None  # told once
    assert not peer.can_post
    peer.post(Live(4), torch.ones(NUMEL))
    peer.close()
    peer.close()


def test_a_machine_that_was_stopped_finds_itself_alone_and_others_go_on(listener, node):
    stopped = node("machine", listener.address)
    peer = next_peer(listener)
    node("machine", listener.address)
    other = next_peer(listener)
    stopped.send_signal(signal.SIGSTOP)
    with pytest.raises(ConnectionError, match="no sign of life"):
        next_message(peer)
    peer.close()
    other.post(Live(1), torch.ones(NUMEL))
    assert next_message(other)[1].sum() == NUMEL
    stopped.send_signal(signal.SIGCONT)
    assert "lost:" in stopped.stdout.read()
    other.close()


def test_a_vector_that_is_not_what_was_announced_ends_the_connection(listener, node):
    process = node("liar", listener.address)
    peer = next_peer(listener)
    with pytest.raises(ConnectionError, match="a vector arrived changed"):
        next_message(peer)
    peer.close()
    assert "lost:" in process.stdout.read()


def test_a_changed_frame_ends_the_connection(listener):
    """Through a relay, as somebody on the way would have it."""
    flip = threading.Event()
    ended = threading.Event()

    def relay() -> None:
        machine, _ = front.accept()
        with machine, socket.create_connection(listener.address) as back:
            while not ended.is_set():
                for source in select.select([machine, back], [], [], 0.05)[0]:
                    data = bytearray(source.recv(1 << 16))
                    if not data:
                        return
                    if source is machine and flip.is_set():
                        data[3] ^= 1
                    (back if source is machine else machine).sendall(data)

    with socket.create_server(("127.0.0.1", 0)) as front, serving(listener) as peers:
        thread = threading.Thread(target=relay)
        thread.start()
        machine = join(front.getsockname())
        while not peers:
            time.sleep(0.01)
        machine.post(Live(1))
        assert next_message(peers[0])[0] == Live(1)
        flip.set()
        machine.post(Live(1))
        with pytest.raises(ConnectionError, match="not the other side's"):
            next_message(peers[0])
        machine.close()
        ended.set()
        thread.join()


def test_a_process_that_forgets_to_close_ends_without_a_crash(listener, node, tmp_path):
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import sys\nfrom hf_lsam.transport.gloo import connect\n"
        "peer = connect(('127.0.0.1', int(sys.argv[1])), bytes(range(32)), 'run', b'f' * 32, int(sys.argv[2]))\n"
    )
    with serving(listener):
        command = [sys.executable, str(script), str(listener.address[1]), str(NUMEL)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, "")


# --- between machines ---

# The host's name resolves nowhere: what Gloo listens on must come from elsewhere.
NAMELESS = ("unshare", "--uts", "sh", "-c", 'echo no-such-host > /proc/sys/kernel/hostname; exec "$@"', "sh")


@pytest.mark.parametrize("role", ["stream", "now and then"])
def test_a_cut_link_is_noticed_on_both_sides_and_a_new_join_works_once_it_is_back(node, role):
    if reason := why_not():
        pytest.skip(reason)
    with machines(2) as (server, worker):
        server_process = node("global", (server.address, 0), prefix=(*server.prefix, *NAMELESS))
        address = (server.address, int(server_process.stdout.readline()))
        process = node(role, address, prefix=(*worker.prefix, *NAMELESS))
        assert process.stdout.readline() == "joined\n"
        assert process.stdout.readline() == "exchanged\n"
        worker.cut()
        for side in (process, server_process):  # the control connection, or Gloo's own, whichever is sooner
            noticed = side.stdout.readline()
            assert "no sign of life" in noticed or "Timed out" in noticed
        worker.restore()
        assert process.stdout.readline() == "exchanged\n"
