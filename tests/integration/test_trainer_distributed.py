"""LSAMTrainer with two and three workers: real processes, started by `accelerate launch` on CPU.

Each script writes what every worker saw as JSON, one file a rank; the tests assert on it. What can share a launch does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from launch import PATHS, TIMEOUT, accelerate_launch, write_script
from safetensors.torch import load_file

from hf_lsam.checkpoint import is_sealed, newest_sealed

PREAMBLE = """
import hashlib, json, os, sys
from pathlib import Path

import torch
from models import Net, Rows, Stream, arguments, blobs, net, vector
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, RANK = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
LSAM = dict(sam_rho=0.05, sync_steps=4, coupling_strength=0.2, per_device_train_batch_size=4)


def report(**values):
    (OUT / f"rank{RANK}.json").write_text(json.dumps(values))


def digest(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
"""


def launch(tmp_path: Path, script: str, *arguments: str, num_processes: int = 2, **options):
    """Runs the preamble and `script`; returns the finished launch and the reports of the ranks that wrote one.

    `arguments` follow the folder on the script's command line: `sys.argv[2]` is the first.
    """
    for old in tmp_path.glob("rank*.json"):
        old.unlink()
    path = write_script(tmp_path / "script.py", PREAMBLE + script)
    options = {"num_processes": num_processes, "fork": True, "PYTHONPATH": PATHS, **options}
    run = accelerate_launch(path, str(tmp_path), *arguments, **options)
    reports = [tmp_path / f"rank{rank}.json" for rank in range(num_processes)]
    return run, [json.loads(report.read_text()) for report in reports if report.exists()]


DATA = """
import random

import datasets
import torch.distributed as dist
from accelerate import Accelerator

Accelerator(cpu=True)
opened = dist.is_initialized()  # the user's own process group, before there are any training arguments

try:
    arguments(LSAMConfig, OUT / "x", num_workers=3)
except ValueError as error:
    wrong_number = str(error)


class Indexed(Net):
    def forward(self, x, labels=None, index=None, length=None):
        return super().forward(x, labels)


class Watch(TrainerCallback):
    def __init__(self):
        self.groups, self.drawn, self.masks = [], [], []

    def on_epoch_begin(self, args, state, control, **keywords):
        self.drawn.append([])

    def on_step_begin(self, args, state, control, **keywords):
        self.groups.append(dist.is_initialized())

    on_step_end = on_step_begin


class Shuffled(torch.utils.data.Sampler):
    def __len__(self):
        return 64

    def __iter__(self):
        return iter(random.sample(range(64), 64))


SAMPLERS = {
    "weighted": lambda: torch.utils.data.WeightedRandomSampler(torch.ones(64), 64, replacement=False),
    "own_sampler": Shuffled,
}


class Watched(LSAMTrainer):
    def _get_train_sampler(self, *positional, **keywords):
        name = Path(self.args.output_dir).name
        return SAMPLERS[name]() if name in SAMPLERS else super()._get_train_sampler(*positional, **keywords)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.watch.drawn[-1] += inputs["index"].tolist()
        return super().training_step(model, inputs, num_items_in_batch)


rows = blobs(64)
for i, row in enumerate(rows.rows):
    row["index"] = torch.tensor(i)
lengths = torch.randint(1, 99, (64,), generator=torch.Generator().manual_seed(0)).tolist()
table = datasets.Dataset.from_dict(
    {
        "x": [row["x"].tolist() for row in rows.rows],
        "labels": [int(row["labels"]) for row in rows.rows],
        "index": list(range(64)),
        "length": lengths,
    }
)
RUNS = {
    "sharded": (rows, dict(num_train_epochs=3)),
    "independent": (rows, dict(num_train_epochs=3, data_distribution="independent")),
    "group_by_length": (table, dict(num_train_epochs=3, train_sampling_strategy="group_by_length")),
    "weighted": (rows, dict(num_train_epochs=3)),
    "own_sampler": (rows, dict(num_train_epochs=3)),
    "stream": (Stream(rows), dict(max_steps=16)),
    "datasets_stream": (table.remove_columns("length").to_iterable_dataset(), dict(max_steps=16)),
    "datasets_shards": (table.remove_columns("length").to_iterable_dataset(num_shards=4), dict(max_steps=16)),
}
results = {}
for name, (data, fields) in RUNS.items():
    torch.manual_seed(0)
    model, watch = Indexed(dropout=0.5), Watch()
    model.dropout.register_forward_hook(
        lambda module, args, output: watch.masks.append(digest((output == 0).cpu())) if module.training else None
    )
    args = arguments(LSAMConfig, OUT / name, **{"train_sampling_strategy": "random", **LSAM, **fields})
    start = digest(vector(model))
    held_out = table.select(range(24))
    trainer = Watched(model=model, args=args, train_dataset=data, eval_dataset=held_out, callbacks=[watch])
    trainer.watch = watch
    trainer.train()
    results[name] = dict(
        start=start,
        end=digest(vector(trainer.model)),
        metrics=trainer.evaluate(),
        groups=watch.groups,
        drawn=watch.drawn,
        masks=watch.masks,
        summary=trainer.worker_summary(),
        log=[entry for entry in trainer.state.log_history if "loss" in entry],
        main=(args.should_save, trainer.is_world_process_zero(), str(args.device)),
    )
    with trainer.local():
        results[name]["own"] = digest(vector(trainer.model))
try:
    trainer.hyperparameter_search(n_trials=1)
except Exception as error:
    search = str(error)
report(opened=opened, wrong_number=wrong_number, search=search, **results)
"""


@pytest.fixture(scope="module")
def data_runs(tmp_path_factory):
    """What each of two workers saw in eight runs within one launch."""
    _, reports = launch(tmp_path_factory.mktemp("data"), DATA)
    assert len(reports) == 2
    return reports


SAMPLED = ["sharded", "group_by_length", "weighted", "own_sampler"]
RUNS = [*SAMPLED, "independent", "stream", "datasets_stream", "datasets_shards"]


@pytest.mark.parametrize("name", RUNS)
def test_all_workers_end_with_the_anchor_and_its_metrics(data_runs, name):
    first, second = (report[name] for report in data_runs)
    assert first["start"] == second["start"]
    assert first["end"] == second["end"] != first["start"]
    assert first["own"] != second["own"]  # each its own parameters beside it
    assert first["metrics"]["eval_loss"] == second["metrics"]["eval_loss"]
    assert 0 < first["metrics"]["eval_loss"] < 3
    assert [report[name]["main"] for report in data_runs] == [[True, True, "cpu"], [False, False, "cpu"]]


def test_no_process_group_exists_while_training(data_runs):
    for report in data_runs:
        assert report["opened"] is True  # there was one; the configuration closed it
        for name in RUNS:
            assert len(report[name]["groups"]) == 2 * report[name]["summary"]["steps"]
            assert not any(report[name]["groups"])


def test_another_number_of_workers_than_configured_is_refused(data_runs):
    for report in data_runs:
        assert "num_workers=3, but 2 were started" in report["wrong_number"]
        assert "accelerate launch --multi_gpu --num_processes 3" in report["wrong_number"]


def test_a_hyperparameter_search_with_several_workers_is_refused(data_runs):
    for report in data_runs:
        assert "2 of them would train with different settings. Search with one worker" in report["search"]


@pytest.mark.parametrize("name", SAMPLED)
def test_sharded_data_is_shared_and_reshuffled_each_epoch(data_runs, name):
    first, second = (report[name]["drawn"] for report in data_runs)
    assert len(first) == len(second) == 3
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == len(theirs) == 32
        assert sorted(ours + theirs) == list(range(64))
    for worker in (first, second):
        assert len({tuple(epoch) for epoch in worker}) == 3
        assert set(worker[0]) != set(worker[1])  # the shards are drawn anew, not only their order


@pytest.mark.parametrize("name", ["stream", "datasets_stream", "datasets_shards"])
def test_iterable_datasets_are_shared_among_the_workers(data_runs, name):
    first, second = (report[name]["drawn"] for report in data_runs)
    assert len(first) == len(second) == 2
    for ours, theirs in zip(first, second, strict=True):
        assert len(ours) == len(theirs) == 32
        assert sorted(ours + theirs) == list(range(64))


def test_independent_workers_draw_from_all_the_data_in_their_own_order(data_runs):
    first, second = (report["independent"]["drawn"] for report in data_runs)
    orders = [tuple(epoch) for epoch in first + second]
    assert len(orders) == 6
    for order in orders:
        assert sorted(order) == list(range(64))
    assert len(set(orders)) == 6


def test_dropout_masks_differ_between_workers_and_not_between_passes(data_runs):
    first, second = (report["sharded"]["masks"] for report in data_runs)
    assert len(first) == len(second) == 2 * 24
    for masks in (first, second):
        assert masks[0::2] == masks[1::2]
        assert len(set(masks)) == 24
    assert not set(first) & set(second)


def test_each_worker_logs_its_own_exchange(data_runs):
    numel = 8 * 16 + 16 + 16 * 3 + 3
    for report in data_runs:
        summary, log = report["sharded"]["summary"], report["sharded"]["log"]
        assert summary["steps"] == 24
        # 24 steps hold 6 periods; each was pushed or its sum went out with a later one.
        assert summary["pushes"] + summary["skipped_pushes"] in (6, 7)
        assert summary["refused_pushes"] == 0
        assert summary["bytes_pushed"] == summary["pushes"] * numel * 4
        assert summary["bytes_pulled"] % (numel * 4) == 0
        assert 1 <= summary["bytes_pulled"] // (numel * 4) <= summary["anchor_version"] + 2
        assert summary["trainable_parameters"] == numel
        assert [entry["step"] for entry in log] == list(range(1, 25))
        versions = [entry["lsam/anchor_version"] for entry in log]
        assert versions == sorted(versions)
        assert versions[-1] <= summary["anchor_version"]
        pushed = [entry["lsam/bytes_pushed"] for entry in log]
        assert pushed == sorted(pushed)
        assert pushed[3] == numel * 4  # at the first step of the first push
        assert all(entry["lsam/drift"] > 0 for entry in log)
        assert all(entry["lsam/staleness"] >= 0 for entry in log)
        assert summary["staleness_mean"] <= summary["staleness_max"] <= summary["anchor_version"]
    versions = {report["sharded"]["summary"]["anchor_version"] for report in data_runs}
    assert len(versions) == 1
    # 48 worker steps: 6 versions if both run side by side. What one pushes after the other has left counts for n = 1,
    # and skipped pushes join later ones.
    assert 2 <= versions.pop() <= 13


# --- what does not change the run: processes that load the data, a model made by each worker ---

IN_TURN = """
import time


class InTurn(TrainerCallback):
    \"\"\"Worker 1 makes each step between two of worker 0's, so that each always sees the same of the other.\"\"\"

    def __init__(self, name):
        self.name, self.x, self.drawn, self.versions = name, [], [], []

    def wait_for(self, rank, step):
        while step and not (OUT / f"{self.name}-{rank}-{step}").exists():
            time.sleep(0.002)

    def on_train_begin(self, args, state, control, model=None, **keywords):
        self.first = [digest(vector(model)), digest(self.trainer.worker.anchor)]
        torch.manual_seed(RANK)  # what model_init draws, worker 0's dropout would not

    def on_step_begin(self, args, state, control, **keywords):
        self.wait_for(1 - RANK, state.global_step + RANK)

    def on_step_end(self, args, state, control, model=None, **keywords):
        worker = self.trainer.worker
        worker.link.settle()
        worker.pull_newest()
        self.x.append(digest(vector(model)))
        self.versions.append(worker.version)
        (OUT / f"{self.name}-{RANK}-{state.global_step}").touch()
        if state.global_step == state.max_steps:
            self.wait_for(1, state.max_steps)  # nobody leaves before
            while RANK and "worker 0 finished" not in (OUT / self.name / "server.log").read_text():
                time.sleep(0.002)  # so that the last pushes, too, come in one order


class Indexed(Net):
    def forward(self, x, labels=None, index=None):
        return super().forward(x, labels)


class Watched(LSAMTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.in_turn.drawn.append(inputs["index"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)


def model():
    return Indexed(dropout=0.2)


rows = blobs(64)
for i, row in enumerate(rows.rows):
    row["index"] = torch.tensor(i)
results = {}
for name in ("plain", "dataloader_num_workers", "model_init"):
    args = arguments(
        LSAMConfig, OUT / name, max_steps=12, dataloader_num_workers=2 if name == "dataloader_num_workers" else 0,
        eval_strategy="steps", eval_steps=6, **{**LSAM, "train_sampling_strategy": "random"},
    )
    # From model_init each worker makes the model with Trainer's seed, wherever its own generator is.
    torch.manual_seed(100 + RANK if name == "model_init" else args.seed)
    given = dict(model_init=model) if name == "model_init" else dict(model=model())
    in_turn = InTurn(name)
    trainer = Watched(args=args, train_dataset=rows, eval_dataset=blobs(8, seed=5), callbacks=[in_turn], **given)
    trainer.in_turn, in_turn.trainer = in_turn, trainer
    trainer.train()
    results[name] = dict(
        first=in_turn.first, x=in_turn.x, drawn=in_turn.drawn, versions=in_turn.versions,
        loss=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        evaluated=[[e["step"], e["eval_loss"]] for e in trainer.state.log_history if "eval_loss" in e],
        end=digest(vector(trainer.model)), final=trainer.evaluate()["eval_loss"],
    )
report(**results)
"""


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    _, reports = launch(tmp_path_factory.mktemp("in_turn"), IN_TURN)
    assert len(reports) == 2
    return reports


def test_workers_that_take_turns_exchange(in_turn):
    """So that equal runs mean something."""
    first, second = (report["plain"] for report in in_turn)
    assert first["first"] == second["first"]
    assert first["end"] == second["end"]
    assert len(first["x"]) == len(second["x"]) == 12
    assert not set(first["x"]) & set(second["x"])
    for worker in (first, second):
        assert worker["versions"] == sorted(worker["versions"])
        assert worker["versions"][-1] >= 2
    for epoch in (slice(0, 8), slice(8, 12)):
        drawn = [index for worker in (first, second) for batch in worker["drawn"][epoch] for index in batch]
        assert len(set(drawn)) == len(drawn) == 8 * len(first["drawn"][epoch])


def test_worker_0_alone_evaluates_while_training_also_at_the_last_step(in_turn):
    first, second = (report["plain"] for report in in_turn)
    assert [step for step, _ in first["evaluated"]] == [6, 12]
    assert second["evaluated"] == []
    losses = [loss for _, loss in first["evaluated"]]
    assert losses[0] > losses[1] > first["final"] > 0  # the last push of worker 1 comes after the last of these
    assert first["final"] == second["final"]


@pytest.mark.parametrize("name", ["dataloader_num_workers", "model_init"])
def test_two_workers_train_bit_for_bit_as_without(in_turn, name):
    for report in in_turn:
        assert report[name] == report["plain"]


# --- stopping, the best model, a worker that breaks ---

STOPPING = """
import itertools

scores = itertools.chain([0.1, 0.9], itertools.repeat(0.2))
evaluated = []


def score(prediction):
    evaluated.append(next(scores))
    return {"score": evaluated[-1]}


args = arguments(
    LSAMConfig,
    OUT / "stopped",
    max_steps=2000,
    eval_strategy="steps",
    eval_steps=4,
    save_strategy="steps",
    save_steps=4,
    load_best_model_at_end=True,
    metric_for_best_model="score",
    greater_is_better=True,
    **LSAM,
)
trainer = LSAMTrainer(
    model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(8, seed=5), compute_metrics=score
)
trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
trainer.train()
stopped = dict(
    steps=trainer.state.global_step,
    weights=vector(trainer.model).tolist(),
    evaluated=list(evaluated),
    best=trainer.state.best_model_checkpoint,
    metrics=trainer.evaluate(),
)


def best_of(folder, of_steps, **fields):
    # A run whose anchor is worth `of_steps`, evaluation by evaluation.
    scores = iter(of_steps)
    args = arguments(
        LSAMConfig, OUT / folder, eval_strategy="steps", metric_for_best_model="score", greater_is_better=True,
        **fields, **LSAM,
    )
    trainer = LSAMTrainer(
        model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(8, seed=5),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    return dict(best=trainer.state.best_model_checkpoint, weights=vector(trainer.model).tolist())


# The best evaluation is of step 6, which is not saved.
between = best_of(
    "between", [0.1, 0.5, 0.9, 0.2], max_steps=8, eval_steps=2, save_strategy="steps", save_steps=4,
    load_best_model_at_end=True,
)
saved_best = best_of("best", [0.1, 0.9, 0.2], max_steps=12, eval_steps=4, save_strategy="best")


class Break(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **keywords):
        if RANK == 1 and state.global_step == 6:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))


args = arguments(LSAMConfig, OUT / "broken", max_steps=24, max_bad_pushes=100, **LSAM)
trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(192), callbacks=[Break()])
trainer.train()
with trainer.local():
    own = vector(trainer.model)
broken = dict(
    summary=trainer.worker_summary(), weights=vector(trainer.model).tolist(), own_is_finite=bool(own.isfinite().all())
)
gathered = trainer.gather_from_workers("refused", trainer.worker_summary()["refused_pushes"])
report(stopped=stopped, between=between, saved_best=saved_best, broken=broken, gathered=gathered)
"""


@pytest.fixture(scope="module")
def stopping(tmp_path_factory):
    path = tmp_path_factory.mktemp("stopping")
    run, reports = launch(path, STOPPING)
    assert len(reports) == 2
    return path, run, reports


def test_early_stopping_at_worker_0_stops_the_others(stopping):
    _, _, (first, second) = stopping
    assert first["stopped"]["steps"] == 16  # the best at 8, then two that are not better
    assert first["stopped"]["evaluated"] == [0.1, 0.9, 0.2, 0.2]
    assert second["stopped"]["steps"] < 2000
    assert second["stopped"]["evaluated"] == []


def test_all_workers_load_the_same_best_model(stopping):
    path, _, reports = stopping
    best = load_file(path / "stopped" / "checkpoint-8" / "model.safetensors")
    expected = torch.cat([best[name].flatten() for name in ("first.weight", "first.bias", "last.weight", "last.bias")])
    last = load_file(path / "stopped" / "checkpoint-16" / "model.safetensors")
    assert not torch.equal(best["first.weight"], last["first.weight"])
    for report in reports:
        assert report["stopped"]["best"] == str(path / "stopped" / "checkpoint-8")
        assert torch.equal(torch.tensor(report["stopped"]["weights"]), expected)
    losses = {report["stopped"]["metrics"]["eval_loss"] for report in reports}
    assert len(losses) == 1
    assert math.isfinite(losses.pop())


def test_all_workers_load_the_best_of_the_saved_where_the_best_of_all_was_not_saved(stopping):
    path, _, reports = stopping
    saved = load_file(path / "between" / "checkpoint-4" / "model.safetensors")
    expected = torch.cat([saved[name].flatten() for name in ("first.weight", "first.bias", "last.weight", "last.bias")])
    for report in reports:
        assert report["between"]["best"] == str(path / "between" / "checkpoint-4")
        assert torch.equal(torch.tensor(report["between"]["weights"]), expected)


def test_what_the_others_were_is_saved_where_worker_0_may_save_the_best(stopping):
    path, _, _ = stopping
    assert {folder.name for folder in (path / "best").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}
    own = {folder.name for folder in (path / "best" / "workers" / "1").glob("checkpoint-*")}
    assert own == {"checkpoint-4", "checkpoint-8", "checkpoint-12"}


def test_a_worker_that_has_become_nan_is_refused_and_the_anchor_stays_finite(stopping):
    path, run, (first, second) = stopping
    assert first["broken"]["summary"]["refused_pushes"] == 0
    assert second["broken"]["summary"]["refused_pushes"] >= 1
    assert first["gathered"] == [0, second["broken"]["summary"]["refused_pushes"]]
    assert second["gathered"] is None
    assert [report["broken"]["own_is_finite"] for report in (first, second)] == [True, False]
    weights = torch.tensor(first["broken"]["weights"])
    assert weights.isfinite().all()
    assert torch.equal(weights, torch.tensor(second["broken"]["weights"]))
    assert second["broken"]["summary"]["pushes"] == 1  # what it handed in before, at step 4
    assert first["broken"]["summary"]["anchor_version"] >= 1
    assert "refused a push of worker 1" in (path / "broken" / "server.log").read_text()
    assert run.stderr.count("LSAM, worker 1: the distance to the anchor keeps growing (lsam/drift nan)") == 1


# --- resume ---

RESUME = """
class Begin(TrainerCallback):
    def __init__(self):
        self.after = {}

    def on_train_begin(self, args, state, control, model=None, **keywords):
        worker, steps = self.trainer.worker, [s["step"].item() for s in self.trainer.optimizer.state.values()]
        self.first = dict(
            x=digest(vector(model)), y=digest(worker.anchor), step=state.global_step, local_steps=worker.local_steps,
            version=worker.version, optimizer_steps=steps, rng=digest(torch.get_rng_state()),
        )

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.after[state.global_step] = digest(vector(model))

    def on_step_begin(self, args, state, control, **keywords):
        self.rng = getattr(self, "rng", None) or digest(torch.get_rng_state())


def run(resume=None):
    begin = Begin()
    args = arguments(
        LSAMConfig, OUT / "run", max_steps=10, save_strategy="steps", save_steps=4,
        **{**LSAM, "optim": "adamw_torch", "learning_rate": 0.01, "train_sampling_strategy": "random"},
    )
    trainer = LSAMTrainer(model=net(dropout=0.2), args=args, train_dataset=blobs(144), callbacks=[begin])
    begin.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    return dict(
        begin=begin.first, after=begin.after, rng=begin.rng, steps=trainer.state.global_step,
        end=digest(vector(trainer.model)), version=trainer.worker.version,
    )


if len(sys.argv) == 2:
    report(through=run(), resumed=run(str(OUT / "run" / "checkpoint-4")))
else:
    report(resumed=run(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume")
    _, reports = launch(path, RESUME)
    assert len(reports) == 2
    return path, reports


def test_resume_continues_from_each_workers_own_state(resumed):
    path, reports = resumed
    for rank, report in enumerate(reports):
        through, again = report["through"], report["resumed"]
        assert (through["begin"]["step"], through["steps"]) == (0, 10)
        assert (again["begin"]["step"], again["begin"]["local_steps"], again["steps"]) == (4, 4, 10)
        assert again["begin"]["x"] == through["after"]["4"]
        assert again["begin"]["optimizer_steps"] == [4.0] * 4
        assert list(again["after"]) == ["5", "6", "7", "8", "9", "10"]
        folder = path / "run" / ("" if rank == 0 else f"workers/{rank}") / "checkpoint-4"
        state = load_file(folder / "lsam_worker.safetensors")
        assert state["counters"][0] == 4
        assert (folder / "optimizer.pt").exists()
        assert (folder / "model.safetensors").exists() == (rank == 0)  # one model, worker 0's
        assert (folder / "lsam_server.safetensors").exists() == (rank == 0)
    first, second = (report["resumed"] for report in reports)
    assert first["begin"]["x"] != second["begin"]["x"]
    assert first["rng"] != second["rng"]
    assert first["end"] == second["end"]
    assert first["version"] == second["version"] > 0


def test_resume_with_a_worker_more_starts_it_at_the_anchor_and_says_so(resumed):
    path, before = resumed
    run, reports = launch(path, RESUME, str(path / "run" / "checkpoint-4"), num_processes=3)
    assert len(reports) == 3
    for rank in (0, 1):
        assert reports[rank]["resumed"]["begin"]["x"] == before[rank]["through"]["after"]["4"]
    new = reports[2]["resumed"]
    assert (new["begin"]["step"], new["steps"]) == (4, 10)
    assert new["begin"]["x"] == new["begin"]["y"]
    assert "was written by 2 workers, and 3 resume it" in run.stderr
    assert "Worker 2 has no state of its own" in run.stderr
    assert "it starts at the anchor" in run.stderr
    assert "Worker 1 has no state" not in run.stderr
    assert len({report["resumed"]["rng"] for report in reports}) == 3
    assert len({report["resumed"]["end"] for report in reports}) == 1


LIMITED = """
import time


class Uneven(TrainerCallback):
    \"\"\"Worker 0 stands still after its first checkpoint until worker 1 has saved its third.\"\"\"

    def on_save(self, args, state, control, **keywords):
        if RANK == 0 and state.global_step == 4:
            while not (OUT / "run/workers/1/checkpoint-12/lsam_complete.json").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), 9)

    def on_train_begin(self, args, state, control, **keywords):
        (OUT / f"begin{RANK}").write_text(str(state.global_step))


args = arguments(
    LSAMConfig, OUT / "run", max_steps=int(sys.argv[2]), save_strategy="steps", save_steps=4, save_total_limit=1, **LSAM
)
trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(512), callbacks=[Uneven()])
trainer.train(resume_from_checkpoint=sys.argv[2] == "8")
report(steps=trainer.state.global_step)
"""


def test_a_fast_worker_keeps_the_state_that_belongs_to_worker_0s_checkpoint(tmp_path):
    run, reports = launch(tmp_path, LIMITED, "100000", check=False)
    assert reports == []
    own = tmp_path / "run" / "workers" / "1"
    assert is_sealed(own / "checkpoint-4")
    assert not (own / "checkpoint-8").exists()  # neither worker 0's nor among the newest `save_total_limit`
    run, reports = launch(tmp_path, LIMITED, "8")
    assert [report["steps"] for report in reports] == [8, 8]
    assert [(tmp_path / f"begin{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert "has no state of its own" not in run.stderr


# --- what goes wrong ---


def left_behind(path: Path) -> list[str]:
    """Processes whose command line names `path`, and exchange files below it, once they have had time to go."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        left = [str(file) for file in (path / "shared").iterdir()]
        for process in psutil.process_iter(["cmdline"]):
            command = " ".join(process.info["cmdline"] or [])
            if str(path) in command:
                left.append(command)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


FAILING = """
class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **keywords):
        if sys.argv[2] == f"raise {RANK}" and state.global_step == 3:
            raise RuntimeError(f"worker {RANK} has had enough")


(OUT / "shared").mkdir(exist_ok=True)
# Nothing but the error is to end these runs.
args = arguments(LSAMConfig, OUT / "run", max_steps=100_000, shared_memory_dir=str(OUT / "shared"), **LSAM)
model = net()
if RANK == 1 and sys.argv[2] == "mismatch":
    model.last = torch.nn.Linear(16, 4)
try:
    LSAMTrainer(model=model, args=args, train_dataset=blobs(), callbacks=[Fail()]).train()
except BaseException as error:
    report(error=f"{type(error).__name__}: {error}")
    raise
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_worker_ends_all_with_an_error_and_leaves_nothing_behind(tmp_path, failing):
    run, reports = launch(tmp_path, FAILING, f"raise {failing}", check=False, fork=False)
    assert run.returncode != 0
    assert reports[failing]["error"] == f"RuntimeError: worker {failing} has had enough"
    # The launcher ends the others when one has ended, which may come first.
    expected = (f"ServerGone: Worker {failing} on this machine ended with an error", "SystemExit: 143")
    assert reports[1 - failing]["error"].startswith(expected)
    assert newest_sealed(tmp_path / "run" / ("" if failing else "workers/1")) is not None
    assert (
        f"worker {failing} ended with an error, which ends the launch" in (tmp_path / "run" / "server.log").read_text()
    )
    assert left_behind(tmp_path) == []


def test_workers_with_different_parameters_are_refused(tmp_path):
    run, _ = launch(tmp_path, FAILING, "mismatch", check=False, fork=False)
    assert run.returncode != 0
    assert "Worker 1's trainable parameters are not worker 0's" in run.stderr
    assert "`last.weight` [4, 16] torch.float32 here, `last.weight` [3, 16] torch.float32 there" in run.stderr
    assert "Build the same model" in run.stderr
    assert left_behind(tmp_path) == []


def test_an_option_of_the_script_is_not_the_launchers(tmp_path):
    source = "from hf_lsam.identity import Identity\nprint('started', Identity.from_environment().num_workers)"
    script = write_script(tmp_path / "script.py", source)
    command = [sys.executable, "-m", "accelerate.commands.launch", str(script), "--num_processes", "8"]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == "started 1\n", run.stderr


def test_a_launch_that_starts_one_process_instead_of_two_is_an_error_that_names_multi_gpu(tmp_path):
    run, _ = launch(tmp_path, FAILING, "nothing", multi_gpu=False, check=False, fork=False)
    assert run.returncode != 0
    assert "asked for 2 processes and started 1" in run.stderr
    assert "Add --multi_gpu" in run.stderr
    assert left_behind(tmp_path) == []


HALF = """
again = sys.argv[2] == "again"
model = net(seed=9 if again else 0).bfloat16()
args = arguments(LSAMConfig, OUT / "run", max_steps=8, save_strategy="steps", save_steps=8, **LSAM)
if again:
    args.max_steps = 12
trainer = LSAMTrainer(model=model, args=args, train_dataset=blobs(128))
trainer.train(resume_from_checkpoint=str(OUT / "run" / "checkpoint-8") if again else None)
trainer.save_model(OUT / "saved")
anchor = vector(model)
with trainer.local():
    own = vector(model)
report(anchor=digest(anchor), dtype=str(anchor.dtype), own=digest(own), steps=trainer.worker.local_steps)
"""


def test_two_workers_train_and_resume_a_model_in_half_precision(tmp_path):
    for again, steps in (("begin", 8), ("again", 12)):
        run, (first, second) = launch(tmp_path, HALF, again)
        assert first["anchor"] == second["anchor"]
        assert first["own"] != second["own"]
        assert first["dtype"] == second["dtype"] == "torch.float32"
        assert first["steps"] == second["steps"] == steps
        assert (run.stdout + run.stderr).count("were cast to float32") == 1  # worker 0 tells
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
