"""`hf-lsam` on the command line, on launches and runs that are real."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import peft
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from launch import PATHS, ROOT, accelerate_launch, free_port, wait_until, write_script
from models import arguments, blobs, net, sentences, tiny_bert
from transformers import AutoModelForSequenceClassification, WhisperConfig, WhisperForConditionalGeneration

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.card import facts_of_run, is_hub_name, megabytes, model_card
from hf_lsam.cli import COMMANDS, main
from hf_lsam.loading import saved_model
from hf_lsam.record import read_record, worker_state

# A run of two workers: sys.argv are its folder, its number of steps, seconds a step, and the trackers.
RUN = """
import sys, time
from models import arguments, blobs, net
from transformers import TrainerCallback
from hf_lsam import LSAMConfig, LSAMTrainer

OUT, STEPS, SECONDS, TRACKERS = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]


class Slow(TrainerCallback):
    def on_step_end(self, *positional, **keywords):
        time.sleep(SECONDS)


fields = dict(max_steps=STEPS, sync_steps=2, eval_strategy="steps", eval_steps=4, report_to=TRACKERS, logging_steps=2)
trainer = LSAMTrainer(
    model=net(), args=arguments(LSAMConfig, OUT, **fields), train_dataset=blobs(), eval_dataset=blobs(16, 1),
    callbacks=[Slow()],
)
trainer.train()
"""


def hf_lsam(*words: object) -> Result:
    """Runs a command in this process."""
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run of two workers that has finished, reported to all trackers that are here."""
    folder = tmp_path_factory.mktemp("finished")
    script = write_script(folder / "script.py", RUN)
    offline = {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    offline |= {"TRACKIO_DIR": str(folder / "trackio")}
    offline |= {"MLFLOW_TRACKING_URI": f"file://{folder}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true"}
    paths = os.pathsep.join([PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
    trackers = ["tensorboard", "wandb", *filter(importlib.util.find_spec, ("trackio", "mlflow"))]
    accelerate_launch(script, str(folder / "run"), "8", "0", *trackers, PYTHONPATH=paths, **offline)
    return folder / "run"


@pytest.fixture
def started(tmp_path):
    """Starts a run of two slow workers; yields its folder once each worker has logged, and ends what is left of it."""
    script = write_script(tmp_path / "script.py", RUN)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, str(script), str(tmp_path / "run"), "10000", "0.05", "none"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    processes, shared = [], []
    try:
        wait_until(lambda: logged(tmp_path / "run") == {0, 1}, lambda: (tmp_path / "log").read_text())
        processes = psutil.Process(launcher.pid).children(recursive=True)
        words = [word for process in processes for word in process.cmdline()]
        shared = [word for word in words if word.startswith("/dev/shm/hf_lsam-")]  # which killed workers leave
        yield tmp_path / "run"
    finally:
        launcher.kill()
        launcher.wait()
        for process in processes:
            if process.is_running():
                process.kill()
        psutil.wait_procs(processes)
        for folder in shared:
            shutil.rmtree(folder, ignore_errors=True)


def logged(run_dir: Path) -> set[int]:
    try:
        workers = read_record(run_dir).workers
    except FileNotFoundError:
        return set()
    return {rank for rank, entries in workers.items() if sum("loss" in entry for entry in entries) > 2}


# --- the group ---


def test_help_loads_nothing_that_a_command_needs():
    script = (
        "import sys\n"
        "from hf_lsam.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'accelerate', 'rich'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert all(name in run.stdout for name in COMMANDS)


def test_the_entry_point_is_the_group():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"hf-lsam": "hf_lsam.cli:main"}


# --- doctor ---


def test_doctor_counts_the_workers_that_really_start():
    result = hf_lsam("doctor", "--trainable", 1000, "--multi_gpu", "--num_processes", 2, "--main_process_port", 0)
    assert result.exit_code == 0, result.output
    assert "2 workers would train (2 on cpu), with a server process" in result.output
    assert "they fit" in result.output


def test_doctor_sees_the_trap_of_the_cpu_launch_whatever_the_script(monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/dev/shm" and access(path, mode))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    result = hf_lsam("doctor", "--num_processes", 3, "--num_machines", 1, "train.py", "--max_steps", 3)
    assert result.exit_code == 1
    assert "3 processes were asked for, and 1 is started" in result.output
    assert "--multi_gpu --num_processes 3" in result.output
    assert "/dev/shm" not in result.output  # the one that starts would exchange nothing there


def test_doctor_reads_the_configuration_file_and_believes_the_launch(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 2\nuse_cpu: true\n")
    result = hf_lsam("doctor", "--config_file", config)
    assert result.exit_code == 1
    assert "2 processes were asked for, and 1 is started" in result.output
    assert str(config) in result.output


def test_doctor_says_what_a_script_would_be_refused_for():
    result = hf_lsam("doctor", "--use_fsdp", "--num_processes", 2, "--main_process_port", 0)
    assert result.exit_code == 1
    assert "LSAM cannot be combined with FSDP" in result.output


def test_doctor_wants_the_other_machine_to_be_there_and_counts_the_server_of_this_one():
    options = ["--multi_gpu", "--num_machines", 2, "--machine_rank", 0, "--num_processes", 2]
    address = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    result = hf_lsam("doctor", "--wait", 15, *options, *address)
    assert result.exit_code == 1
    assert "on all 2 machines at the same time" in result.output
    assert "LSAM keeps 12 bytes" in result.output
    assert "the exchange of 1 worker takes 9 vectors there" in result.output


def test_doctor_sees_a_taken_port_and_too_little_memory():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = hf_lsam(
            "doctor", "--trainable", "1e13", "--multi_gpu", "--num_processes", 2, "--main_process_port", port
        )
    assert result.exit_code == 1
    assert f"port {port} is taken" in result.output
    assert "they do not fit" in result.output
    assert "shared_memory_dir" in result.output


@pytest.mark.parametrize("options", [("--num_processes", 1), ("--ray",)])
def test_doctor_says_which_requirements_are_missing_or_too_old_before_it_needs_them(tmp_path, monkeypatch, options):
    (tmp_path / "hf_lsam-0.1.dist-info").mkdir()
    wanted = "Requires-Dist: nowhere-to-be-found>=2,<3\nRequires-Dist: accelerate>=99\nRequires-Dist: click>=8\n"
    (tmp_path / "hf_lsam-0.1.dist-info" / "METADATA").write_text(f"Name: hf-lsam\nVersion: 0.1\n{wanted}")
    monkeypatch.syspath_prepend(tmp_path)
    result = hf_lsam("doctor", *options)
    assert result.exit_code == 1
    assert "nowhere-to-be-found is not installed, and hf_lsam needs <3,>=2." in result.output
    assert "-> pip install 'nowhere-to-be-found<3,>=2'" in result.output
    assert "-> pip install 'accelerate>=99'" in result.output
    assert "train" not in result.output


def test_doctor_passes_on_what_accelerate_refuses():
    result = hf_lsam("doctor", "--no_such_option")
    assert result.exit_code == 1
    assert "does not take these options" in result.output
    assert "--no_such_option" in result.output


# --- monitor ---


def test_monitor_shows_a_run_that_goes_on_and_says_when_it_was_killed(started, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in started.rglob("*") if path.suffix == ".json"}
    pids = [entries[0]["pid"] for entries in read_record(started).workers.values()]
    asked, process = [], psutil.Process
    with monkeypatch.context() as watched:
        watched.setattr(psutil, "Process", lambda pid: asked.append(pid) or process(pid))
        result = hf_lsam("monitor", started, "--once")
    assert sorted(asked) == sorted(pids)  # once each: all that is shown agrees
    assert result.exit_code == 0
    assert "2 workers" in result.output
    assert "training for" in result.output
    assert "to go of 10,000 steps" in result.output
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())

    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: "training" not in [worker_state(e) for e in read_record(started).workers.values()])
    result = hf_lsam("monitor", started)  # not a terminal: one snapshot
    assert result.exit_code == 0
    assert "dead" in result.output
    assert "training" not in result.output


def test_monitor_shows_a_finished_run(finished):
    result = hf_lsam("monitor", finished, "--once")
    assert "finished after" in result.output
    assert "latest evaluation of the anchor, at step 8: eval_loss" in result.output
    rows = [line.split() for line in result.output.splitlines() if line.strip()[:1] in ("0", "1")]
    assert [(row[0], row[1], row[2]) for row in rows] == [("0", "finished", "8"), ("1", "finished", "8")]


def test_monitor_does_not_judge_processes_of_another_machine(finished, tmp_path):
    shutil.copytree(finished / "lsam", tmp_path / "lsam")
    for path in (tmp_path / "lsam").glob("*.jsonl"):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        entries = [{**entry, "host": "elsewhere"} if "begin" in entry else entry for entry in entries]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries if "end" not in entry))
    output = hf_lsam("monitor", tmp_path, "--once").output
    assert "on another machine" in output
    assert "dead" not in output


def test_monitor_lives_in_a_terminal_until_the_run_has_ended(finished):
    """Through a pseudo-terminal, as over ssh."""
    import pty

    script = f"from hf_lsam.cli import main; main(['monitor', {str(finished)!r}])"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:
        pass  # its end has been closed
    os.close(ours)
    assert process.wait() == 0
    assert b"finished" in seen
    assert b"\x1b[" in seen


def test_monitor_of_a_folder_without_a_run(tmp_path):
    result = hf_lsam("monitor", tmp_path)
    assert result.exit_code == 1
    assert "holds no record of a run" in result.output


# --- trackers ---


def test_one_tensorboard_run_holds_all_workers_and_the_anchor(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in finished.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    workers = read_record(finished).workers
    for rank, prefix in ((0, "train/"), (1, "train/worker_1/")):
        logged = [entry for entry in workers[rank] if "loss" in entry and "between_logs" not in entry]
        assert [entry["step"] for entry in logged] == [2, 4, 6, 8]
        for name in ("loss", "learning_rate", "lsam/drift", "lsam/staleness", "lsam/bytes_pushed"):
            scalars = events.Scalars(prefix + name)
            assert [scalar.step for scalar in scalars] == [2, 4, 6, 8]
            assert [scalar.value for scalar in scalars] == pytest.approx([entry[name] for entry in logged])
    evaluated = [entry["eval_loss"] for entry in workers[0] if "eval_loss" in entry]
    assert [scalar.value for scalar in events.Scalars("eval/loss")] == pytest.approx(evaluated)
    assert [scalar.step for scalar in events.Scalars("eval/loss")] == [4, 8]


def test_one_offline_wandb_run_holds_all_workers_and_the_anchor(finished):
    (recorded,) = [path.read_bytes() for path in finished.parent.rglob("*.wandb")]
    for name in (
        b"train/loss",
        b"train/lsam/drift",
        b"train/worker_1/loss",
        b"train/worker_1/lsam/drift",
        b"eval/loss",
    ):
        assert name in recorded


def expected_points(finished: Path) -> dict[str, list[tuple[int, float]]]:
    """By the name in a tracker that takes Trainer's as they are: (step, value) of what worker 1 and the anchor have."""
    workers = read_record(finished).workers
    names = ("loss", "lsam/drift", "lsam/bytes_pushed")
    logged = [entry for entry in workers[1] if "loss" in entry and "between_logs" not in entry]
    points = {f"worker_1/{name}": [(entry["step"], entry[name]) for entry in logged] for name in names}
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in workers[0] if "eval_loss" in entry]
    return {**points, "eval_loss": evaluated}


def test_one_trackio_run_holds_all_workers_and_the_anchor(finished):
    pytest.importorskip("trackio")
    (database,) = (finished.parent / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("select run_id, metrics from metrics order by id").fetchall()
    assert len({run for run, _ in rows}) == 1
    rows = [json.loads(metrics) for _, metrics in rows]
    for name, points in expected_points(finished).items():
        name = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        found = [(row["train/global_step"], row[name]) for row in rows if name in row]
        assert [pytest.approx(point, rel=1e-6) for point in points] == found


def test_one_mlflow_run_holds_all_workers_and_the_anchor(finished):
    pytest.importorskip("mlflow")
    (metrics,) = (finished.parent / "mlflow").glob("*/*/metrics")
    for name, points in expected_points(finished).items():
        lines = [line.split() for line in (metrics / name).read_text().splitlines()]  # time, value, step
        assert [pytest.approx(point, rel=1e-6) for point in points] == [(int(n), float(x)) for _, x, n, *_ in lines]


# --- card ---


def valid(card: ModelCard) -> ModelCardData:
    """What the Hub asks of a card's header, as far as it can be asked without the Hub."""
    data = card.data.to_dict()
    assert yaml.safe_load(yaml.safe_dump(data)) == data
    assert all(isinstance(tag, str) for tag in data["tags"])
    name, results = model_index_to_eval_results(data["model-index"])
    assert name
    assert all(result.metric_value is not None and result.dataset_type for result in results)
    assert data.get("library_name") in (None, "transformers", "peft")
    if "base_model" in data:
        assert is_hub_name(data["base_model"])
    return card.data


def test_card_of_a_run_of_two_workers(finished, tmp_path):
    result = hf_lsam("card", finished, "--license", "apache-2.0", "--language", "en", "--output", tmp_path / "card.md")
    assert result.exit_code == 0, result.output
    card = ModelCard.load(tmp_path / "card.md")
    data = valid(card)
    assert (data.license, data.language, data.tags[0]) == ("apache-2.0", ["en"], "lsam")
    evaluated = [entry for entry in read_record(finished).workers[0] if "eval_loss" in entry]
    assert data.eval_results[0].metric_value == evaluated[-1]["eval_loss"]
    assert "2 asynchronous workers" in card.text
    assert '"sync_steps": 2' in card.text
    assert "steps 8, 8" in card.text


def test_card_publishes_no_path_of_this_machine(finished, tmp_path):
    facts = facts_of_run(finished)
    here = {"train_file": str(tmp_path / "train.csv"), "output_dir": str(tmp_path)}
    card = model_card(replace(facts, base=str(tmp_path / "base"), configuration=here))
    assert str(tmp_path) not in str(card)
    assert "`base`, fine-tuned" in card.text
    assert '"train_file": "train.csv"' in card.text


def test_card_compares_runs_and_says_in_what_they_differ(finished, tmp_path):
    other = tmp_path / "other"
    args = arguments(LSAMConfig, other, max_steps=4, sync_steps=4)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(16, 1))
    trainer.train()
    trainer.evaluate()
    result = hf_lsam("card", finished, "--against", other, "--output", tmp_path / "card.md")
    assert result.exit_code == 0, result.output
    text = ModelCard.load(tmp_path / "card.md").text
    assert "| other | LSAM | 1 |" in text
    assert "`other` differs in logging_steps" not in text
    assert "max_steps (4), sync_steps (4)." in text


def test_card_does_not_replace_what_was_written_by_hand(finished, tmp_path):
    by_hand = tmp_path / "README.md"
    by_hand.write_text("# Mine")
    result = hf_lsam("card", finished, "--output", by_hand)
    assert result.exit_code == 1
    assert "was not written by hf-lsam" in result.output
    assert by_hand.read_text() == "# Mine"
    assert hf_lsam("card", finished, "--output", by_hand, "--overwrite").exit_code == 0
    assert hf_lsam("card", finished, "--output", by_hand).exit_code == 0  # its own it may replace


def test_a_card_reads_a_tokenizer_where_one_was_saved(tmp_path):
    config = {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "okenizer" not in saved_model(tmp_path)["loading"]
    (tmp_path / "tokenizer_config.json").write_text("{}")
    code = saved_model(tmp_path)["loading"]
    assert "from transformers import AutoTokenizer, GPT2LMHeadModel\n" in code
    assert "tokenizer = AutoTokenizer.from_pretrained(folder)" in code
    (tmp_path / "config.json").write_text('{"architectures": ["Mine"]}')
    code = saved_model(tmp_path)["loading"]
    assert "from transformers import AutoTokenizer\n# Mine is the class that was trained" in code
    assert "model = Mine.from_pretrained(folder)" in code


def test_bytes_of_a_run_that_was_resumed_are_those_of_all_its_parts(tmp_path):
    def run(max_steps: int, resume: bool = False) -> tuple[float, float]:
        fields = {"max_steps": max_steps, "sync_steps": 2, "save_strategy": "steps", "save_steps": 4}
        trainer = LSAMTrainer(model=net(), args=arguments(LSAMConfig, tmp_path, **fields), train_dataset=blobs())
        trainer.train(resume_from_checkpoint=resume)
        return tuple(trainer.worker_summary()[f"bytes_{way}"] for way in ("pushed", "pulled"))

    # What was made after the checkpoint is made again, and was sent all the same.
    parts = [run(6), run(10, resume=True)]
    sent, received = (sum(part) for part in zip(*parts, strict=True))
    exchanged = dict(facts_of_run(tmp_path).results)["Bytes exchanged"]
    assert exchanged == megabytes(sent + received)
    entry = read_record(tmp_path).made_once().workers[0][-2]
    assert (entry["lsam/bytes_pushed"], entry["lsam/bytes_pulled"]) == (sent, received)
    shown = hf_lsam("monitor", "--once", tmp_path).output
    assert f"{exchanged} exchanged" in shown


def test_card_of_what_is_no_run(tmp_path):
    assert "holds no record of a run" in hf_lsam("card", tmp_path).output
    (tmp_path / "card.json").write_text("[]")
    result = hf_lsam("card", tmp_path)
    assert result.exit_code == 1
    assert "is not a results file that a card can be made from" in result.output


def test_the_trainer_writes_the_same_card_and_its_code_loads_the_model(tmp_path, monkeypatch):
    args = arguments(LSAMConfig, tmp_path / "tiny", max_steps=4, sync_steps=2)
    model = tiny_bert()
    model.add_model_tags("tiny")
    trainer = LSAMTrainer(model=model, args=args, train_dataset=sentences(), eval_dataset=sentences(8, seed=1))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(license="mit", tags="mine", dataset_tags="imdb", finetuned_from="bert/tiny")
    card = ModelCard.load(tmp_path / "tiny/README.md")
    data = valid(card)
    assert data.tags == ["lsam", "sharpness-aware-minimization", "mine", "tiny"]
    assert (data.base_model, data.datasets, data.license) == ("bert/tiny", ["imdb"], "mit")
    assert (data.pipeline_tag, data.library_name, data.model_name) == ("text-classification", "transformers", "tiny")
    code = card.text.partition("```python\n")[2].partition("```")[0]
    assert "BertForSequenceClassification" in code
    monkeypatch.chdir(tmp_path / "tiny")
    assert_loads(code, trainer.model)


def assert_loads(code: str, model: torch.nn.Module) -> None:
    """Runs a card's code in the current folder, and compares the model that it makes."""
    exec(code, loaded := {})
    assert type(loaded["model"]) is type(model)
    there, expected = loaded["model"].state_dict(), model.state_dict()
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[name], expected[name]) for name in there)


# peft asks for it when the adapter is loaded.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_code_of_a_card_loads_an_adapted_classifier_with_all_its_labels(tmp_path, monkeypatch):
    base = tiny_bert()
    base.config.id2label = {0: "bad", 1: "good", 2: "neither"}
    base.classifier = torch.nn.Linear(16, 3)
    base.num_labels = 3
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type=peft.TaskType.SEQ_CLS)
    args = arguments(LSAMConfig, tmp_path / "run", max_steps=2, sync_steps=2)
    trainer = LSAMTrainer(model=peft.get_peft_model(base, config), args=args, train_dataset=sentences())
    trainer.train()
    trainer.save_model()
    code = facts_of_run(tmp_path / "run").loading
    assert "labels = ['bad', 'good', 'neither']" in code
    monkeypatch.chdir(tmp_path / "run")
    assert_loads(code, trainer.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapted", [False, True])
def test_the_code_of_a_card_loads_a_model_of_speech(tmp_path, monkeypatch, adapted):
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1)
    sizes |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"), 16)
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "base"
    if adapted:
        model = WhisperForConditionalGeneration.from_pretrained(folder)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=peft.TaskType.SEQ_2_SEQ_LM)
        model, folder = peft.get_peft_model(model, config), tmp_path / "adapter"
        model.save_pretrained(folder)
    monkeypatch.chdir(folder)
    assert_loads(saved_model(folder, base="WhisperForConditionalGeneration")["loading"], model)


def test_push_to_hub_pushes_that_card(tmp_path, monkeypatch):
    args = arguments(LSAMConfig, tmp_path / "pushed", max_steps=2, sync_steps=2)
    trainer = LSAMTrainer(model=net(), args=args, train_dataset=blobs(), eval_dataset=blobs(16, 1))
    trainer.train()
    trainer.evaluate()
    trainer.hub_model_id = "someone/pushed"
    uploaded = []

    class Hub:
        def upload_folder(self, **keywords):
            folder = Path(keywords["folder_path"])
            uploaded.append([(folder / name).read_text() for name in ("README.md", ".gitignore")])

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    (tmp_path / "pushed/.gitignore").write_text("notes.txt\n")
    trainer.push_to_hub()
    trainer.push_to_hub()
    text, private = uploaded[0]
    valid(ModelCard(text))
    assert "written by hf-lsam" in text
    assert private.splitlines() == ["notes.txt", "workers/", "lsam/", "server.log"]
    assert uploaded[1][1] == private


def test_a_trainer_without_a_record_writes_no_card(tmp_path, caplog):
    args = arguments(LSAMConfig, tmp_path, max_steps=2, sync_steps=2)
    LSAMTrainer(model=net(), args=args, eval_dataset=blobs(16, 1)).create_model_card()
    assert "No model card is written" in caplog.text
    assert not (tmp_path / "README.md").exists()


def test_the_published_cards_are_valid_and_up_to_date(tmp_path):
    from scripts.tools import write_cards

    write_cards.main(tmp_path)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    published = {path.name: path.read_text() for path in (ROOT / "model_cards").glob("*-*.md")}
    assert written == published
    assert all(valid(ModelCard(text)).eval_results for text in written.values())
