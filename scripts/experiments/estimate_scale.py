"""On paper: what limits many workers and large models, from what one machine was measured to do.

    python scripts/experiments/estimate_scale.py

Machines hang on one root (docs/many_machines.md). Every `TAU` steps of `STEP` seconds each hands in a sum and is sent a
change of the anchor, in `BITS` a value. What a server and a link do in a second is from benchmarks/server.json and
benchmarks/links.json, bytes are those of `hf_lsam.memory` and `hf_lsam.compression`; what a host has is assumed.
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
        absorbed: bytes of float32 that a server's thread takes in a second: checked, added up and published.
        linked: bytes of 8-bit values that a link carries in a second where no network slows it down: encoded,
            encrypted, decrypted and decoded.
    """

    absorbed: float
    linked: float

    @classmethod
    def load(cls) -> Measured:
        """Of the benchmarks' largest vectors and most senders."""
        server = load_results(REPOSITORY / "benchmarks/server.json")["results"]
        links = load_results(REPOSITORY / "benchmarks/links.json")["results"]
        absorb = (row for row in server if row["mode"] == "absorb")
        link = (row for row in links if (row["mode"], row["megabits"], row["bits"]) == ("link", None, BITS))
        return cls(
            max(absorb, key=lambda row: (row["megabytes"], row["senders"]))["median_bytes_per_s"],
            max(link, key=lambda row: row["numel"])["median_bytes_per_s"],
        )


def gpus_of(parameters: int) -> int:
    """That hold a worker, if its vectors could be split among them."""
    return math.ceil(parameters * (TRAINED + worker_bytes(WorkerSettings(TAU), accelerator=True)) / GPU_BYTES)


def workers_on_a_machine(parameters: int) -> int:
    return max(1, GPUS // gpus_of(parameters))


def machines_of(parameters: int, workers: int) -> int:
    """That hand in sums; a worker of more GPUs than one has counts as one."""
    return math.ceil(workers / workers_on_a_machine(parameters))


def loads(parameters: int, machines: int, measured: Measured) -> dict[str, float]:
    """What is asked of the root, in units of what it has: above 1 it cannot keep up, and periods grow by as much."""
    period, push, vector = TAU * STEP, encoded_bytes(parameters, BITS), VECTOR * parameters
    on_a_link = 2 * push / measured.linked  # seconds: both ways take turns in the one thread that a machine's peer has
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
    """How many would keep up, each with a range of the vector: every load is of so much smaller a vector."""
    return math.ceil(max(loads(parameters, machines, measured).values()))


def levels(parameters: int, machines: int, measured: Measured) -> int | None:
    """Of a tree in which no server hears more than it can keep up with; None if it cannot hear two.

    One level is what there is: machines that hang on a root.
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
    """Periods that a sum takes to the root, and an anchor back, past nobody else."""
    push = encoded_bytes(parameters, BITS)
    way = push / min(NETWORK, measured.linked) + VECTOR * parameters / measured.absorbed
    return 2 * way / (TAU * STEP)


def all_reduce_bytes(parameters: int, machines: int) -> float:
    """Of a machine at every step of data-parallel training, each way: a ring over the machines, float32 gradients."""
    return data_parallel_bytes([1] * machines, parameters) / machines / 2


def links(measured: Measured) -> str:
    """A line a model: what a machine sends and receives."""
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
    """A line a model and number of workers: the loads of one root, and what would carry them."""
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
