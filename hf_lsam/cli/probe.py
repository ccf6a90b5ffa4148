"""The script that `hf-lsam doctor` launches in place of the user's: each of its processes reports who it is.

It begins as a script with LSAM does, so whatever would stop such a script at its beginning stops it too.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from ..files import write_atomically


def main(folder: Path, seconds: float) -> None:
    """Writes this process's report to `<rank>.json` in `folder`.

    Args:
        seconds: how long the workers wait for each other.
    """
    rank = int(os.environ.get("RANK", 0))
    report: dict[str, Any] = {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "error": None,
    }
    try:
        report |= join(folder, seconds)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    write_atomically(folder / f"{rank}.json", json.dumps(report))


def join(folder: Path, seconds: float) -> dict[str, Any]:
    """Builds the training arguments, as a script would, and meets the other workers."""
    import torch

    from ..identity import LaunchStore
    from ..trainer import LSAMConfig  # its import checks the versions

    args = LSAMConfig(output_dir=str(folder / "out"), report_to=[])
    if args.identity.num_workers > 1:
        store = LaunchStore(args.identity, seconds)
        store.gather("doctor", "here")
        if args.identity.rank == 0:
            store.set("doctor/all", True)
        store.get("doctor/all")
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else ""
    return {"device": str(args.device), "device_name": name, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
