"""The notebook is executed as it stands, in a folder of its own."""

from __future__ import annotations

import os

import nbclient
import nbformat
from launch import ROOT, free_port

from hf_lsam.record import read_record

NOTEBOOK = ROOT / "recipes/quickstart.ipynb"


def test_the_notebook_trains_two_workers_and_shows_the_report(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # they are of no commit
    for cell in notebook.cells:
        cell.source = cell.source.replace("29511", str(free_port()))
    root = NOTEBOOK.parents[1]
    for name, value in {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }.items():
        monkeypatch.setenv(name, value)
    here = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=None, startup_timeout=600, resources=here)
    client.execute()
    run = tmp_path / "runs/notebook"
    record = read_record(run)
    assert record.run["num_workers"] == 2
    last = [max(entry["step"] for entry in entries if "loss" in entry) for entries in record.workers.values()]
    assert last == [30, 30]
    before, after = (entry["eval_accuracy"] for entry in record.workers[0] if "eval_accuracy" in entry)
    assert before < 0.6 < after
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert f"{before:.3f} before, {after:.3f} after" in printed
    assert "LSAM: notebook" in (run / "report.html").read_text()
    displayed = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    (shown,) = [output for output in displayed if "iframe" in output["data"].get("text/html", "")]
    assert "runs/notebook/report.html" in shown["data"]["text/html"]
    scores = [float(line.split()[0]) for line in printed.splitlines() if " positive: " in line]
    assert scores[0] > scores[1]
