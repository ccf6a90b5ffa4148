"""What the servers of several machines know about each other.

Over `transport.tls`, each machine pushes one sum per period and pulls the newest anchor.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..algorithms import ALGORITHMS, ServerSettings
from ..transport.mailbox import RunFolder
from ..transport.messages import ANY_NUMBER

MOST_WORKERS = 2**16


@dataclass(frozen=True)
class MachineSettings:
    """What each server of a launch on several machines knows about that launch.

    Args:
        count: how many machines begin together; 1 if machines come and go.
        number: number of this machine; 0 is the one with the root server.
        run_id: id of the run, the same on all machines.
        silence: seconds without a sign of life after which a machine counts as lost.
        server_timeout: seconds for which a machine whose link is lost continues alone, and the root waits for it.
    """

    count: int = 1
    number: int = ANY_NUMBER
    run_id: str = "by hand"
    silence: float = 30.0
    server_timeout: float = 120.0

    as_dict = asdict


def machine_settings(folder: RunFolder) -> MachineSettings:
    """The `MachineSettings` in run.json.

    Raises:
        RuntimeError: if the run's algorithm needs more from other machines than sums of differences.
    """
    algorithm = folder.run["settings"]["algorithm"]
    if not ALGORITHMS[algorithm].server_half.adds_up:
        raise RuntimeError(
            f"algorithm={algorithm!r} works on one machine only, because relays add up differences, which this "
            "algorithm does not exchange. Use algorithm='lsam', or start all workers on one machine."
        )
    return MachineSettings(**folder.run.get("machines", {}))


def settings_digest(settings: ServerSettings) -> bytes:
    """SHA-256 of the settings, 32 bytes: equal if the settings are."""
    return hashlib.sha256(json.dumps(settings.as_dict()).encode()).digest()


def address_file(run_dir: Path) -> Path:
    """The file in which a server writes the host and port at which it listens to other machines."""
    return run_dir / "address.json"
