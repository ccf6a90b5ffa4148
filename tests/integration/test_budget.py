"""Uneven workers, in real processes: some share the steps of a run (budget.py), some have batches of their own size.

What sharing steps spares, under a virtual clock, is in test_simulation.py. Here a slow worker waits, at each of its
steps, until the run has come on by so many steps: the fast one waits for nobody.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import PATHS, accelerate_launch, wait_until, write_script
from models import arguments, blobs, net

from hf_lsam import LSAM, LSAMConfig, LSAMTrainer
from hf_lsam.data import BatchesInTurn, share_unevenly
from hf_lsam.record import read_record
from hf_lsam.server.lifetime import start_server

PREAMBLE = """
import json, os, sys, time
from pathlib import Path

from models import Stream, arguments, blobs, net
from transformers import ProgressCallback, TrainerCallback

from hf_lsam import LSAMConfig, LSAMTrainer

OUT, RANK = Path(sys.argv[1]), int(os.environ.get("RANK", 0))


class Pace(TrainerCallback):
    def __init__(self, of_run=0, total=0):
        self.of_run, self.total, self.rates = of_run, total, []

    def on_step_begin(self, args, state, control, optimizer=None, **keywords):
        self.rates.append(optimizer.param_groups[0]["lr"])
        while trainer.worker.link.steps_begun < min(self.total, self.of_run * (state.global_step + 1)):
            time.sleep(0.005)

    def on_train_end(self, *positional, **keywords):
        shown = [each for each in trainer.callback_handler.callbacks if isinstance(each, ProgressCallback)]
        self.bars = [(each.training_bar.n, each.training_bar.total) for each in shown if each.training_bar is not None]


def report(**values):
    (OUT / f"rank{RANK}.json").write_text(json.dumps(values))
"""
LAUNCH = """
fields = dict(share_steps=True, lr_scheduler_type="linear", per_device_train_batch_size=4, save_strategy="steps")
fields |= dict(num_train_epochs=3, save_steps=12, disable_tqdm=False) | json.loads(sys.argv[2])
pace = Pace(4 * RANK, 48)
args = arguments(LSAMConfig, OUT / "run", **fields)
trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(64), callbacks=[pace])
trainer.train(resume_from_checkpoint="resume" in sys.argv)
state = trainer.state
report(
    steps=state.global_step, max_steps=state.max_steps, epochs=state.epoch, rates=pace.rates,
    begun=trainer.session.budget.steps_begun, checkpoint=(OUT / "run" / f"checkpoint-{state.global_step}").is_dir(),
    bars=pace.bars,
    progress=[entry["lsam/steps_of_all"] for entry in state.log_history if "lsam/steps_of_all" in entry],
)
"""


def launch(folder: Path, *words: str) -> list[dict]:
    path = write_script(folder / "script.py", PREAMBLE + LAUNCH)
    accelerate_launch(path, str(folder), *words, fork=True, PYTHONPATH=PATHS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_two_trainers_of_uneven_pace_make_the_steps_of_the_run_together_and_a_longer_run_goes_on(tmp_path):
    # 64 rows in batches of 4: each worker's share of an epoch is 8 steps, and 3 epochs are 24 steps for each of two.
    fast, slow = launch(tmp_path, "{}")
    assert 48 <= fast["steps"] + slow["steps"] == fast["begun"] <= 49  # both may begin a last one at one moment
    assert slow["steps"] <= 48 // 4 + 1
    assert fast["epochs"] == pytest.approx(fast["steps"] / 8)  # on through its share of the data
    assert fast["epochs"] >= 4
    for each in (fast, slow):
        assert each["max_steps"] == each["steps"]  # where Trainer ends as after its last step
        assert each["rates"] == sorted(each["rates"], reverse=True)
        assert each["progress"] == sorted(each["progress"])
    assert max(fast["rates"] + slow["rates"]) == pytest.approx(0.05)  # of the one that came first
    assert fast["rates"][-1] <= 0.05 * 2 / 24  # the schedule's end, though it has made more steps than it has
    assert fast["checkpoint"]
    (shown, length), *others = fast["bars"]
    assert length == 48 <= shown <= 49  # the steps of the run
    assert [*others, *slow["bars"]] == []

    # Both go on from where the run stood when worker 0 saved, and make what the longer run has more.
    again, _ = launch(tmp_path, '{"num_train_epochs": 4}', "resume")
    assert 64 <= again["begun"] <= 65
    assert again["steps"] > fast["steps"]
    # Until the schedule next steps, the optimizer has the rate that it was saved with, as Trainer's always has.
    assert 0 < max(again["rates"]) <= 0.05 * (1 - 24 / 32)


EXTERNAL = """
fields = dict(share_steps=True, max_steps=60, lr_scheduler_type="linear", server_address=str(OUT / "served"))
of_run, total = json.loads(sys.argv[2])
pace = Pace(of_run, total)
args = arguments(LSAMConfig, OUT / sys.argv[3], seed=int(sys.argv[4]), **fields)
trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(64), callbacks=[pace])
trainer.train()
(OUT / f"{sys.argv[3]}.json").write_text(json.dumps({"steps": trainer.state.global_step, "rates": pace.rates}))
"""


def test_what_an_external_worker_that_is_killed_has_left_another_makes_that_joins(tmp_path):
    path = write_script(tmp_path / "script.py", PREAMBLE + EXTERNAL)
    (tmp_path / "served").mkdir()
    server = start_server(tmp_path / "served", tmp_path / "server.log")

    def start(pace: str, name: str, seed: int) -> subprocess.Popen:
        command = [sys.executable, str(path), str(tmp_path), pace, name, str(seed)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"})

    def points() -> list[dict]:
        record = tmp_path / "first" / "lsam" / "run.json"
        return read_record(tmp_path / "first").workers.get(0, []) if record.exists() else []

    first = start("[1000, 21]", "first", 0)  # waits at its first step for the 21st of the run, which it cannot make
    wait_until(lambda: any(entry.get("begin") for entry in points()))
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start("[0, 0]", "second", 1)
    assert second.wait(240) == 0
    done = json.loads((tmp_path / "second.json").read_text())
    assert done["steps"] == 60 - 1  # but for the one that the first had begun
    assert done["rates"] == pytest.approx([0.05 * (1 - step / 60) for step in range(1, 60)])
    server.terminate()
    server.wait()


def test_a_loop_shares_steps_and_its_schedule_follows(tmp_path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loader = torch.utils.data.DataLoader(blobs(24), batch_size=8)
    rates = []
    with LSAM(model, optimizer, share_steps=True, max_steps=10, output_dir=tmp_path) as lsam:
        schedule = lsam.schedule(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10))
        for batch in lsam.batches(lsam.shard(loader)):
            rates.append(optimizer.param_groups[0]["lr"])
            lsam.step(lambda batch=batch: model(**batch))
            schedule.step()
        assert lsam.log()["lsam/steps_of_all"] == 10
    assert rates == pytest.approx([0.05 * (1 - step / 10) for step in range(10)])
    assert optimizer.param_groups[0]["lr"] == 0.0
    with LSAM(model, optimizer, share_steps=True, max_steps=2) as lsam, pytest.raises(ValueError, match="is empty"):
        list(lsam.batches([]))
    for wrong in ({"share_steps": True}, {"max_steps": 5}, {"share_steps": True, "max_steps": 0}):
        with pytest.raises(ValueError, match="`max_steps` must be positive with share_steps=True"):
            LSAM(model, optimizer, **wrong)


def test_a_worker_alone_makes_bit_for_bit_what_it_makes_without_and_no_step_more_when_it_is_resumed(tmp_path):
    def trained(share: bool, resume: bool = False) -> LSAMTrainer:
        fields = {"num_train_epochs": 2, "lr_scheduler_type": "cosine", "sync_steps": 3, "save_strategy": "steps"}
        args = arguments(LSAMConfig, tmp_path / str(share), share_steps=share, **fields)
        trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(64))
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.global_step == trainer.worker.local_steps == 16
        return trainer

    anchor = trained(False).worker.anchor
    assert torch.equal(trained(True).worker.anchor, anchor)
    again = trained(True, resume=True)
    assert torch.equal(again.worker.anchor, anchor)
    assert again.session.budget.steps_begun == 16


BATCHES = """
class Watched(LSAMTrainer):
    drawn = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.drawn.append([round(value, 4) for value in inputs["x"][:, 0].tolist()])
        return super().training_step(model, inputs, num_items_in_batch)


fields = dict(num_train_epochs=2, train_sampling_strategy="random", per_device_train_batch_size=[4, 12][RANK])
trainer = Watched(model=net(), args=arguments(LSAMConfig, OUT / "run", **fields), train_dataset=blobs(64))
trainer.train()
report(drawn=trainer.drawn, weight=trainer.worker.settings.weight, anchor=trainer.worker.anchor.tolist())
"""


LOOP = """
import torch
from hf_lsam import LSAM


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.net = torch.nn.BatchNorm1d(8), net()

    def forward(self, x, labels):
        return self.net(self.norm(x), labels)


torch.manual_seed(0)
model = Normed()
optimizer = torch.optim.SGD(model.parameters(), 0.05)
lsam = LSAM(model, optimizer, output_dir=OUT / "run", num_workers=2, sync_steps=2, batchnorm_batches=3)
drawn, refused = [], []
torch.manual_seed(RANK)
share = lsam.shard(torch.utils.data.DataLoader(blobs(64), batch_size=[4, 12][RANK], shuffle=True))
lsam.shard(torch.utils.data.DataLoader(blobs(16), batch_size=8))  # of one size: weighs nothing anew
with lsam:
    try:
        lsam.shard(torch.utils.data.DataLoader(blobs(16), batch_size=[4, 8][RANK]))
    except RuntimeError as error:
        refused.append(str(error))
    for _ in range(2):
        for batch in share:
            drawn.append([round(value, 4) for value in batch["x"][:, 0].tolist()])
            lsam.step(lambda: model(**batch))
with lsam.anchor(share, lambda batch: model(**batch)):
    mean = model.norm.running_mean.tolist()
for fields, kind in (({"algorithm": "easgd", "coupling_strength": 0.1, "sam_rho": 0}, list), ({}, Stream)):
    other = LSAM(net(), optimizer, num_workers=2, **fields)
    rows = blobs(64).rows if kind is list else Stream(blobs(64))
    try:
        other.shard(torch.utils.data.DataLoader(rows, batch_size=[4, 12][RANK]))
    except ValueError as error:
        refused.append(str(error))
report(
    drawn=drawn, weight=lsam.worker.settings.weight, anchor=lsam.worker.anchor.tolist(), mean=mean, refused=refused
)
"""


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_workers_with_batches_of_their_own_size_see_each_row_once_and_weigh_by_them(tmp_path, kind):
    path = write_script(tmp_path / "script.py", PREAMBLE + (BATCHES if kind == "trainer" else LOOP))
    accelerate_launch(path, str(tmp_path), fork=True, PYTHONPATH=PATHS)
    small, large = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert (small["weight"], large["weight"]) == (1, 3)
    assert [len(batch) for batch in small["drawn"]] == [4] * 8  # two epochs of as many steps in both
    assert [len(batch) for batch in large["drawn"]] == [12] * 8
    rows = sorted(round(row["x"][0].item(), 4) for row in blobs(64).rows)
    for epoch in (slice(0, 4), slice(4, 8)):
        assert sorted(x for each in (small, large) for batch in each["drawn"][epoch] for x in batch) == rows
    assert small["drawn"][:4] != small["drawn"][4:]
    assert small["anchor"] == large["anchor"]
    if kind == "loop":
        assert small["mean"] == large["mean"]  # of BatchNorm at the anchor, from the same batches
        for each in (small, large):
            too_late, of_easgd, of_a_stream = each["refused"]
            assert "[4, 8] rows a step. How much each counts is settled when it joins" in too_late
            assert "[4, 12] rows a step, but algorithm='easgd' gives every worker the same weight" in of_easgd
            assert "batches have [4, 12] rows. Workers share a stream" in of_a_stream


def test_a_trainer_with_batches_of_another_size_is_refused_where_nothing_weighs_them(tmp_path):
    args = arguments(LSAMConfig, tmp_path, algorithm="lsgd", sam_rho=0.0)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs())
    trainer.session.weigh([8, 8])
    with pytest.raises(
        ValueError, match=r"train on \[8, 16\] rows a step, but algorithm='lsgd'.*gradient accumulation"
    ):
        trainer.session.weigh([8, 16])


@pytest.mark.parametrize(
    ("rows", "drop_last", "batches"), [(32, False, 4), (20, False, 4), (20, True, 2), (3, False, 2)]
)
def test_batches_in_turn_are_whole_and_begin_anew_where_rows_run_out(rows, drop_last, batches):
    made = BatchesInTurn(torch.utils.data.SequentialSampler(range(rows)), [4, 12], drop_last)
    drawn = list(made)
    assert len(drawn) == len(made) == batches
    assert [len(batch) for batch in drawn] == [4, 12] * (batches // 2)
    flat = [row for batch in drawn for row in batch]
    assert flat[:rows] == list(range(rows))[: len(flat)]
    assert all(row == (place - rows) % min(rows, 16) for place, row in enumerate(flat) if place >= rows)


def test_a_stream_is_not_shared_in_batches_of_different_sizes():
    loader = torch.utils.data.DataLoader(blobs(8), batch_size=2)
    with pytest.raises(ValueError, match="Use the same batch size in every worker"):
        share_unevenly(loader, [2, 4])
