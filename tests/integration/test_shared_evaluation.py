"""What two workers evaluate together once training has ended: real processes, started by `accelerate launch` on CPU.

A single process is Trainer's own loop, called around LSAM's in the same worker.
"""

from __future__ import annotations

import json
import os

import pytest
from launch import PATHS, accelerate_launch, free_port, write_script

from hf_lsam.identity import Identity, LaunchStore

SCRIPT = """
import hashlib, json, os, sys, time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import tokenizers
import torch
from launch import free_port
from models import Net, Rows, Stream, arguments, blobs, tiny_gpt2
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, Trainer
from transformers import PreTrainedTokenizerFast, TrainerCallback, default_data_collator
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin
from hf_lsam.identity import LaunchStore

OUT, RANK = Path(sys.argv[1]), int(os.environ["RANK"])
OTHER = 1 - RANK
# One step more than two periods: after the last merge each worker makes one of its own.
LSAM = dict(sam_rho=0.05, sync_steps=2, per_device_train_batch_size=4, max_steps=5, per_device_eval_batch_size=4)


def tell(name):
    (OUT / f"{name}-{RANK}").touch()


def hear(name):
    until = time.monotonic() + 240
    while not (OUT / f"{name}-{OTHER}").exists():
        assert time.monotonic() < until, name
        time.sleep(0.01)


def content(values):
    if isinstance(values, dict):
        return {key: content(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [type(values).__name__, *map(content, values)]
    if isinstance(values, np.ndarray):
        return [str(values.dtype), list(values.shape), hashlib.sha256(values.tobytes()).hexdigest()]
    return values


def without_times(metrics):
    ends = ("_runtime", "_per_second", "_preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(ends)}


class Nested(Net):
    main_input_name = "x"

    def forward(self, x, labels=None):
        outputs = super().forward(x, labels)
        width = 3 + int(x.sum().abs()) % 5  # padded where batches differ
        return {**outputs, "more": (x[:, :width], {"twice": 2 * outputs["logits"]})}


class Counting:
    '''Counts its forward passes. With `in_step`, none of the workers is far ahead.'''

    name, in_step, passes = "", False, 0

    def prediction_step(self, *positional, **keywords):
        self.passes += 1
        tell(f"{self.name}-{self.passes}")
        if self.in_step:
            hear(f"{self.name}-{max(1, min(self.passes - 1, 3))}")
        return super().prediction_step(*positional, **keywords)


class Watched(Counting, LSAMTrainer):
    pass


def score(prediction):
    predictions = prediction.predictions
    parts = [prediction.label_ids, prediction.inputs, prediction.losses, predictions]
    seen.append(content([part for part in parts if part is not None]))
    return {"sum": predictions[0].sum().item() if isinstance(predictions, tuple) else 0.0}


def compare(name, trainer, loader, description="Evaluation", **keywords):
    '''The same evaluation by both workers, by Trainer's own loop, and the passes that the first took.'''
    results = []
    for loop in (type(trainer).evaluation_loop, Trainer.evaluation_loop):
        seen.clear()
        trainer.name, trainer.passes, trainer.in_step = name, 0, loop is not Trainer.evaluation_loop
        output = loop(trainer, loader(), description, **keywords)
        results.append((content(list(output[:2])), without_times(output.metrics), output.num_samples, list(seen)))
        results.append(trainer.passes)
    shared, passes, single, batches = results
    trainer.in_step = False
    report[name] = dict(shared=shared, single=single, passes=passes, batches=batches)


seen, report = [], {}
train, test = blobs(32), blobs(30, seed=5)
torch.manual_seed(0)
trainer = Watched(
    model=Nested(),
    args=arguments(LSAMConfig, OUT / "net", **LSAM),
    train_dataset=train,
    eval_dataset={"one": test, "two": blobs(29, seed=6)},
)
trainer.train()
args = trainer.args

compare("loss", trainer, lambda: trainer.get_eval_dataloader(test), prediction_loss_only=True)
compare("stream", trainer, lambda: trainer.get_eval_dataloader(Stream(test)), prediction_loss_only=True)
unlabelled = Rows([{"x": row["x"]} for row in test.rows])
compare("prediction", trainer, lambda: trainer.get_test_dataloader(unlabelled), "Prediction")
trainer.compute_metrics = score
args.include_for_metrics = ["inputs", "loss"]
compare("metrics", trainer, lambda: trainer.get_eval_dataloader(test))
compare("metrics_of_stream", trainer, lambda: trainer.get_eval_dataloader(Stream(test)))
args.include_for_metrics, args.dataloader_num_workers, args.eval_accumulation_steps = [], 1, 2
compare("accumulated", trainer, lambda: trainer.get_eval_dataloader(test))
args.dataloader_num_workers, args.eval_do_concat_batches, args.eval_accumulation_steps = 0, False, None
trainer.preprocess_logits_for_metrics = lambda logits, labels: logits[0].argmax(-1) + labels
compare("preprocessed", trainer, lambda: trainer.get_eval_dataloader(test))
args.eval_do_concat_batches = True
trainer.compute_metrics = trainer.preprocess_logits_for_metrics = None


# --- what workers do not do alike ---

def loss_of(data, name=""):
    trainer.name, trainer.passes = name, 0
    return trainer.evaluate(data)["eval_loss"], trainer.passes


def single_loss(data):
    return Trainer.evaluation_loop(trainer, trainer.get_eval_dataloader(data), "Evaluation", True).metrics["eval_loss"]


expected = single_loss(test)
report["several"] = [without_times(trainer.evaluate()), single_loss(trainer.eval_dataset["two"])]

if RANK == 0:  # alone, and another one of the same length
    report["alone"] = [*loss_of(blobs(30, seed=9)), single_loss(blobs(30, seed=9))]
report["after_alone"] = [*loss_of(test), expected]
tell("after_alone")
hear("after_alone")  # what one that comes later still would get may be gone

if RANK == 1:  # comes when the other has it already
    hear("evaluated")
report["late"] = [*loss_of(test), expected]
tell("evaluated")


def second_fails(*positional, **keywords):
    if trainer.passes == 1:
        tell("fails")
        raise ArithmeticError
    return Watched.prediction_step(trainer, *positional, **keywords)


def after(name):
    def step(*positional, **keywords):
        hear(name)
        return Watched.prediction_step(trainer, *positional, **keywords)

    return step


trainer.prediction_step = own_step = second_fails if RANK == 1 else after("fails")
try:
    report["other_fails"] = [*loss_of(test, "other_fails"), expected]
except ArithmeticError:
    report["other_fails"] = "failed"
report["own_step_is_back"] = trainer.prediction_step is own_step


def silent(*positional, **keywords):
    tell("took_one")
    hear("went_on")
    return Watched.prediction_step(trainer, *positional, **keywords)


trainer.prediction_step = silent if RANK == 1 else after("took_one")
args.worker_timeout = 0.1
report["other_is_silent"] = [*loss_of(test), expected]
tell("went_on")
args.worker_timeout = 600.0


class Outputs(dict):
    pass


def odd(*positional, **keywords):
    loss, logits, labels = Watched.prediction_step(trainer, *positional, **keywords)
    return loss, Outputs(logits=logits[0]), labels


trainer.prediction_step = odd
trainer.passes = 0
prediction = trainer.predict(test).predictions
report["not_to_be_written"] = [type(prediction).__name__, content(prediction["logits"]), trainer.passes]
del trainer.prediction_step
report["not_to_be_written"].append(content(trainer.predict(test).predictions[0]))


class Breaks(TrainerCallback):
    def on_prediction_step(self, *positional, **keywords):
        raise ArithmeticError


trainer.add_callback(Breaks)
try:
    trainer.evaluate(test)
except ArithmeticError:
    report["own_step_is_back_after_an_error"] = "prediction_step" not in vars(trainer)
trainer.remove_callback(Breaks)

with trainer.local():  # each its own
    report["own"] = [*loss_of(test), single_loss(test)]


# --- other trainers ---

class Seq2Seq(Counting, LSAMTrainerMixin, Seq2SeqTrainer):
    pass


@dataclass
class Seq2SeqConfig(LSAMArguments, Seq2SeqTrainingArguments):
    pass


torch.manual_seed(0)
sizes = dict(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1))
ids = torch.randint(2, 20, (30, 5))
rows = Rows([{"input_ids": row, "labels": row[:3]} for row in ids])
fields = dict(predict_with_generate=True, generation_max_length=6, learning_rate=2.0)
generating = Seq2Seq(
    model=t5,
    args=arguments(Seq2SeqConfig, OUT / "t5", **{**LSAM, **fields}),
    train_dataset=rows,
    data_collator=default_data_collator,
)
generating.train()
generating._gen_kwargs = dict(max_length=6)
compare("generation", generating, lambda: generating.get_test_dataloader(rows), "Prediction")


class SFT(Counting, LSAMTrainerMixin, SFTTrainer):
    pass


@dataclass
class SFTArguments(LSAMArguments, SFTConfig):
    pass


words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
torch.manual_seed(0)
texts = datasets.Dataset.from_dict({"input_ids": torch.randint(1, 40, (30, 8)).tolist()})
tuned = SFT(
    model=tiny_gpt2(),
    args=arguments(SFTArguments, OUT / "sft", **LSAM, max_length=16, bf16=False, gradient_checkpointing=False),
    train_dataset=texts,
    eval_dataset=texts,
    processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a", eos_token="b"),
)
tuned.train()
tuned.name, tuned.in_step = "sft", True
shared, passes = without_times(tuned.evaluate()), tuned.passes
tuned.in_step = False
SFT.evaluation_loop = Trainer.evaluation_loop
single = without_times(tuned.evaluate())
report["sft"] = dict(shared=shared, single=single, passes=passes, batches=tuned.passes - passes)


# --- the store goes ---

def store_goes(*positional, **keywords):
    if RANK == 0 and trainer.passes == 2:
        del vars(trainer.session.run.store)["_store"]
        tell("store_gone")
        raise ArithmeticError
    if RANK == 1:
        hear("store_gone")
    return Watched.prediction_step(trainer, *positional, **keywords)


# A store that lies in worker 0 and not in the launcher can go.
if RANK == 0:
    (OUT / "port").write_text(str(free_port()))
    tell("port")
else:
    hear("port")
os.environ.update(TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=(OUT / "port").read_text())
trainer.session.run.store = LaunchStore(args.identity)
trainer.session.run.store.count("there")
if RANK == 1:
    tell("connected")
else:
    hear("connected")  # or it could be gone before worker 1 is
trainer.prediction_step = store_goes
try:
    report["store_gone"] = [*loss_of(test), expected]
except ArithmeticError:
    report["store_gone"] = "failed"
(OUT / f"rank{RANK}.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of two workers saw in one launch."""
    folder = tmp_path_factory.mktemp("evaluation")
    script = write_script(folder / "script.py", SCRIPT)
    accelerate_launch(script, str(folder), fork=True, PYTHONPATH=PATHS)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


COMPARED = ["loss", "stream", "prediction", "metrics", "metrics_of_stream", "accumulated", "preprocessed", "generation"]


@pytest.mark.parametrize("name", [*COMPARED, "sft"])
def test_metrics_and_predictions_are_those_of_a_single_process(reports, name):
    first, second = (report[name] for report in reports)
    assert first["shared"] == first["single"] == second["shared"] == second["single"]


@pytest.mark.parametrize("name", [*COMPARED, "sft"])
def test_each_batch_is_evaluated_once_and_by_each_worker_about_half(reports, name):
    passes = [report[name]["passes"] for report in reports]
    assert sum(passes) == reports[0][name]["batches"] == 8
    assert min(passes) >= 3


def test_several_data_sets_are_shared_one_after_the_other(reports):
    for report in reports:
        metrics, second = report["several"]
        assert metrics["eval_one_loss"] == report["late"][2]
        assert metrics["eval_two_loss"] == second


def test_a_worker_that_evaluates_alone_has_it_right_and_is_not_taken_for_another(reports):
    loss, passes, expected = reports[0]["alone"]
    assert (loss, passes) == (expected, 8)
    assert loss != reports[0]["after_alone"][0]
    for report in reports:
        assert report["after_alone"][0] == report["after_alone"][2]
    assert sum(report["after_alone"][1] for report in reports) == 8


def test_a_worker_that_comes_late_gets_what_is_there(reports):
    for report, evaluated in zip(reports, (8, 0), strict=True):
        loss, passes, expected = report["late"]
        assert (loss, passes) == (expected, evaluated)


def test_what_a_worker_fails_with_is_evaluated_by_the_other(reports):
    loss, passes, expected = reports[0]["other_fails"]
    assert (loss, passes) == (expected, 7)
    assert reports[1]["other_fails"] == "failed"
    assert all(report["own_step_is_back"] and report["own_step_is_back_after_an_error"] for report in reports)


def test_a_worker_that_is_silent_is_waited_for_no_longer_than_worker_timeout(reports):
    for report in reports:
        assert report["other_is_silent"][0] == report["other_is_silent"][2]
    assert [report["other_is_silent"][1] for report in reports] == [8, 1]


def test_results_that_would_need_pickling_are_made_by_every_worker(reports):
    for report in reports:
        kind, predictions, passes, expected = report["not_to_be_written"]
        assert (kind, passes) == ("Outputs", 8)
        assert predictions == expected


def test_a_worker_is_evaluated_by_itself(reports):
    for report in reports:
        loss, passes, expected = report["own"]
        assert (loss, passes) == (expected, 8)
    assert reports[0]["own"][0] != reports[1]["own"][0]


def test_where_the_store_is_gone_a_worker_evaluates_by_itself(reports):
    assert reports[0]["store_gone"] == "failed"
    loss, _, expected = reports[1]["store_gone"]
    assert loss == expected


def test_the_store_takes_what_is_larger_than_a_message_and_frees_it(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    store = LaunchStore(Identity())
    data = os.urandom(9 * 2**20 + 1)
    assert store.take("results", 0.0) is None
    store.put("results", data)
    assert store.take("results", 0.0) == data
    store.take_back("results")
    assert store.take("results", 0.0) == store._store.get("results/0") == b""
    assert [store.count("taken"), store.count("taken"), store.count("taken", 0)] == [1, 2, 2]
