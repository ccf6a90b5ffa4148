"""What is built is whole: the source distribution makes the wheel, and the wheel alone is the package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from launch import ROOT

SCRIPT = """
import sys
from pathlib import Path
import hf_lsam, hf_lsam.card, hf_lsam.cli.report
folder = Path(sys.argv[1]) / "hf_lsam"
assert Path(hf_lsam.__file__).parent == folder, hf_lsam.__file__
for name in ("py.typed", "model_card.md", "cli/report.html"):
    assert (folder / name).read_text() or name == "py.typed"
facts = hf_lsam.card.CardFacts("a run", "lsam", 2, [("loss", 0.5)], [("Workers", "2")], {"sam_rho": 0.05}, "a machine")
assert "2 asynchronous workers" in str(hf_lsam.card.model_card(facts))
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_made_of_the_source_distribution_has_all_that_the_package_needs(tmp_path):
    run("-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = tmp_path.glob("dist/*.whl")
    assert len(list(tmp_path.glob("dist/*.tar.gz"))) == 1
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.removesuffix(".dist-info").split("-")[0] for name in names} == {"hf_lsam"}  # no recipes, no scripts
    installed = tmp_path / "installed"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel)
    # The folder goes before whatever else there is of the package, and the checkout is not on the path.
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run("-W", "ignore", "-c", SCRIPT, installed, env=environment, cwd=tmp_path)
