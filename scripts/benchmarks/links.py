"""How fast are vectors sent between machines, compared with a bare connection that sends the same bytes?

    python scripts/benchmarks/links.py --output benchmarks/links.json

A process sends vectors to another one, over loopback, and over a link of a given speed between two network namespaces
(which needs root and iproute2). Within one run these modes alternate, each timed from the first byte until the receiver
has acknowledged everything:

    tcp     a plain socket moves as many bytes, and does nothing with them: the yardstick
    curve   pyzmq moves as many bytes, encrypted and authenticated with CURVE: an alternative basis for the link
    link    a `Peer` sends the vector as servers do: encoded in few bits, encrypted, received and decoded again
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from pathlib import Path

import torch
import zmq

from hf_lsam.compression import encoded_bytes
from hf_lsam.transport.messages import Live
from hf_lsam.transport.peer import Peer
from hf_lsam.transport.tls import Listener, connect
from recipes.common.progress import add_quiet, track
from recipes.common.tables import markdown_table
from scripts.common.benchmark import write_benchmark
from tests.netns import machines, why_not

NAME = "links"  # of benchmarks/links.json
MODES = ("tcp", "curve", "link")
PIECE = 1 << 16  # bytes per message of pyzmq; with 1 MiB it was slower
SECRET = bytes(range(32))
RUN = {"run_id": "benchmark", "fingerprint": bytes(32)}
KEY, SECRET_KEY = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", b"JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"  # any pair


def receive(host: str, numels: list[int]) -> None:
    """The receiving process: prints where it listens, and receives until it is killed."""
    torch.set_num_threads(1)
    plain = socket.create_server((host, 0))
    router = zmq.Context().socket(zmq.ROUTER)
    router.curve_server, router.curve_secretkey = True, SECRET_KEY
    curve = router.bind_to_random_port(f"tcp://{host}")
    listeners = {n: Listener(host, 0, SECRET, numel=n, allow_remote=True, **RUN) for n in numels}
    threads = [
        threading.Thread(target=take_bytes, args=(plain,)),
        threading.Thread(target=take_messages, args=(router,)),
    ]
    threads += [threading.Thread(target=take_vectors, args=(listener,)) for listener in listeners.values()]
    for thread in threads:
        thread.start()
    ports = {n: listener.address[1] for n, listener in listeners.items()}
    print(json.dumps({"tcp": plain.getsockname()[1], "curve": curve, "link": ports}), flush=True)


def take_bytes(plain: socket.socket) -> None:
    connection, _ = plain.accept()
    buffer = memoryview(bytearray(1 << 20))
    while size := int.from_bytes(connection.recv(8, socket.MSG_WAITALL)):
        while size:
            size -= connection.recv_into(buffer[: min(size, len(buffer))])
        connection.sendall(b"!")


def take_messages(router: zmq.Socket) -> None:
    while True:
        sender, head = router.recv_multipart()
        size = int.from_bytes(head)
        while size:
            size -= len(router.recv_multipart(copy=False)[1])
        router.send_multipart([sender, b"!"])


def take_vectors(listener: Listener) -> None:
    peers: list[Peer] = []
    while True:
        select.select([listener, *peers], [], [])
        peers += listener.accept()
        for peer in peers:
            with suppress(ConnectionError):  # everything has been measured, and this process is about to be killed
                while peer.poll() is not None:
                    pass


def send(host: str, ports: dict, numel: int, bits: int, rounds: int) -> dict[str, list[float]]:
    """The sending process: returns the seconds of each round by mode, after one round that is not counted."""
    torch.set_num_threads(1)
    vector = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    data = memoryview(bytes(encoded_bytes(numel, bits)))
    head = len(data).to_bytes(8)
    plain = socket.create_connection((host, ports["tcp"]))
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.curve_serverkey = KEY
    dealer.curve_publickey, dealer.curve_secretkey = zmq.curve_keypair()
    dealer.connect(f"tcp://{host}:{ports['curve']}")
    peer = connect((host, ports["link"][str(numel)]), SECRET, numel=numel, **RUN)

    def tcp() -> None:
        plain.sendall(head)
        plain.sendall(data)
        plain.recv(1)

    def curve() -> None:
        dealer.send(head)
        for begin in range(0, len(data), PIECE):
            dealer.send(data[begin : begin + PIECE], copy=False)
        dealer.recv()

    def link() -> None:
        peer.post(Live(0), vector, bits)
        while not peer.can_post:
            select.select([peer], [], [], 1.0)
            peer.poll()

    ways: dict[str, Callable[[], None]] = {"tcp": tcp, "curve": curve, "link": link}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(1 + rounds):
        for mode in MODES:
            begin = time.perf_counter()
            ways[mode]()
            seconds[mode].append(time.perf_counter() - begin)
    plain.sendall(bytes(8))
    peer.close()
    dealer.close(linger=0)
    return {mode: each[1:] for mode, each in seconds.items()}


def cross(numel: int, bits: int, rounds: int, host: str, here: list[str], there: list[str]) -> list[dict]:
    """One row per mode, from two processes whose commands are prefixed with `here` and `there`."""
    command = [sys.executable, __file__, "--host", host, "--numel", str(numel)]
    receiver = subprocess.Popen([*there, *command, "--receive"], stdout=subprocess.PIPE, text=True)
    try:
        ports = receiver.stdout.readline()
        sending = [*here, *command, "--send", ports, "--bits", str(bits), "--rounds", str(rounds)]
        seconds = json.loads(subprocess.run(sending, stdout=subprocess.PIPE, text=True, check=True).stdout)
    finally:
        receiver.kill()
        receiver.communicate()
    size = encoded_bytes(numel, bits)
    return [
        {
            "numel": numel,
            "bits": bits,
            "bytes": size,
            "mode": mode,
            "n": rounds,
            "median_s": statistics.median(seconds[mode]),
            "median_bytes_per_s": size / statistics.median(seconds[mode]),
            "ratio": statistics.median(tcp / own for tcp, own in zip(seconds["tcp"], seconds[mode], strict=True)),
            "seconds": seconds[mode],
        }
        for mode in MODES
    ]


def measure(arguments: argparse.Namespace) -> list[dict]:
    rows = []
    settings = [*product([0, *arguments.megabits], arguments.numel, arguments.bits)]
    for megabits, numel, bits in track(settings, "settings", arguments.quiet):
        if not megabits:
            measured = cross(numel, bits, arguments.rounds, "127.0.0.1", [], [])
        else:
            with machines(2) as (here, there):
                here.throttle(megabits)
                measured = cross(numel, bits, arguments.rounds, there.address, here.prefix, there.prefix)
        rows += [{"megabits": megabits or None, **row} for row in measured]
    return rows


def table(rows: list[dict]) -> str:
    cells = {(row["megabits"], row["numel"], row["bits"], row["mode"]): row for row in rows}
    lines = []
    for megabits, numel, bits in dict.fromkeys((row["megabits"], row["numel"], row["bits"]) for row in rows):
        modes = [cells[megabits, numel, bits, mode] for mode in MODES]
        where = "loopback" if megabits is None else f"{megabits:,} Mbit/s"
        told = [f"{row['median_s']:.3f} s, {row['median_bytes_per_s'] / 1e6:,.0f} MB/s" for row in modes]
        ratios = [f"{row['ratio']:.2f}" for row in modes[1:]]
        size = f"{numel / 1e6:g} M in {bits} bits, {modes[0]['bytes'] / 1e6:,.0f} MB"
        lines.append(
            [where, size, told[0], *(f"{each}, {ratio}" for each, ratio in zip(told[1:], ratios, strict=True))]
        )
    return markdown_table(["over", "vector", *MODES], lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, nargs="+", default=[22_700_000, 100_000_000], help="values of a vector")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 32], choices=[4, 8, 32])
    parser.add_argument(
        "--megabits", type=int, nargs="*", default=[1000], help="a second, of the links beside loopback"
    )
    parser.add_argument("--rounds", type=int, default=5, help="vectors of each kind, in turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    add_quiet(parser)
    for hidden in ("--host", "--send"):  # what the two processes are started with
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        receive(arguments.host, arguments.numel)
        return
    if arguments.send:
        ports, (numel,), (bits,) = json.loads(arguments.send), arguments.numel, arguments.bits
        print(json.dumps(send(arguments.host, ports, numel, bits, arguments.rounds)))
        return
    if arguments.megabits and (reason := why_not()):
        parser.error(
            f"--megabits needs a network of its own: {reason}. Leave it empty (--megabits) for loopback alone."
        )
    rows = measure(arguments)
    print(table(rows))
    parameters = {"numel": arguments.numel, "bits": arguments.bits, "megabits": arguments.megabits}
    write_benchmark(arguments.output, NAME, {**parameters, "rounds": arguments.rounds}, rows)


if __name__ == "__main__":
    main()
