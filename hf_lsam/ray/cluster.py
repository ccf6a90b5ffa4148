"""The Ray cluster: how to join it, and what it has room for."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..version import __version__

# Ray would otherwise kill (SIGKILL) what a host has started when the host ends: a worker could not save.
HOST_ENVIRONMENT = {"RAY_kill_child_processes_on_worker_exit": "false"}
REACHABLE_SECONDS = 10.0  # within which the head of a cluster must accept a connection


@dataclass(frozen=True)
class Needs:
    """The resources that a worker takes on its node.

    Args:
        cpus, gpus: as Ray counts them; a GPU may be shared.
    """

    cpus: float = 1.0
    gpus: float = 1.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU and {self.gpus:g} GPU"


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive.

    Args:
        id: Ray's id of it.
        address: of its network interface.
        cpus, gpus: how many Ray may allocate.
    """

    id: str
    address: str
    cpus: float
    gpus: float

    def places(self, needs: Needs) -> int:
        """How many workers fit on the node if nothing else uses it."""
        return int(min(self.cpus // needs.cpus, self.gpus // needs.gpus if needs.gpus else float("inf")))


def connect(address: str) -> bool:
    """Joins a cluster, unless this process has joined one already.

    Args:
        address: HOST:PORT of its head; "auto" for RAY_ADDRESS or the cluster of this machine; "local" starts a cluster
            of this machine alone, which ends with this process.

    Returns:
        whether this call joined it.

    Raises:
        RuntimeError: if there is no cluster, or none that accepts this process.
    """
    if ray.is_initialized():
        return False
    # Ray's own processes write to Ray's log files; the output of ours is in the run's folder.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        _knock(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
        ray.init(address=address, **quiet)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"Could not connect to a Ray cluster at address={address}: {str(error).strip()}\nStart one (ray start "
            "--head), give the address of its head (--address HOST:6379), or use --address local for this "
            "machine alone. If the cluster asks for a token, this process needs it too: RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH."
        ) from error
    return True


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at HOST:PORT, which Ray itself takes minutes to report; else does nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=REACHABLE_SECONDS).close()


def nodes() -> list[Node]:
    """The nodes that are alive."""
    return [
        Node(
            each["NodeID"], each["NodeManagerAddress"], each["Resources"].get("CPU", 0), each["Resources"].get("GPU", 0)
        )
        for each in ray.nodes()
        if each["Alive"]
    ]


def look_at(nodes: Sequence[Node], probe: Path | None, shared_memory_dir: Path) -> list[dict[str, Any] | Exception]:
    """What a process finds on each node.

    Args:
        probe: a file that all of them should see, or None.
        shared_memory_dir: where vectors are to be exchanged.

    Returns:
        for each node "hf_lsam" and "python" (versions), "sees" (whether it sees the probe) and "free" (bytes), or the
        error because of which nothing was found.

    Blocking: until all nodes have answered.
    """
    asked = [
        ray.remote(_look)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(probe, shared_memory_dir)
        for node in nodes
    ]
    found: list[dict[str, Any] | Exception] = []
    for each in asked:
        try:
            found.append(ray.get(each))
        except (RayError, OSError, ImportError) as error:
            found.append(error)
    return found


def _look(probe: Path | None, shared_memory_dir: Path) -> dict[str, Any]:
    return {
        "hf_lsam": __version__,
        "python": platform.python_version(),
        "sees": probe is not None and probe.exists(),
        "free": shutil.disk_usage(shared_memory_dir).free,
    }


def asks_for_a_token() -> bool:
    """Whether this process, and so the cluster that it has joined, uses Ray's token authentication."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def encrypts() -> bool:
    """Whether Ray's processes encrypt what they send each other."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
