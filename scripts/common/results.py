"""Published results, as read by the tables and the model cards, and their provenance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def load_results(path: Path) -> Any:
    """What a file of results holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def machines_and_packages(origins: Sequence[dict[str, Any]]) -> str:
    """Hardware and versions, in one line; several of each if several were used."""
    machines = {
        ", ".join([f"{hardware['cores']} core{'s' * (hardware['cores'] > 1)} of {hardware['cpu']}", *hardware["gpus"]])
        for hardware in (origin["hardware"] for origin in origins)
    }
    versions: dict[str, set[str]] = {}
    for origin in origins:
        for name, number in origin["versions"].items():
            versions.setdefault(name, set()).add(number)
    packages = (f"{name} {' and '.join(sorted(numbers))}" for name, numbers in versions.items())
    return f"{' or '.join(sorted(machines))}; {', '.join(packages)}"


def origin(report: dict[str, Any]) -> str:
    """One line: hardware, versions, commit and date."""
    provenance = report["provenance"]
    return f"{machines_and_packages([provenance])}; commit {_short(provenance['commit'])}, {provenance['date'][:10]}."


def _short(commit: str) -> str:
    number, _, dirty = commit.partition("-")
    return f"{number[:12]} with uncommitted changes" if dirty else number[:12]


def of_runs(runs: Sequence[dict[str, Any]]) -> str:
    """One line: hardware, versions, commits and date of runs that each have their own provenance."""
    commits = sorted({_short(run["commit"]) for run in runs})
    dates = max(run["date"][:10] for run in runs)
    return f"On {machines_and_packages(runs)}; commit {', '.join(commits)}; {dates}."
