"""What the servers of several machines know of each other.

Over `transport.tls` each machine hands in one sum a period, and the newest anchor comes back.
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
    """What the servers of a launch on several machines know of it.

    Args:
        count: how many machines begin together, 1 if others come and go.
        number: which of them this is; 0 is the one with the global server.
        run_id: the same on all.
        silence: seconds without a sign of life after which a machine is lost.
        server_timeout: seconds that a machine whose link is lost is waited for, and goes on alone.
    """

    count: int = 1
    number: int = ANY_NUMBER
    run_id: str = "by hand"
    silence: float = 30.0
    server_timeout: float = 120.0

    as_dict = asdict


def machine_settings(folder: RunFolder) -> MachineSettings:
    """What run.json says of them.

    Raises:
        RuntimeError: if the algorithm of the run needs more than sums of differences from other machines.
    """
    algorithm = folder.run["settings"]["algorithm"]
    if not ALGORITHMS[algorithm].server_half.adds_up:
        raise RuntimeError(
            f"algorithm={algorithm!r} works on one machine only: relays add differences up, and that is no exchange of "
            "this algorithm. Use algorithm='lsam', or start all workers on one machine."
        )
    return MachineSettings(**folder.run.get("machines", {}))


def settings_digest(settings: ServerSettings) -> bytes:
    """32 bytes that differ if the settings do."""
    return hashlib.sha256(json.dumps(settings.as_dict()).encode()).digest()


def address_file(run_dir: Path) -> Path:
    """Where a server writes the host and port at which it listens to other machines."""
    return run_dir / "address.json"
