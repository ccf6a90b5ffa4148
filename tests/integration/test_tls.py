"""Links between machines: who may join, what arrives, and what happens when the other side does not."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch
from launch import PATHS, TIMEOUT, free_port, wait_until
from netns import machines, why_not
from wiretap import Wiretap

from hf_lsam.compression import encoded_bytes, round_
from hf_lsam.transport import peer as peer_module
from hf_lsam.transport import tls
from hf_lsam.transport.messages import MACHINE_MESSAGES, JoinMachine, Live, Message, Refusal, Sum
from hf_lsam.transport.peer import Peer
from hf_lsam.transport.secret import derive_certificate, new_secret, read_secret
from hf_lsam.transport.tls import JoinRefused, Listener, connect

SECRET = bytes(range(32))
FINGERPRINT = b"f" * 32
NUMEL = 300_000
LARGE = 10_000_000  # more than lies in the sockets' buffers
SILENCE = 5.0  # seconds; a busy machine may keep a process from running for some

# The other side, as a process of its own: `node.py ROLE HOST PORT NUMEL`. It says on stdout what has happened.
NODE = """
import select, sys, time, torch
from hf_lsam.transport.messages import Live, Sum
from hf_lsam.transport.tls import Listener, connect

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
peer = connect((host, port), **run)
say("joined")
if role == "machine":
    send_back(peer)
elif role == "mute":
    time.sleep(600)
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
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
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


def joins_alone(address: tuple[str, int], peers: list[Peer]) -> None:
    """A machine is let in, and it is the first: what came before was not."""
    join(address).close()
    wait_until(lambda: peers)  # the other side may know of the link a moment later
    assert len(peers) == 1


def unproven(listener: Listener) -> socket.socket:
    """A connection that the listener has taken in."""
    connection = socket.create_connection(listener.address)
    assert listener.accept() == []
    return connection


def client_hello() -> bytes:
    """What a machine that knows the secret says first."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        tls._context(SECRET, ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


def proven(listener: Listener) -> ssl.SSLSocket:
    """A connection of one that knows the secret, and has said nothing yet."""
    context = tls._context(SECRET, ssl.PROTOCOL_TLS_CLIENT)
    return context.wrap_socket(unproven(listener))  # a thread of the listener's answers


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
        wait_until(lambda: f"refused a machine at 127.0.0.1: {reason.name}" in caplog.text)
        joins_alone(listener.address, peers)


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
        joins_alone((here, listener.address[1]), peers)


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


def test_one_port_is_all_that_listens(listener):
    def listening() -> set[int]:  # tests before may have left some in this process
        connections = psutil.Process().net_connections("tcp")
        return {connection.laddr.port for connection in connections if connection.status == psutil.CONN_LISTEN}

    before = listening()
    assert listener.address[1] in before
    with serving(listener):
        peer = join(listener.address)
        during = listening()
        peer.close()
    assert during == before


def test_all_machines_derive_one_certificate_from_the_secret_and_no_other_secret_gives_it():
    key, certificate = derive_certificate(SECRET)
    assert derive_certificate(SECRET) == (key, certificate)
    for other in (bytes(32), SECRET + b"x"):
        assert not {key, certificate} & {*derive_certificate(other)}
    # Machines with other versions of cryptography and OpenSSL must come to the same bytes.
    assert hashlib.sha256(certificate).hexdigest() == "b47ddf7612ffafaff2dcbdabf4e8b3f88dd0f97e80f699f3eb00b31bf899c0ac"


def test_what_was_recorded_on_the_way_opens_no_link_and_tells_nothing(listener, caplog):
    vector = torch.full((NUMEL,), 1.25)
    with serving(listener) as peers, Wiretap(listener.address) as tap:
        machine = join(tap.address)
        wait_until(lambda: peers)
        machine.post(Sum(123_456_789, 1), vector)
        message, came = next_message(peers[0])
        assert torch.equal(came, vector)
        machine.close()
        tap.close()
        sent = tap.recorded["to server"]
        assert len(sent) > vector.nbytes
        assert vector[:16].numpy().tobytes() not in sent
        assert MACHINE_MESSAGES.pack(message)[:20] not in sent
        with socket.create_connection(listener.address) as replay:
            with suppress(ConnectionError):  # it hangs up early
                replay.sendall(sent)
            replay.settimeout(TIMEOUT)
            with suppress(ConnectionError):
                while replay.recv(4096):
                    pass
        wait_until(lambda: "refused a machine at 127.0.0.1: SECRET" in caplog.text)
        assert len(peers) == 1


@pytest.mark.parametrize("trick", ["replay", "reflect", "nothing", "another secret", "no certificate"])
def test_a_server_that_does_not_know_the_secret_is_not_joined(listener, trick):
    with serving(listener), Wiretap(listener.address) as tap:  # an attacker who has seen a good link
        join(tap.address).close()
    recorded = tap.recorded["from server"]

    def impostor() -> None:
        while True:
            try:
                machine, _ = server.accept()
            except OSError:  # the test has ended
                return
            with machine, suppress(OSError):
                if trick in ("another secret", "no certificate"):
                    context = tls._context(bytes(32), ssl.PROTOCOL_TLS_SERVER)
                    if trick == "no certificate":  # anonymous suites, which prove nothing
                        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                        context.set_ciphers("aNULL:@SECLEVEL=0")
                    context.verify_mode = ssl.CERT_NONE
                    context.wrap_socket(machine, server_side=True).recv(4096)
                else:
                    machine.sendall({"replay": recorded, "reflect": machine.recv(4096), "nothing": bytes(4096)}[trick])

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=impostor)
        thread.start()
        try:
            with pytest.raises((JoinRefused, ConnectionError)) as refused:
                join(server.getsockname(), timeout=1.0)
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
    if trick == "another secret":
        assert refused.value.reason is Refusal.SECRET


@pytest.mark.parametrize("certificate", [None, bytes(32)], ids=["none", "of another secret"])
def test_an_unknown_peer_that_trusts_anybody_is_refused_all_the_same(listener, certificate, caplog):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if certificate is not None:
        context = tls._context(certificate, ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with serving(listener) as peers:
        with context.wrap_socket(socket.create_connection(listener.address)) as connection:
            with suppress(OSError):
                connection.sendall(MACHINE_MESSAGES.pack(tls._open_link("run", FINGERPRINT, NUMEL)))
                assert not connection.recv(4096)
        joins_alone(listener.address, peers)
    assert "refused a machine at 127.0.0.1: SECRET" in caplog.text


def test_a_connection_that_says_nothing_or_half_of_it_keeps_nobody_out():
    with listening(handshake_timeout=1.0) as listener:
        with unproven(listener) as silent, unproven(listener) as half:
            half.sendall(client_hello()[:70])
            with serving(listener):
                join(listener.address).close()
            assert closed_by_listener(listener, silent)
            assert closed_by_listener(listener, half)


def test_pending_connections_are_limited_in_number():
    with listening(max_pending=3) as listener:
        inside = [unproven(listener) for _ in range(3)]
        with socket.create_connection(listener.address) as one_more:
            assert closed_by_listener(listener, one_more)
        inside.pop().close()
        with serving(listener):
            join(listener.address).close()
        for connection in inside:
            connection.close()


@pytest.mark.parametrize("then", ["leaves", "is silent", "says nonsense", "says something else"])
def test_a_machine_that_fails_half_way_through_its_join_keeps_nobody_out(listener, then):
    with proven(listener) as connection:
        if then == "leaves":
            connection.close()
        elif then == "says nonsense":
            connection.sendall(bytes(4096))
        elif then == "says something else":
            connection.sendall(MACHINE_MESSAGES.pack(Live(1)))
        with serving(listener) as peers:
            joins_alone(listener.address, peers)


def test_a_thousand_broken_handshakes_change_nothing(listener):
    dice = random.Random(0)
    hello = client_hello()

    def broken() -> bytes:
        good = bytearray(hello)
        kind = dice.randrange(4)
        if kind == 0:
            return dice.randbytes(dice.randrange(1, 300))
        if kind == 1:
            return bytes(good[: dice.randrange(len(good))])
        if kind == 2:
            good[dice.randrange(len(good))] ^= 1 << dice.randrange(8)
            return bytes(good)
        return bytes(good[:5]) + dice.randbytes(dice.randrange(300))

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files(), threading.active_count()
    for _ in range(1_000):
        with unproven(listener) as connection, suppress(ConnectionError):
            connection.sendall(broken())
        assert listener.accept() == []
    while (files(), threading.active_count()) != before:
        assert listener.accept() == []
        time.sleep(0.01)
    with serving(listener) as peers:
        joins_alone(listener.address, peers)


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
    with pytest.raises(ConnectionError, match="closed the connection"):
        next_message(peer)
    peer.close()


def test_odd_bits_and_wide_integers_survive(listener, node):
    node("machine", listener.address)
    peer = next_peer(listener)
    bits = torch.arange(NUMEL, dtype=torch.int64).mul(2_654_435_761).to(torch.int32)  # NaNs and denormals among them
    message = JoinMachine(-(2**63), 2**63 - 1, -1, bytes(range(32)), 2**63 - 1)
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
        assert torch.equal(back, round_(vector.clone(), bits))
        while not peer.can_post:
            time.sleep(0.001)
    vectors = 2 * (encoded_bytes(NUMEL, bits) + 4 * NUMEL)  # and back in float32
    assert vectors < peer.bytes_moved < vectors + 20_000
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


def test_an_owner_that_does_not_poll_holds_the_other_side_up_and_loses_nothing(listener):
    with serving(listener) as peers:
        machine = join(listener.address)
        wait_until(lambda: peers)
        machine.post(Live(0), torch.zeros(NUMEL))
        arrived(machine)
        machine.post(Live(1), torch.ones(NUMEL))  # that fills both buffers
        while len(peers[0]._inbox) < 2:
            time.sleep(0.01)
        time.sleep(0.1)
        assert not machine.can_post
        with pytest.raises(ValueError, match="only when `can_post`"):
            machine.post(Live(2), torch.ones(NUMEL))
        for number in range(2):
            message, vector = next_message(peers[0])
            assert message == Live(number)
            assert vector.eq(number).all()
        arrived(machine)  # the first buffer is free again
        machine.post(Live(2), torch.full((NUMEL,), 2.0))
        assert next_message(peers[0])[1].eq(2.0).all()
        machine.close()


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


# --- what goes wrong ---


@pytest.mark.parametrize("state", ["idle", "in a vector"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_machine_that_dies_or_stops_is_noticed(node, how, state):
    numel = NUMEL if state == "idle" else LARGE
    with listening(numel=numel) as listener:
        process = node("mute", listener.address, numel)
        peer = next_peer(listener)
        if state == "in a vector":
            process.send_signal(signal.SIGSTOP)
            peer.post(Live(2), torch.ones(numel))
            time.sleep(0.2)
        process.send_signal(how)
        with pytest.raises(ConnectionError, match="no sign of life" if how is signal.SIGSTOP else "[Cc]onnection"):
            next_message(peer)
        assert peer.poll() is None  # told once
        assert not peer.can_post
        peer.post(Live(4), torch.ones(numel))
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


@pytest.mark.parametrize("after", [0, 20, 100_000], ids=["type of a record", "frame", "vector"])
@pytest.mark.parametrize("way", ["to server", "from server"])
def test_a_changed_byte_ends_the_connection_and_nothing_of_it_is_delivered(listener, after, way):
    with serving(listener) as peers, Wiretap(listener.address) as tap:
        machine = join(tap.address)
        wait_until(lambda: peers)
        sender, receiver = (machine, peers[0]) if way == "to server" else (peers[0], machine)
        sender.post(Live(1))
        assert next_message(receiver)[0] == Live(1)
        arrived(sender)
        tap.flip(way, after)
        sender.post(Live(2), torch.ones(NUMEL))
        with pytest.raises(ConnectionError, match=r"bad record (mac|type)"):
            next_message(receiver)
        receiver.close()
        with pytest.raises(ConnectionError):
            next_message(sender)
        sender.close()


def test_a_key_that_has_sent_as_much_as_one_may_ends_with_its_link(listener, monkeypatch):
    with serving(listener) as peers:
        machine = join(listener.address)
        wait_until(lambda: peers)
        monkeypatch.setattr(peer_module, "_MOST_RECORDS", 100)
        for number in range(100):
            machine.post(Live(number))
        with pytest.raises(ConnectionError, match="as much as it may"):
            next_message(machine)
        machine.close()


def test_a_frame_that_no_machine_sends_ends_the_connection(listener):
    with serving(listener) as peers, proven(listener) as connection:
        connection.sendall(MACHINE_MESSAGES.pack(tls._open_link("run", FINGERPRINT, NUMEL)))
        wait_until(lambda: peers)
        connection.sendall(b"\xff" * 4096)
        with pytest.raises(ConnectionError, match="unexpected frame"):
            next_message(peers[0])


def test_a_process_that_forgets_to_close_ends_without_a_crash(listener, node, tmp_path):
    script = tmp_path / "forgetful.py"
    script.write_text(
        "import sys\nfrom hf_lsam.transport.tls import connect\n"
        "peer = connect(('127.0.0.1', int(sys.argv[1])), bytes(range(32)), 'run', b'f' * 32, int(sys.argv[2]))\n"
    )
    with serving(listener):
        command = [sys.executable, str(script), str(listener.address[1]), str(NUMEL)]
        environment = {**os.environ, "PYTHONPATH": PATHS}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stderr) == (0, "")


# --- between machines ---


@pytest.mark.parametrize("role", ["stream", "now and then"])
def test_a_cut_link_is_noticed_on_both_sides_and_a_new_join_works_once_it_is_back(node, role):
    if reason := why_not():
        pytest.skip(reason)
    with machines(2) as (server, worker):
        server_process = node("global", (server.address, 0), prefix=tuple(server.prefix))
        address = (server.address, int(server_process.stdout.readline()))
        process = node(role, address, prefix=tuple(worker.prefix))
        assert process.stdout.readline() == "joined\n"
        assert process.stdout.readline() == "exchanged\n"
        worker.cut()
        for side in (process, server_process):
            assert "no sign of life" in side.stdout.readline()
        worker.restore()
        assert process.stdout.readline() == "exchanged\n"


@pytest.mark.parametrize("said", [b"", b"x"])
def test_a_connection_that_is_reset_at_once_is_no_more_than_that(listener, said):
    """As a port scan or a load balancer's check leaves it; taken in only once the reset has come."""
    for _ in range(3):
        stranger = socket.create_connection(listener.address)
        stranger.sendall(said)
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stranger.close()
    time.sleep(0.1)
    deadline = time.monotonic() + TIMEOUT
    while listener._joining and time.monotonic() < deadline:
        assert listener.accept() == []
    assert listener.accept() == []
