"""Tries the lowest and the newest torch, transformers, accelerate and peft that pyproject.toml admits.

python scripts/tools/try_versions.py

Each set is installed into a fresh virtual environment in a temporary folder, which takes several GB if torch comes with
CUDA, and runs the exact cases and two workers through Trainer. The results are written to benchmarks/versions.json and
docs/combinations.md. The exit code is 1 if a set fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recipes.common.results import REPOSITORY
from recipes.common.tables import markdown_table
from scripts.tools.summarize_results import write_between

TRIED = ("torch", "transformers", "accelerate", "peft")
SETS = ("lowest", "newest")
TESTS = {
    "exact cases": ["tests/integration/test_exact_cases.py"],
    "two workers through Trainer": ["tests/integration/test_trainer_distributed.py", "-k", "half_precision"],
}
RESULTS = REPOSITORY / "benchmarks/versions.json"
PAGE = REPOSITORY / "docs/combinations.md"


def requirements(which: str) -> list[str]:
    """The requirements passed to pip: the lowest or the newest version of each package in `TRIED`."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    of = {re.match(r"[\w-]+", line).group(): line for line in declared}
    if which == "newest":
        return [of[name] for name in TRIED]
    lowest = {name: re.search(r">=([\d.]+)", of[name]).group(1) for name in TRIED}
    return [f"{name}=={number}" for name, number in lowest.items()]


def tried(which: str, folder: Path) -> dict[str, Any]:
    """Installs a set and runs the tests with it.

    Args:
        which: see `requirements`.
        folder: an empty folder for the environment.

    Returns:
        the installed versions and, for each test, the last line of pytest's output.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *requirements(which)]
    subprocess.run([*install, "pytest>=8", "pytest-timeout>=2.3", REPOSITORY], check=True)
    ask = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {TRIED}}}))"
    installed = json.loads(subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    results = {}
    for name, words in TESTS.items():
        run = subprocess.run(
            [python, "-m", "pytest", "-p", "no:cacheprovider", *words],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        results[name] = {"passed": run.returncode == 0, "said": run.stdout.strip().splitlines()[-1]}
        print(f"{which}, {name}: {results[name]['said']}", flush=True)
        if run.returncode:
            print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
    asked = ", ".join(requirements(which))
    return {"asked": asked, "versions": installed, "tests": results, "date": datetime.now(UTC).date().isoformat()}


def table(results: dict[str, Any]) -> str:
    """A Markdown table of what `tried` returned for each set."""
    rows = [
        (
            which,
            *(result["versions"][name] for name in TRIED),
            *("passed" if result["tests"][name]["passed"] else "failed" for name in TESTS),
            f"Python {result['python']}, {result['date']}",
        )
        for which, result in results.items()
    ]
    return markdown_table(("versions", *TRIED, *TESTS, "tried"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=SETS, metavar="SET", help=f"of {', '.join(SETS)}; both")
    sets = parser.parse_args().sets
    if unknown := set(sets) - set(SETS):
        parser.error(f"there is no set {sorted(unknown)[0]}: choose of {', '.join(SETS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for which in sets:
        with tempfile.TemporaryDirectory(prefix=f"hf_lsam-{which}-") as folder:
            results[which] = {**tried(which, Path(folder)), "python": ".".join(map(str, sys.version_info[:3]))}
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        write_between(PAGE, "versions", table(results))
    failed = [which for which in sets if not all(test["passed"] for test in results[which]["tests"].values())]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
