"""On paper: what n workers ask of links, servers and memory, whatever the size of the model.

    python scripts/tools/estimate_scale.py --parameters 1e9 --workers 1000 --sync_steps 16

Machines with `--workers_per_machine` workers hang on one root, as in docs/many_machines.md: once a period (`sync_steps`
steps of `--step_seconds`) each sends a sum and is sent a change of the anchor, in `--bits` a value. How fast one core
adds up comes from benchmarks/server.json, how fast a link encodes, encrypts and decodes from benchmarks/links.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.compression import encoded_bytes
from hf_lsam.memory import VECTOR, server_bytes, shared_bytes, worker_bytes
from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table
from scripts.common.results import load_results

BUFFERS = 2  # vectors that an end of a link receives into (`hf_lsam.transport.peer`)


@dataclass(frozen=True)
class Scale:
    """A run, and what it asks for.

    Args:
        parameters: d, that are trained.
        workers: n.
        sync_steps: tau.
        step_seconds: of a worker's step.
        bits: of a value that crosses between machines.
        workers_per_machine: that share a server, and no network.
    """

    parameters: int
    workers: int
    sync_steps: int = 2
    step_seconds: float = 1.0
    bits: int = 8
    workers_per_machine: int = 8

    @property
    def machines(self) -> int:
        return math.ceil(self.workers / self.workers_per_machine)

    @property
    def period(self) -> float:
        """Seconds between two exchanges of a worker."""
        return self.sync_steps * self.step_seconds

    @property
    def machine_link(self) -> float:
        """Bytes a second, each way, of a machine that is not the root."""
        return encoded_bytes(self.parameters, self.bits) / self.period

    @property
    def root_link(self) -> float:
        """The same, of the root."""
        return (self.machines - 1) * self.machine_link

    @property
    def all_reduce_link(self) -> float:
        """The same, of every machine in data-parallel training: a ring over the machines, float32, once a step."""
        return 2 * (self.machines - 1) / self.machines * VECTOR * self.parameters / self.step_seconds

    def root_cores(self, absorbed: float, exchanged: float) -> float:
        """Cores that the root keeps busy.

        Args:
            absorbed: bytes of float32 that one core adds up in a second.
            exchanged: bytes that one core encodes, or decodes, and encrypts in a second.
        """
        return self.machines * VECTOR * self.parameters / self.period / absorbed + 2 * self.root_link / exchanged

    @property
    def worker_memory(self) -> float:
        """Bytes that LSAM adds on an accelerator, beside model, gradient and optimizer."""
        return self.parameters * worker_bytes(WorkerSettings(self.sync_steps), accelerator=True)

    @property
    def relay_memory(self) -> float:
        """Bytes of a machine's host: the exchange in shared memory, its relay, and its end of the link."""
        relay = VECTOR * 3  # the anchor, the sum that grows, the sum under way
        return self.parameters * (shared_bytes(self.workers_per_machine) + relay + VECTOR * BUFFERS)

    @property
    def root_memory(self) -> float:
        """Bytes of the root's host: beside what any machine has, of each other one what it holds, and buffers."""
        held = VECTOR if self.bits < 32 else 0
        own = shared_bytes(self.workers_per_machine) + server_bytes(ServerSettings(self.sync_steps))
        return self.parameters * (own + (self.machines - 1) * (held + VECTOR * BUFFERS))


def measured() -> tuple[float, float]:
    """`absorbed` and `exchanged` of `Scale.root_cores`, as the benchmarks have them."""
    server = load_results(REPOSITORY / "benchmarks/server.json")["results"]
    sums = [row for row in server if row["mode"] == "sum"]
    largest = max(sums, key=lambda row: (row["megabytes"], row["senders"]))
    links = load_results(REPOSITORY / "benchmarks/links.json")["results"]
    loopback = [row for row in links if row["mode"] == "link" and row["megabits"] is None and row["bits"] == 8]
    return largest["median_bytes_per_s"], max(loopback, key=lambda row: row["numel"])["median_bytes_per_s"]


def table(scales: Sequence[Scale]) -> str:
    """A line a run."""
    rates = measured()
    rows = [
        (
            f"{scale.parameters / 1e9:g} B",
            f"{scale.workers:,}",
            str(scale.sync_steps),
            f"{_figure(8 * scale.all_reduce_link / 1e9)} Gb/s",
            f"{_figure(8 * scale.machine_link / 1e9)} Gb/s",
            f"{_figure(8 * scale.root_link / 1e9)} Gb/s",
            _figure(scale.root_cores(*rates)),
            f"{_figure(scale.root_memory / 1e9)} GB",
            f"{_figure(scale.relay_memory / 1e9)} GB",
            f"{_figure(scale.worker_memory / 1e9)} GB",
        )
        for scale in scales
    ]
    header = ("parameters", "workers", "tau", "a machine's link, data-parallel", "LSAM", "the root's link")
    return markdown_table((*header, "the root's cores", "its memory", "a relay's memory", "on a worker's GPU"), rows)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--sync_steps", type=int, default=2)
    parser.add_argument("--step_seconds", type=float, default=1.0)
    parser.add_argument("--bits", type=int, choices=(32, 8, 4), default=8)
    parser.add_argument("--workers_per_machine", type=int, default=8)
    values = vars(parser.parse_args())
    print(table([Scale(**{**values, "parameters": round(values["parameters"])})]))


if __name__ == "__main__":
    main()
