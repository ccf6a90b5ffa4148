"""Where a worker runs: on this machine, or on a machine of its own, which is a network namespace."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from tests.netns import Machine

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Args:
        machine: its own machine, or None for this one.
        address: address of its machine.
        first: address of worker 0's machine, at whose `port` workers rendezvous if they need to.
        folder: the folder of the run, in this machine's shared memory.
    """

    rank: int
    workers: int
    machine: Machine | None
    address: str
    first: str
    port: int
    folder: Path

    def enter(self) -> None:
        """Moves this process, which must have only one thread, to its machine, and sets its identity in the
        environment."""
        interface = "lo"
        if self.machine is not None:
            enter(self.machine)
            interface = "eth0"
        here = 1 if self.machine is not None else self.workers
        group = {"RANK": self.rank, "WORLD_SIZE": self.workers, "MASTER_ADDR": self.first, "MASTER_PORT": self.port}
        group |= {"LOCAL_RANK": self.rank % here, "LOCAL_WORLD_SIZE": here}
        group |= {"GROUP_RANK": self.rank // here, "GROUP_WORLD_SIZE": self.workers // here}
        group |= {"GLOO_SOCKET_IFNAME": interface}
        os.environ.update({name: str(value) for name, value in group.items()})

    def print_into(self, log: str) -> None:
        """Redirects this process's output to `log` from now on."""
        for stream in (1, 2):
            os.dup2(os.open(self.folder / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)

    def sent(self) -> int:
        """Bytes that this worker's machine has sent over its link; 0 on this machine, which has other traffic."""
        if self.machine is None:
            return 0
        lines = Path("/proc/self/net/dev").read_text().splitlines()
        return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith("eth0:"))


def enter(machine: Machine) -> None:
    """Moves the calling thread, and everything it starts, to `machine`."""
    descriptor = os.open(f"/run/netns/{machine.name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"network namespace {machine.name} cannot be entered")
    os.close(descriptor)
