"""What all results share: their provenance, and how their files are written."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_lsam.files import write_atomically
from hf_lsam.record import hardware, versions

REPOSITORY = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Where and with what a result was measured.

    Returns:
        `commit` (with "-dirty" if files differ from it; None outside a git checkout), `versions` (of Python and the
        packages that matter), `hardware` (`cpu`, `cores` that this process may use, `memory_gib`, `gpus`) and `date`
        (UTC, ISO 8601).
    """
    git = subprocess.run(
        ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": git.stdout.strip() or None,
        "versions": versions(),
        "hardware": hardware(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, value: Any, indent: int = 1) -> None:
    """Writes `value` as JSON, completely or not at all; creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
