"""`hf-lsam report`: pages of real runs, opened in a real browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from click.testing import CliRunner, Result
from launch import PATHS, accelerate_launch, free_port, write_script
from models import arguments, blobs, net, vector
from transformers import TrainerCallback

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer
from hf_lsam.cli import main
from hf_lsam.cli.charts import Series, line_chart, map_chart, ticks
from hf_lsam.cli.report import mean_and_spread, read_run
from hf_lsam.identity import Identity, LaunchStore
from hf_lsam.spread import mean_and_deviation

# A run of two workers: sys.argv are its folder, its seed and its sync_steps. For a plane through them and the anchor,
# none may have merged with it at its last step, and it may not be their mean.
RUN = """
import sys
from models import arguments, blobs, net
from hf_lsam import LSAMConfig, LSAMTrainer

OUT, SEED, SYNC = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fields = dict(max_steps=18, sync_steps=SYNC, eval_strategy="steps", eval_steps=4, logging_steps=2, seed=SEED)
args = arguments(LSAMConfig, OUT, **{**fields, "anchor_lr": 0.5, "landscape_points": 9, "landscape_batches": 2})
model = net(SEED, batchnorm=True)
LSAMTrainer(model=model, args=args, train_dataset=blobs(), eval_dataset=blobs(16, 1)).train()
"""


def report(*words: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, words)], catch_exceptions=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """The folders of three runs of two workers each: two seeds, and another sync_steps."""
    folder = tmp_path_factory.mktemp("runs")
    script = write_script(folder / "script.py", RUN)
    cases = {"one <&> seed": (1, 4), "another": (2, 4), "slower": (1, 8)}
    for name, (seed, sync_steps) in cases.items():
        accelerate_launch(script, str(folder / name), str(seed), str(sync_steps), fork=True, PYTHONPATH=PATHS)
    return [folder / name for name in cases]


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("THERE IS NO CHROMIUM: no page was opened. Install it: apt-get install chromium")
    with Browser(tmp_path / "profile") as browser:
        yield browser


# --- what is measured when training ends ---


def test_workers_leave_a_landscape_and_nothing_else(runs):
    for run in runs:
        assert sorted(path.name for path in (run / "lsam").iterdir()) == [
            "landscape.json",
            "run.json",
            "worker-0.jsonl",
            "worker-1.jsonl",
        ]
    measured = json.loads((runs[0] / "lsam" / "landscape.json").read_text())
    at_anchor = measured["fractions"].index(0.0)
    lines, plane = measured["lines"], measured["plane"]
    assert lines["0"][at_anchor] == lines["1"][at_anchor] == plane["losses"][4][4]
    assert all(math.isfinite(value) for row in plane["losses"] + plane["smoothed"] for value in row)
    assert measured["batchnorm"]
    assert measured["strength"] == pytest.approx(1.0 / (0.05 * 4))


def test_measuring_changes_nothing_and_shows_how_far_it_is(tmp_path, capsys):
    """Weights, statistics, modes and random numbers are those of a run that measures nothing."""
    after = []
    for points in (0, 9):
        model = net(batchnorm=True, dropout=0.5)
        folder = tmp_path / str(points)
        args = arguments(LSAMConfig, folder, max_steps=6, sync_steps=2, landscape_points=points, disable_tqdm=False)
        trainer = LSAMTrainer(model=model, args=args, train_dataset=blobs())
        trainer.train()
        buffers = [buffer.clone() for buffer in model.buffers()]
        modes = [module.training for module in model.modules()]
        after.append((vector(model), torch.get_rng_state(), buffers, modes, random.random()))
    (x, state, buffers, modes, drawn), (y, state_2, buffers_2, modes_2, drawn_2) = after
    assert torch.equal(x, y)
    assert torch.equal(state, state_2)
    assert all(map(torch.equal, buffers, buffers_2))
    assert modes == modes_2
    assert drawn == drawn_2
    measured = json.loads((tmp_path / "9" / "lsam" / "landscape.json").read_text())
    assert list(measured["lines"]) == ["0"]
    assert measured["plane"] is None
    assert "Landscape: 100%|██████████| 9/9" in capsys.readouterr().err


class Fails(torch.nn.Module):
    """Has no room for a batch once training has ended."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.net(x, labels)


class LosesItsStore(TrainerCallback):
    """At the last step, the worker becomes one of two whose launcher is gone."""

    def on_step_end(self, args, state, control, **keywords):
        if state.global_step == state.max_steps:
            self.trainer.session.run._identity = two = Identity(rank=self.rank, num_workers=2, local_workers=2)
            self.trainer.session.run.store = LaunchStore(two, timeout=1.0)


@pytest.mark.parametrize("cause", ["memory", "store of worker 0", "store of worker 1"])
def test_a_landscape_that_cannot_be_measured_is_warned_of_and_the_run_finishes(tmp_path, monkeypatch, caplog, cause):
    args = arguments(LSAMConfig, tmp_path, max_steps=4, sync_steps=2, landscape_points=5)
    trainer = LSAMTrainer(model=Fails() if cause == "memory" else net(), args=args, train_dataset=blobs())
    if cause != "memory":
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # which is not this process's
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        loses = LosesItsStore()
        loses.trainer, loses.rank = trainer, int(cause[-1])
        trainer.add_callback(loses)
    trainer.train()
    assert torch.equal(vector(trainer.model), trainer.worker.anchor)
    assert ("CUDA out of memory." if cause == "memory" else "cannot meet in the launcher's store") in caplog.text
    assert "landscape_points=0" in caplog.text
    assert not list((tmp_path / "lsam").glob("landscape*"))


def test_a_loop_of_your_own_measures_no_landscape():
    model = net()
    with pytest.raises(TypeError, match="landscape_points"):
        LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), landscape_points=9)


# --- the page ---


def test_the_page_in_a_browser(runs, browser, tmp_path):
    page = tmp_path / "report.html"
    assert report(*runs, "-o", page).exit_code == 0
    shots = []
    for width, dark, media in [
        (1200, False, "screen"),
        (1200, True, "screen"),
        (360, False, "screen"),
        (760, False, "print"),
    ]:
        browser.emulate(width, dark, media)
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") <= width
        browser.screenshot(tmp_path / f"{width}{dark}{media}.png")
        shots.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert shots[0] == shots[2] == shots[3] == "rgb(255, 255, 255)"
    assert shots[1] == "rgb(15, 20, 25)"
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    assert set(browser.requests) == {page.as_uri()}
    assert browser.errors == []
    assert browser.ask("document.scripts.length") == 0
    assert browser.ask("document.querySelector('section h2').textContent") == "Compared"
    assert str(runs[0]) in browser.ask("[...document.querySelectorAll('h2')].map(e => e.textContent)[1]")


def test_figures_speak_and_the_keyboard_reaches_their_numbers(runs, browser, tmp_path):
    page = tmp_path / "report.html"
    report(runs[0], "-o", page)
    browser.emulate(1200)
    browser.open(page)
    figures = browser.ask("document.querySelectorAll('figure > svg').length")
    assert figures == 9
    nodes = browser("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in nodes if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]
    names = [image["name"]["value"] for image in images]
    assert len(names) == figures
    assert sum("worker 1:" in name for name in names) == 7
    assert any("Colours from" in name and "anchor at (0, 0)" in name for name in names)
    ids = browser.ask("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    # Tab and Enter open the first table.
    for key in ({"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}, {"key": "Enter", "text": "\r"}):
        browser("Input.dispatchKeyEvent", type="keyDown", **key)
        browser("Input.dispatchKeyEvent", type="keyUp", **{name: key[name] for name in key if name != "text"})
    assert browser.ask("document.querySelector('details').open")
    assert browser.ask("document.querySelector('details td').getBoundingClientRect().height") > 0


def test_runs_are_compared_over_seeds(runs, tmp_path):
    page = tmp_path / "report.html"
    report(*runs, "-o", page)
    text = page.read_text()
    assert "sync_steps=4 (n = 2)" in text
    assert f"{read_run(runs[2]).name}: sync_steps=8 (n = 1)" in text
    rows = text.split("Groups compared")[1].split("</table>")[0].split("<tr>")
    assert "±" in next(row for row in rows if "sync_steps=4" in row)
    assert "±" not in next(row for row in rows if "sync_steps=8" in row)  # its two workers are no two runs
    finals = [read_run(run).record.evaluations()[-1]["eval_loss"] for run in runs[:2]]
    points, spread = mean_and_spread([[(0, 1.0), (8, finals[0])], [(4, 2.0), (8, finals[1])]])
    assert points == [(8, pytest.approx(sum(finals) / 2))]
    assert spread == [pytest.approx(abs(finals[0] - finals[1]) / math.sqrt(2))]


@pytest.mark.parametrize(
    ("values", "mean", "deviation"),
    [
        ([3], 3.0, 0.0),
        ([1.0, 3.0], 2.0, math.sqrt(2)),
        ([math.nan], math.nan, 0.0),
        ([1.0, math.inf], math.inf, math.nan),
        ([math.inf, -math.inf], math.nan, math.nan),
    ],
)
def test_mean_and_deviation_of_what_diverged_too(values, mean, deviation):
    assert mean_and_deviation(values) == pytest.approx((mean, deviation), nan_ok=True)


def test_what_is_missing_is_said(runs, tmp_path):
    """A worker that died, one that never came, a torn landscape, no evaluations, a loss that is NaN."""
    run = tmp_path / "broken"
    shutil.copytree(runs[0], run)
    folder = run / "lsam"
    lines = (folder / "worker-0.jsonl").read_text().splitlines()
    kept = [line for line in lines if "eval_" not in line and '"end"' not in line]
    last = next(entry for entry in map(json.loads, reversed(kept)) if "lsam/anchor_version" in entry)
    kept.append(json.dumps({**last, "time": 2e9, "step": 17, "loss": "NaN"}))
    (folder / "worker-0.jsonl").write_text("\n".join(kept) + "\n")
    (folder / "worker-1.jsonl").unlink()
    (folder / "landscape.json").write_text("{")
    (run / "results.json").write_text(json.dumps({"eval_accuracy": 0.515625, "versions": {"torch": "2"}}))
    page = tmp_path / "report.html"
    page.write_text("an older page")
    assert report(run, "-o", page).exit_code == 0
    text = page.read_text()
    assert "Worker 0 is dead, not finished." in text
    assert "Worker 1 has written nothing here" in text
    assert "landscape.json could not be read" in text
    assert "It was not measured." in text
    assert "the run has logged no evaluation" in text
    assert "<td>eval_accuracy</td><td>0.5156</td>" in text
    assert "Not drawn, being NaN or infinite: 1 of the points." in text
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    (folder / "landscape.json").write_text(json.dumps({"run_id": run_id, "lines": {}}))
    (folder / "worker-0.jsonl").unlink()
    assert report(run, runs[1], "-o", page).exit_code == 0
    assert "There is nothing to draw" in page.read_text()
    assert "landscape.json lacks batches, batchnorm, distances, fractions, plane, strength" in page.read_text()


def test_a_folder_without_a_run_is_an_error(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = report(folder, "-o", tmp_path / "report.html")
        assert result.exit_code == 1
        assert "holds no record of a run" in result.output
        assert "Name the output_dir" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_counts_its_steps_once_and_its_bytes_on(runs, tmp_path):
    run = tmp_path / "resumed"
    shutil.copytree(runs[0], run)
    path = run / "lsam" / "worker-1.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    again = [{**entry, "time": entry["time"] + 100} for entry in entries]
    again[0]["step"] = 8
    again = [again[0], *(entry for entry in again[1:] if entry["step"] > 8)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries + again))
    points = [point for point in read_run(run).record.points(1) if "between_logs" not in point]
    assert [point["step"] for point in points] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    pushed = [point["lsam/bytes_pushed"] for point in points]
    assert pushed == sorted(pushed)
    assert pushed[-1] > entries[-2]["lsam/bytes_pushed"]


# --- figures ---


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.013, 0.021, 4) == [-0.01, 0.0, 0.01, 0.02]
    assert ticks(1e6, 1.000001e6)[0] >= 1e6


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 1.0), (1, 1.0)], [(0, 0.0), (0, 0.0)], [(0, -1e-9), (1, 1e300)]])
def test_any_finite_points_make_a_figure(points):
    figure = line_chart("name", "A <title>", "x", "y", [Series("curve", points, 0)])
    assert "<polyline" in figure
    assert "nan" not in figure
    assert "A &lt;title&gt;" in figure


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.99951, 1.00049, ["0.9995", "1", "1.0005"]),
        (0.69314, 0.69316, ["0.69314", "0.693145", "0.69315", "0.693155", "0.69316"]),
        (1000.0, 1400.0, ["1,000", "1,100", "1,200", "1,300", "1,400"]),
        (1.0e6, 1.2e6, ["1e+06", "1.05e+06", "1.1e+06", "1.15e+06", "1.2e+06"]),
        (0.0, 4e-14, ["0", "1e-14", "2e-14", "3e-14", "4e-14"]),
    ],
)
def test_a_tick_shows_its_value_however_narrow_the_axis(low, high, shown):
    figure = line_chart("name", "title", "x", "y", [Series("curve", [(0, low), (1, high)], 0)])
    assert re.findall(r'text-anchor="end"[^>]*>([^<]*)<', figure) == shown


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(0.69314, 0.6932, ["0.69314", "0.69317", "0.6932"]), (0.5, 0.5, ["0.5"] * 3), (0.0, 2.0, ["0", "1", "2"])],
)
def test_the_colours_of_a_map_are_told_apart(low, high, shown):
    figure = map_chart("name", "title", [-1.0, 1.0], [[low, high], [high, low]], [])
    assert re.findall(r'<text x="314"[^>]*>([^<]*)<', figure) == shown


def test_a_long_curve_is_thinned_and_keeps_its_end():
    figure = line_chart("name", "title", "x", "y", [Series("curve", [(x, float(x)) for x in range(10_001)], 0)])
    assert len(figure) < 20_000
    assert "10,000 at 10,000" in figure
