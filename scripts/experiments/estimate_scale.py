"""On paper: what limits many workers and large models, based on measurements of one machine.

    python scripts/experiments/estimate_scale.py

All machines connect to one root server (docs/many_machines.md). Every `TAU` steps of `STEP` seconds, each machine
pushes a sum and receives a change of the anchor, with `BITS` bits per value. The speeds of a server and a link come
from benchmarks/server.json and benchmarks/links.json, and byte counts from `hf_lsam.memory` and `hf_lsam.compression`;
the resources of a host are assumed.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.compression import encoded_bytes
from hf_lsam.memory import VECTOR, server_bytes, shared_bytes, worker_bytes
from hf_lsam.parameters import data_parallel_bytes
from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table
from scripts.common.results import load_results

TAU, STEP, BITS = 16, 1.0, 8
GPUS, GPU_BYTES = 8, 80e9  # of a machine; of a GPU
NETWORK, HOST_BYTES, CORES = 100e9 / 8, 2**40, 64  # bytes a second each way, and what a server's host has
TRAINED = 16  # bytes a parameter: weight, gradient and AdamW's two moments, float32
# What the root keeps for each machine, float32 [d]: its peer's two buffers (`hf_lsam.transport.peer`), and the anchor
# that it has, to send differences (`hf_lsam.server.root`).
KEPT_FOR_A_MACHINE = 3
MODELS = {"10 M (adapters)": 10**7, "1 B": 10**9, "70 B": 7 * 10**10}
RUNS = (10**3, 10**5)


@dataclass(frozen=True)
class Measured:
    """What was measured on one machine.

    Args:
        absorbed: bytes of float32 that a server's thread processes per second: checked, summed and published.
        linked: bytes of 8-bit values that a link carries per second if no network slows it down: encoded, encrypted,
            decrypted and decoded.
    """

    absorbed: float
    linked: float

    @classmethod
    def load(cls) -> Measured:
        """Loads the measurements with the largest vectors and the most senders."""
        server = load_results(REPOSITORY / "benchmarks/server.json")["results"]
        links = load_results(REPOSITORY / "benchmarks/links.json")["results"]
        absorb = (row for row in server if row["mode"] == "absorb")
        link = (row for row in links if (row["mode"], row["megabits"], row["bits"]) == ("link", None, BITS))
        return cls(
            max(absorb, key=lambda row: (row["megabytes"], row["senders"]))["median_bytes_per_s"],
            max(link, key=lambda row: row["numel"])["median_bytes_per_s"],
        )


def gpus_of(parameters: int) -> int:
    """How many GPUs a worker needs, if its vectors could be split among them."""
    return math.ceil(parameters * (TRAINED + worker_bytes(WorkerSettings(TAU), accelerator=True)) / GPU_BYTES)


def workers_on_a_machine(parameters: int) -> int:
    return max(1, GPUS // gpus_of(parameters))


def machines_of(parameters: int, workers: int) -> int:
    """How many machines push sums; a worker that needs more GPUs than a machine has counts as one machine."""
    return math.ceil(workers / workers_on_a_machine(parameters))


def loads(parameters: int, machines: int, measured: Measured) -> dict[str, float]:
    """The root's loads, as fractions of its capacity: above 1 it cannot keep up, and periods grow by that factor."""
    period, push, vector = TAU * STEP, encoded_bytes(parameters, BITS), VECTOR * parameters
    on_a_link = 2 * push / measured.linked  # seconds: a machine's peer has one thread for both directions
    adding = machines * vector / measured.absorbed
    server = ServerSettings(TAU, anchor_optimizer="nesterov")
    own = server_bytes(server) + shared_bytes(workers_on_a_machine(parameters))
    return {
        "one link": on_a_link / period,
        "adding": adding / period,
        "cores": (adding + machines * on_a_link) / period / CORES,
        "network": machines * push / period / NETWORK,
        "memory": (own * parameters + machines * KEPT_FOR_A_MACHINE * vector) / HOST_BYTES,
    }


def servers(parameters: int, machines: int, measured: Measured) -> int:
    """How many servers would keep up if each had a range of the vector, which divides all loads by their number."""
    return math.ceil(max(loads(parameters, machines, measured).values()))


def levels(parameters: int, machines: int, measured: Measured) -> int | None:
    """The number of levels of a tree in which no server hears more others than it can keep up with; None if it cannot
    hear two.

    Only one level is built: machines that connect to a root.
    """
    hears = range(machines + 1)
    most = bisect.bisect_right(hears, 1.0, key=lambda each: max(loads(parameters, each, measured).values())) - 1
    if machines > 1 and most < 2:
        return None
    depth, reached = 1, most
    while reached < machines:
        depth, reached = depth + 1, reached * most
    return depth


def delay(parameters: int, measured: Measured) -> float:
    """The time of a round trip, a sum to the root and an anchor back without queueing, in periods."""
    push = encoded_bytes(parameters, BITS)
    way = push / min(NETWORK, measured.linked) + VECTOR * parameters / measured.absorbed
    return 2 * way / (TAU * STEP)


def all_reduce_bytes(parameters: int, machines: int) -> float:
    """Bytes each way, per machine and step of data-parallel training: a ring over the machines, float32 gradients."""
    return data_parallel_bytes([1] * machines, parameters) / machines / 2


def links(measured: Measured) -> str:
    """One line per model: what a machine sends and receives."""
    rows = []
    for name, parameters in MODELS.items():
        workers = workers_on_a_machine(parameters)
        push = encoded_bytes(parameters, BITS)
        reduced = all_reduce_bytes(parameters, machines_of(parameters, RUNS[0]))
        gpus = gpus_of(parameters)
        rows.append(
            (
                name,
                str(gpus),
                figure(parameters * worker_bytes(WorkerSettings(TAU), accelerator=True) / 1e9),
                str(workers),
                figure(push / 1e9),
                figure(8 * push / (TAU * STEP) / 1e9),
                figure(8 * reduced / STEP / 1e9),
                figure(reduced / NETWORK / STEP),
                figure(delay(parameters, measured)),
            )
        )
    header = ("trained parameters", "GPUs a worker", "of which for LSAM, GB", "workers a machine", "a push, GB")
    asked = ("link, Gb/s", "data-parallel: link, Gb/s", "its all-reduce, steps", "LSAM: there and back, periods")
    return markdown_table((*header, *asked), rows)


def root(measured: Measured) -> str:
    """One line per model and number of workers: the loads of one root, and what would carry them."""
    rows = []
    for (name, parameters), workers in ((model, workers) for model in MODELS.items() for workers in RUNS):
        machines = machines_of(parameters, workers)
        each = loads(parameters, machines, measured)
        depth = levels(parameters, machines, measured)
        rows.append(
            (
                name,
                f"{workers:,}",
                f"{machines:,}",
                *map(figure, each.values()),
                "none" if depth is None else str(depth),
                f"{servers(parameters, machines, measured):,}",
            )
        )
    names = loads(1, 1, measured)
    header = ("trained parameters", "workers", "machines", *names, "levels of relays", "or servers of a range each")
    return markdown_table(header, rows)


def figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def tables(measured: Measured) -> str:
    return (
        f"A machine's link, each way:\n\n{links(measured)}\n\nThe root's loads; above 1 it cannot keep up:\n\n"
        f"{root(measured)}\n\n{TAU} steps of {STEP:g} s from exchange to exchange, {BITS} bits a value. Measured on 2 "
        f"cores: a server's thread takes {measured.absorbed / 1e9:.2f} GB/s of float32, a link "
        f"{measured.linked / 1e6:.0f} MB/s of 8-bit values, both of its ends on one machine. Assumed: machines of "
        f"{GPUS} GPUs of {GPU_BYTES / 1e9:.0f} GB; for the root {8 * NETWORK / 1e9:.0f} Gb/s each way, "
        f"{HOST_BYTES / 2**40:g} TiB, {CORES} cores."
    )


if __name__ == "__main__":
    print(tables(Measured.load()))
