"""What the servers of several machines know of each other, and say.

What crosses the network, over `transport.gloo`, is one push a machine and period, and the newest anchor back.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

from ..algorithms import ServerSettings
from ..transport.mailbox import RunFolder

ANY_MACHINE = -1  # what a machine calls itself that is not of a launch; it is given a number
MOST_WORKERS = 2**16


class Say(IntEnum):
    """What a message between machines says. Machines send the first group, the global server the second."""

    JOIN = 1  # a: machine; b: random number of the relay process; c: see `join_word`
    LIVE = 2  # a: live workers
    PUSH = 3  # vector: sum of differences; a: steps in it; b: which push of this process it is, from 1
    STOP_ALL = 4  # a worker asks that all stop
    FINISH = 5  # all workers here have finished; a: 1 if none of them waits for the end; b: best step, or -1
    FAILED = 6  # a worker of the launch ended with an error

    WELCOME = 11  # vector: the anchor; a: its version; b: the last push of this process that was counted
    REFUSED = 12  # a: Refused
    ANCHOR = 13  # vector: the newest; a: its version
    ACCEPTED = 14  # b: which push
    REJECTED = 15  # b: which push, of NaN or infinity
    STOP = 16  # a: 1 if a checkpoint is to be saved; b: 1 if a worker of the launch ended with an error
    FINISHED = 17  # vector: the final anchor; a: its version; b: best step, or -1


class Refused(IntEnum):
    """Why a machine may not take part."""

    TAKEN = 1
    SETTINGS = 2


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
    number: int = ANY_MACHINE
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
    if algorithm != "lsam":
        raise RuntimeError(
            f"algorithm={algorithm!r} works on one machine only: relays add differences up, and that is no exchange of "
            "this algorithm. Use algorithm='lsam', or start all workers on one machine."
        )
    return MachineSettings(**folder.run.get("machines", {}))


def join_word(settings: ServerSettings, live: int) -> int:
    """40 bits that differ if the settings do, and 16 that count the live workers."""
    digest = hashlib.sha256(json.dumps(settings.as_dict()).encode()).digest()
    return int.from_bytes(digest[:5]) * MOST_WORKERS + live


def address_file(run_dir: Path) -> Path:
    """Where a server writes the host and port at which it listens to other machines."""
    return run_dir / "address.json"
