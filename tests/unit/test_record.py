"""The record of a run: what real workers write, what a reader makes of what they could not finish."""

from __future__ import annotations

import gc
import json
import logging
import math
import time
import tracemalloc
from pathlib import Path
from statistics import mean

import pytest
from models import arguments, blobs, net
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer, session
from hf_lsam.card import facts_of_record
from hf_lsam.cli.monitor import render, worker_states
from hf_lsam.record import Record, RecordReader, RecordWriter, describe, read_record, worker_file, worker_state
from hf_lsam.trainer.callbacks import OtherWorkers

METRICS = {"lsam/drift", "lsam/staleness", "lsam/anchor_version", "lsam/skipped_pushes", "lsam/refused_pushes"}


def trainer_of(tmp_path: Path, **fields) -> LSAMTrainer:
    args = arguments(LSAMConfig, tmp_path, sync_steps=2, **{"max_steps": 4, **fields})
    return LSAMTrainer(model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(16, 1))


def writer(tmp_path: Path, resumed: bool = False) -> RecordWriter:
    writer = RecordWriter(tmp_path, 0)
    writer.begin(resumed, 0, describe(1, {"sync_steps": 2}, {"name": None}))
    return writer


def test_a_trainer_writes_what_it_logs_and_what_it_evaluates(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.02)
    before = trainer.evaluate()
    trainer.train()
    with trainer.local():
        trainer.evaluate()  # of a worker, which is not the anchor
    after = trainer.evaluate()
    record = read_record(tmp_path)

    assert record.run["num_workers"] == 1
    assert record.run["configuration"].items() >= {"sync_steps": 2, "learning_rate": 0.02, "max_steps": 4}.items()
    assert record.run["model"]["trainable_parameters"] == trainer.worker_summary()["trainable_parameters"]
    entries = record.workers[0]
    logged = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert all(entry.keys() >= METRICS | {"learning_rate", "time"} for entry in logged)
    assert [entry["loss"] for entry in logged] == [e["loss"] for e in trainer.state.log_history if "loss" in e]
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    assert evaluated == [(0, before["eval_loss"]), (4, after["eval_loss"])]
    assert [entry["error"] for entry in entries if "end" in entry] == [None]
    assert worker_state(entries) == "finished"


def test_the_card_has_the_figures_of_the_anchor_that_is_loaded_as_the_best_on_all_data_sets(tmp_path):
    fields = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "a_loss", "greater_is_better": True}
    trainer = trainer_of(tmp_path, learning_rate=0.05, **fields, **best)
    trainer.eval_dataset = {"a": blobs(16, 1), "b": blobs(16, 2)}
    trainer.train()
    assert trainer.state.best_global_step == 1  # the loss falls
    evaluated = [entry for entry in trainer.state.log_history if entry["step"] == 1]
    losses = {
        name: entry[f"eval_{name}"] for name in ("a_loss", "b_loss") for entry in evaluated if f"eval_{name}" in entry
    }
    facts = facts_of_record(tmp_path, read_record(tmp_path))
    assert dict(facts.metrics) == losses
    assert ("B loss at the anchor of step 1", f"{losses['b_loss']:.4f}") in facts.results

    measured = trainer.evaluate(blobs(16, 3))  # of the model as it is now
    facts = facts_of_record(tmp_path, read_record(tmp_path))
    assert dict(facts.metrics) == {**losses, "loss": measured["eval_loss"]}

    trainer_of(tmp_path, max_steps=6, learning_rate=0.05, **fields).train(resume_from_checkpoint=True)
    facts = facts_of_record(tmp_path, read_record(tmp_path))
    assert [label for label, _ in facts.results if "anchor" in label] == ["Loss at the anchor"]


def test_a_resumed_run_goes_on_and_a_new_one_begins_anew(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2).train()
    first = read_record(tmp_path)
    trainer_of(tmp_path, max_steps=6).train(resume_from_checkpoint=True)
    resumed = read_record(tmp_path)
    assert resumed.run["run_id"] == first.run["run_id"]
    assert resumed.run["started"] == first.run["started"]
    assert [entry["step"] for entry in resumed.workers[0] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert sum("begin" in entry for entry in resumed.workers[0]) == 2

    trainer_of(tmp_path).train()
    anew = read_record(tmp_path)
    assert anew.run["run_id"] != first.run["run_id"]
    assert sum("begin" in entry for entry in anew.workers[0]) == 1


def test_the_losses_of_a_resumed_run_are_of_the_steps_that_it_makes(tmp_path):
    fields = {"logging_steps": 500, "save_strategy": "steps", "save_steps": 4}
    trainer_of(tmp_path, max_steps=4, **fields).train()
    trainer_of(tmp_path, max_steps=6, **fields).train(resume_from_checkpoint=True)
    trainer_of(tmp_path / "through", max_steps=6).train()
    resumed = [entry for entry in read_record(tmp_path).workers[0] if "loss" in entry][-2:]
    through = [entry for entry in read_record(tmp_path / "through").workers[0] if "loss" in entry][-2:]
    assert [entry["step"] for entry in resumed] == [5, 6]
    assert [entry["loss"] for entry in resumed] == pytest.approx([entry["loss"] for entry in through], rel=1e-4)


def test_an_error_is_the_last_line(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.compute_loss = lambda *args, **keywords: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    entries = read_record(tmp_path).workers[0]
    assert entries[-1]["error"] == "ZeroDivisionError: division by zero"
    assert worker_state(entries) == "failed"


def test_a_loop_writes_what_it_logs(tmp_path):
    import torch

    model, rows = net(), blobs()
    batch = {key: torch.stack([row[key] for row in rows.rows[:8]]) for key in ("x", "labels")}
    lsam = LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), output_dir=tmp_path, sync_steps=2)
    with lsam:
        for _ in range(3):
            loss = lsam.step(lambda: model(**batch)["loss"])
            assert lsam.log(loss=loss.item())["loss"] == loss.item()
    lsam.log_evaluation(eval_accuracy=0.5)
    entries = read_record(tmp_path).workers[0]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3]
    assert entries[1].keys() >= METRICS
    assert entries[1]["learning_rate"] == 0.1
    assert worker_state(entries) == "finished"
    assert (entries[-1]["step"], entries[-1]["eval_accuracy"]) == (3, 0.5)


def test_a_loop_without_a_folder_writes_nothing(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    model = net()
    with LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), sync_steps=2) as lsam:
        lsam.log()
    assert not list(tmp_path.iterdir())


def test_a_loop_that_neither_logs_nor_records_keeps_nothing_of_its_steps(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "RECORD_SECONDS", 0.0)
    model, rows = net(), blobs()
    batch = {key: torch.stack([row[key] for row in rows.rows[:8]]) for key in ("x", "labels")}

    def kept(steps: int) -> int:
        for _ in range(steps):
            lsam.step(lambda: model(**batch)["loss"])
        gc.collect()
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/hf_lsam/*")])
        return sum(trace.size for trace in snapshot.traces)

    with LSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), sync_steps=2) as lsam:
        tracemalloc.start()
        try:
            before = kept(100)
            assert kept(600) - before < 20_000  # bytes: a number kept for each step takes more
        finally:
            tracemalloc.stop()


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    writer(tmp_path).log(1, {"loss": math.nan, "a": math.inf, "b": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for line in worker_file(tmp_path, 0).read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    entry = read_record(tmp_path).workers[0][-1]
    assert math.isnan(entry["loss"])
    assert (entry["a"], entry["b"]) == (math.inf, -math.inf)


def test_torn_lines_are_passed_over_wherever_they_stand(tmp_path):
    writer(tmp_path).log(1, {"loss": 1.0})
    path = worker_file(tmp_path, 0)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        writer(tmp_path, resumed=True).log(2, {"loss": 2.0})
        losses = [entry["loss"] for entry in read_record(tmp_path).workers[0] if "loss" in entry]
        assert losses in ([2.0], [1.0, 2.0])
    path.write_bytes(whole + b'{"loss": 3.0')
    reader = RecordReader(tmp_path)
    assert [entry.get("loss") for entry in reader.read().workers[0]] == [None, 1.0]
    path.write_bytes(whole + b'{"loss": 3.0}\n')  # the rest of the line has come
    assert [entry.get("loss") for entry in reader.read().workers[0]] == [None, 1.0, 3.0]


def test_a_full_disk_is_warned_of_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "lsam").mkdir()
    worker_file(tmp_path, 0).symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING, "hf_lsam"):
        trainer_of(tmp_path).train()
    warnings = [message for message in caplog.messages if "record of the run" in message]
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]


def test_what_is_no_record_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="Name the output_dir"):
        read_record(tmp_path)
    writer(tmp_path)
    path = tmp_path / "lsam/run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_record(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        read_record(tmp_path)


# --- what worker 0 tells its trackers of the others ---


class Tracker(TrainerCallback):
    def __init__(self):
        self.told: list[tuple[int, float]] = []

    def on_log(self, args, state, control, logs=None, **keywords):
        self.told.append((state.global_step, logs["worker_1/loss"]))


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("clocks", [(1e12, 0.0), (0.0, 1e12)], ids=["behind", "ahead"])
@pytest.mark.parametrize("length", [1, 9], ids=["shorter", "longer"])
def test_trackers_are_told_of_this_run_and_no_other_whatever_the_clocks_say(
    tmp_path, monkeypatch, resumed, clocks, length
):
    """Worker 1's clock is not worker 0's, and the run before, whose lines worker 0 finds, may have had another."""
    before, now = clocks
    monkeypatch.setattr("hf_lsam.record.time.time", lambda: before)
    worker = RecordWriter(tmp_path, 1)
    worker.begin(False, 0)
    for step in range(1, 6):
        worker.log(step, {"loss": 0.5})
    worker.end(5, None)

    monkeypatch.undo()
    others, tracker = OtherWorkers(tmp_path, 2), Tracker()
    others.report([tracker], None, TrainerState(), TrainerControl())
    assert tracker.told == []
    monkeypatch.setattr("hf_lsam.record.time.time", lambda: now)
    worker = RecordWriter(tmp_path, 1)
    worker.begin(resumed, 5 * resumed)
    for step in range(1, length + 1):
        worker.log(step, {"loss": 0.25})
    others.report([tracker], None, TrainerState(), TrainerControl())
    worker.log(100, {"loss": 0.125})
    others.report([tracker], None, TrainerState(), TrainerControl())
    assert tracker.told == [*((step, 0.25) for step in range(1, length + 1)), (100, 0.125)]


def test_between_log_points_the_record_has_entries_of_its_own_by_time(tmp_path, monkeypatch):
    def points(name: str, seconds: float, **fields) -> list[dict]:
        monkeypatch.setattr(session, "RECORD_SECONDS", seconds)
        args = arguments(LSAMConfig, tmp_path / name, max_steps=12, sync_steps=4, **fields)
        LSAMTrainer(model=net(), args=args, train_dataset=blobs()).train()
        record = read_record(tmp_path / name)
        assert "loss" in str(record.workers[0])
        console = Console(width=200, color_system=None)
        with console.capture() as said:
            console.print(render(record, worker_states(record), time.time()))
        points = record.points(0)
        assert f"{points[-1]['loss']:.4f}" in said.get()  # also of a run without a log point
        return points

    logged = points("logged", 1e9)
    assert [(point["step"], "between_logs" in point) for point in logged] == [(step, False) for step in range(1, 13)]

    rarely = points("rarely", 1e9, logging_steps=500)  # the first step, and the last
    assert [point["step"] for point in rarely] == [1, 12]
    assert rarely[0]["loss"] == pytest.approx(logged[0]["loss"], rel=1e-4)
    assert rarely[1]["loss"] == pytest.approx(mean(point["loss"] for point in logged[1:]), rel=1e-4)
    assert rarely[1]["lsam/drift"] == pytest.approx(logged[-1]["lsam/drift"])

    always = points("always", 0.0, logging_steps=500, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert [point["step"] for point in always] == [*range(1, 13)]
    for each, reference in zip(always, logged, strict=True):
        assert each["between_logs"]
        assert each["loss"] == pytest.approx(reference["loss"], rel=0.1)  # SAM perturbs for half of the batch at a time
        for name in ("lsam/staleness", "lsam/anchor_version", "lsam/skipped_pushes", "learning_rate"):
            assert each[name] == reference[name]

    record = read_record(tmp_path / "always")
    killed = Record(record.run, {0: [entry for entry in record.workers[0] if entry["step"] < 12]})
    assert ("Workers", "1; steps 11") in facts_of_record(tmp_path / "always", killed).results
