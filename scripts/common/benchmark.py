"""Writes the report of a benchmark, so that all reports have one schema."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipes.common.results import REPOSITORY, provenance, write_json


def write_benchmark(output: Path | None, name: str, parameters: dict[str, Any], results: Any, **further: Any) -> None:
    """Writes `benchmark`, `command`, `provenance`, `parameters`, `results` and the `further` fields, as JSON.

    Args:
        output: the file; None writes nothing.
        name: name of the benchmark, which is that of its file in benchmarks/.
    """
    if output is None:
        return
    script = Path(sys.argv[0]).resolve().relative_to(REPOSITORY)
    report = {
        "benchmark": name,
        "command": " ".join(["python", str(script), *sys.argv[1:]]),
        "provenance": provenance(),
        "parameters": parameters,
        "results": results,
        **further,
    }
    write_json(output, report)
