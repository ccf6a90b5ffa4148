"""The experiments on scale: the simulated one at its smallest size, and the arithmetic of the one on paper."""

from __future__ import annotations

import json

import pytest
from images import write_images

from hf_lsam.parameters import data_parallel_bytes
from recipes.common.configuration import parse_configuration
from recipes.common.image_data import ImageDataArguments
from scripts.common.simulated import SimulatedRuns
from scripts.experiments import estimate_scale, simulate_scale
from scripts.experiments.simulate_scale import DATA_PARALLEL, LSAM, Run

PARAMETERS = 3 * 8 * 8 * 32 + 32 + 32 * 3 + 3


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("images")
    train, held_out = write_images(folder / "train.parquet", 96, 0), write_images(folder / "test.parquet", 30, 1)
    words = ["--image_size=8", "--dataset=parquet", f"--train_file={train}", f"--eval_file={held_out}"]
    return parse_configuration((ImageDataArguments,), words)


def test_workers_a_free_server_and_a_busy_one_are_simulated(data):
    words = json.dumps(data)
    free, busy, reduced = (
        simulate_scale.simulate(run, words)
        for run in (Run(LSAM, 4, 16, 0.05), Run(LSAM, 4, 16, 0.05, load=4.0), Run(DATA_PARALLEL, 4, 16, 0.05))
    )
    assert {each["parameters"] for each in (free, busy, reduced)} == {PARAMETERS}
    assert {each["steps_in_all"] for each in (free, busy, reduced)} == {4 * 16}
    assert max(free["error"], reduced["error"]) < 10  # three plain colours
    assert reduced["bytes"] == data_parallel_bytes([16] * 4, PARAMETERS)
    assert reduced["anchors"] == 16
    assert free["sync_steps"] == 2
    assert free["pushes"] >= 4 * 16 // 2
    # A push takes the busy server two seconds, so it ends no sooner than after so many; fewer of them cover the steps.
    assert busy["virtual_seconds"] >= 2 * busy["pushes"] > free["virtual_seconds"]
    assert busy["pushes"] < free["pushes"]
    assert free["staleness"] < 0.5 < busy["staleness"]


def test_every_number_of_workers_and_every_knob_has_the_same_trials(tmp_path, data, monkeypatch):
    few = {"WORKERS": (1, 4), "STEPS": 8, "SAMPLES": 128, "RATES": (0.001, 0.05), "MANY": 4}
    few |= {"ADAM_WORKERS": (4,), "ADAM_RATES": (0.001, 0.01)}
    for name, value in few.items():
        monkeypatch.setattr(simulate_scale, name, value)
    runs = SimulatedRuns(simulate_scale.simulate, simulate_scale.error_of, {}, data, tmp_path, processes=1, quiet=True)
    made = simulate_scale.make(runs, seeds=2, most_workers=4)
    trials, others = ([each for each in made if each["run"]["validation"] is kind] for kind in (True, False))
    plans = simulate_scale.compared(4)
    assert len(trials) == 2 * len(plans) + 2 * 2 * 3  # the latter with AdamW, of three seeds
    assert len(others) == 2 * (len(plans) + len(simulate_scale.LOADS) - 1)
    for plan in plans:
        own = [simulate_scale.of_plan(made, plan)[seed]["run"] for seed in range(2)]
        tried = {
            each["run"]["learning_rate"]: each["error"]
            for each in trials
            if {**each["run"], "learning_rate": 0.0, "seed": 0, "validation": False} == vars(plan)
        }
        assert tried.keys() == {0.001, 0.05}
        assert {run["learning_rate"] for run in own} == {min(tried, key=tried.get)}
    table = simulate_scale.tables(made)
    assert "| steps a worker | 8 | 8 |" in table
    assert "| steps a worker | 16 | 4 |" in table
    errors = [each["error"] for each in trials if each["run"]["method"] == "LSAM, AdamW"][3:]
    assert f" {sum(errors) / 3:.1f} |\n| data-parallel AdamW, n = 4 |" in table
    simulate_scale.draw(made, tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").read_text().count('<g id="axes_') == 2


def test_the_workers_of_the_other_questions_cannot_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["simulate_scale.py", "--most_workers", "16"])
    with pytest.raises(SystemExit):
        simulate_scale.main()
    assert "--most_workers: invalid choice: 16 (choose from 64, 256, 1024)" in capsys.readouterr().err


def test_what_many_workers_ask_for_follows_from_what_was_measured():
    measured = estimate_scale.Measured(absorbed=4e9, linked=1e9)
    billion, push = 10**9, 10**9 + 10**9 // 64
    # Every 16 s, 125 machines of 8 workers: 4 GB to add up and 1.016 GB each way of each.
    assert estimate_scale.machines_of(billion, 1000) == 125
    assert estimate_scale.loads(billion, 125, measured) == pytest.approx(
        {
            "one link": 2 * push / 1e9 / 16,
            "adding": 125 / 16,
            "cores": 125 * (1 + 2 * push / 1e9) / 16 / 64,
            "network": 125 * push / 16 / 12.5e9,
            "memory": (12 + 4 * 10 + 125 * 12) * billion / 2**40,
        }
    )
    assert estimate_scale.servers(billion, 125, measured) == 8
    assert estimate_scale.levels(billion, 16, measured) == 1  # it adds up those of 16 machines in a period
    assert estimate_scale.levels(billion, 17, measured) == 2
    assert estimate_scale.levels(billion, 257, measured) == 3
    assert estimate_scale.levels(70 * billion, 125, measured) is None
    assert estimate_scale.gpus_of(70 * billion) == 28  # 32 bytes a parameter
    assert estimate_scale.machines_of(70 * billion, 1000) == 1000
    assert estimate_scale.all_reduce_bytes(billion, 125) == 2 * 124 / 125 * 4 * billion
    assert estimate_scale.delay(billion, measured) == pytest.approx(2 * (push / 1e9 + 1) / 16)


def test_the_constants_are_those_of_the_benchmarks():
    measured = estimate_scale.Measured.load()
    assert measured.absorbed > measured.linked > 0
    assert estimate_scale.tables(measured).count("\n| 1 B |") == 1 + len(estimate_scale.RUNS)
