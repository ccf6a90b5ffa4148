"""What is built is whole: the source distribution makes the wheel, and the wheel alone is the package."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from launch import ROOT

from hf_lsam import __version__

SCRIPT = """
import sys
from importlib import metadata
from pathlib import Path
import hf_lsam, hf_lsam.card, hf_lsam.cli.report
folder = Path(sys.argv[1]) / "hf_lsam"
assert Path(hf_lsam.__file__).parent == folder, hf_lsam.__file__
assert Path(metadata.distribution("hf-lsam").locate_file("hf_lsam")) == folder
for name in ("py.typed", "model_card.md", "cli/report.html"):
    assert (folder / name).read_text() or name == "py.typed"
facts = hf_lsam.card.CardFacts("a run", "lsam", 2, [("loss", 0.5)], [("Workers", "2")], {"sam_rho": 0.05}, "a machine")
assert "2 asynchronous workers" in str(hf_lsam.card.model_card(facts))
print(hf_lsam.__version__, metadata.version("hf-lsam"))
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Path]:
    """The source distribution and the wheel."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"hf_lsam-{__version__}-py3-none-any.whl", f"hf_lsam-{__version__}.tar.gz"]
    return files


def test_the_wheel_made_of_the_source_distribution_is_the_package_alone(built):
    names = {name.split("/")[0] for name in zipfile.ZipFile(built[0]).namelist()}
    assert names == {"hf_lsam", f"hf_lsam-{__version__}.dist-info"}  # no recipes, no scripts


def test_a_fresh_environment_has_all_that_the_package_needs_and_its_command(built, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python, command = tmp_path / "env" / "bin" / "python", tmp_path / "env" / "bin" / "hf-lsam"
    # Neither the checkout nor another environment's variables are to be seen.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    options = {"env": environment, "cwd": tmp_path}
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, built[0], **options)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", **options).strip())
    # What it depends on lies where it lies for this process. The .pth files there, of an editable install for one, are
    # not read, and the folder comes after the environment's own.
    (packages / "beside.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    assert run(python, "-W", "ignore", "-c", SCRIPT, packages, **options).split() == [__version__, __version__]
    assert command.read_text().startswith(f"#!{python}\n")
    helped = run(command, "--help", **options)
    assert helped.startswith("Usage: hf-lsam [OPTIONS] COMMAND")
    assert all(f"\n  {name} " in helped for name in ("card", "doctor", "monitor", "report"))


def test_an_index_would_take_both(built):
    pytest.importorskip("twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built)
    assert said.count("PASSED") == 2
