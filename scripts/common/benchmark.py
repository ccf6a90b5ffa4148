"""The report of a benchmark: one schema, in one place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recipes.common.results import REPOSITORY, provenance, write_json


def write_benchmark(output: Path | None, name: str, parameters: dict[str, Any], results: Any, **further: Any) -> None:
    """Writes `benchmark`, `command`, `provenance`, `parameters`, `results` and what is `further`, as JSON.

    Args:
        output: the file, or None for nothing.
        name: of the benchmark: what its file in benchmarks/ is called.
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
