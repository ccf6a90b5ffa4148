"""What a user of Trainer or trl combines with it, with LSAM: each works as without, or is refused with the remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import datasets
import pytest
import torch
from launch import PATHS, free_port, write_script
from models import CLASSES, FEATURES, Rows, arguments, blobs, net, texts, tiny_gpt2, vector
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_lsam import LSAMArguments, LSAMConfig, LSAMTrainer, LSAMTrainerMixin

# With these a worker is the plain trainer, bit for bit.
PLAIN = {"sam_rho": 0.0, "coupling_strength": 0.0, "sync_steps": 2}
LSAM = {"sam_rho": 0.1, "sync_steps": 2}


class Steps(TrainerCallback):
    """The parameters after every step."""

    def __init__(self):
        self.x = []

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.x.append(vector(model))


def run(folder, kind=LSAMTrainer, config=LSAMConfig, model=None, rows: Rows | None = None, resume=None, **fields):
    """A finished run and its steps."""
    steps = Steps()
    args = arguments(config, folder, **{"max_steps": 6, **fields})
    trainer = kind(model=model or net(), args=args, train_dataset=rows or blobs(), callbacks=[steps])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, steps.x


def assert_same_steps(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# --- trl: packing ---


@dataclass
class LSAMSFTConfig(LSAMArguments, SFTConfig):
    pass


class LSAMSFTTrainer(LSAMTrainerMixin, SFTTrainer):
    pass


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("packing", [{"packing_strategy": "bfd"}, {"packing_strategy": "wrapped"}])
def test_packing(tmp_path, packing):
    from recipes.common.models import byte_tokenizer

    # Texts of 4 to 8 tokens, of which 16 hold two or more.
    ids = [row["input_ids"].tolist()[: 4 + i % 5] for i, row in enumerate(texts().rows)]

    def sft(kind, config, **fields):
        steps = Steps()
        trainer = kind(
            model=tiny_gpt2(),
            args=arguments(config, tmp_path, max_steps=4, max_length=16, packing=True, bf16=False, **packing, **fields),
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids}),
            processing_class=byte_tokenizer(),
            callbacks=[steps],
        )
        assert len(trainer.train_dataset) < 32  # they were packed
        trainer.train()
        return trainer, steps.x

    plain, theirs = sft(SFTTrainer, SFTConfig)
    alone, ours = sft(LSAMSFTTrainer, LSAMSFTConfig, **PLAIN)
    assert_same_steps(ours, theirs)
    lsam, ours = sft(LSAMSFTTrainer, LSAMSFTConfig, **LSAM)
    assert losses(lsam)[0] == pytest.approx(losses(plain)[0], rel=1e-6)
    assert losses(alone) == losses(plain)
    tokens = [[entry["num_tokens"] for entry in t.state.log_history if "num_tokens" in entry] for t in (plain, lsam)]
    assert tokens[0] == tokens[1]  # counted once, whatever pass 2 has counted
    assert (ours[-1] - theirs[-1]).abs().max() > 1e-4


# --- optimizers ---


class Wide(nn.Module):
    """Layers of 4,096 weights and more, of which bitsandbytes keeps moments in 8 bits."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 512), nn.Tanh(), nn.Linear(512, CLASSES))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def wide() -> Wide:
    torch.manual_seed(0)
    return Wide()


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit"])
def test_fused_and_8_bit_optimizers(tmp_path, optim):
    if "bnb" in optim:
        pytest.importorskip("bitsandbytes")
    fields = {"optim": optim, "learning_rate": 0.01}
    _, theirs = run(tmp_path / "plain", Trainer, TrainingArguments, wide(), **fields)
    _, ours = run(tmp_path / "alone", model=wide(), **fields, **PLAIN)
    assert_same_steps(ours, theirs)
    saving = {"save_strategy": "steps", "save_steps": 4}
    through, steps = run(tmp_path / "lsam", model=wide(), **fields, **LSAM, **saving)
    assert (steps[-1] - theirs[-1]).norm() > 1e-3
    kept = [state for values in through.optimizer.state.values() for state in values.values()]
    assert any(isinstance(state, Tensor) and state.dtype == torch.uint8 for state in kept) == ("bnb" in optim)
    checkpoint = str(tmp_path / "lsam" / "checkpoint-4")
    _, resumed = run(tmp_path / "lsam", model=wide(), resume=checkpoint, **fields, **LSAM, **saving)
    assert_same_steps(resumed, steps[4:])


def test_a_pass_along_moments_in_8_bits_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match=r"AdamW.* keeps none.*sam_direction='gradient'"):
        run(tmp_path, model=wide(), optim="adamw_bnb_8bit", sam_direction="momentum", **LSAM)


# --- searches, batch sizes that are found, data loaders of several processes ---


def test_a_hyperparameter_search_of_one_worker(tmp_path):
    pytest.importorskip("optuna").logging.set_verbosity(30)
    chosen, held_out = [], blobs(16, seed=3)

    def space(trial):
        rates = {"learning_rate": [0.01, 0.1], "sam_rho": [0.0, 0.2]}
        return {name: trial.suggest_categorical(name, values) for name, values in rates.items()}

    def objective(metrics):
        chosen.append((trainer.args.learning_rate, trainer.args.sam_rho, metrics["eval_loss"]))
        return metrics["eval_loss"]

    fields = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 6, "sync_steps": 2}
    trainer = LSAMTrainer(
        model_init=lambda: net(),
        args=arguments(LSAMConfig, tmp_path, **fields),
        train_dataset=blobs(),
        eval_dataset=held_out,
    )
    best = trainer.hyperparameter_search(space, objective, n_trials=3, direction="minimize", backend="optuna")
    assert len(chosen) == 3
    assert best.objective == min(loss for _, _, loss in chosen)
    for rate, rho, loss in chosen:
        fresh, _ = run(tmp_path, learning_rate=rate, sam_rho=rho, sync_steps=2)
        assert loss == pytest.approx(fresh.evaluate(held_out)["eval_loss"], rel=1e-6)


class OutOfMemory(nn.Module):
    """Has no room for more than four rows."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if len(x) > 4:
            raise RuntimeError("CUDA out of memory.")
        return self.net(x, labels)


def test_a_batch_size_that_is_found_begins_the_run_again(tmp_path):
    trainer, found = run(tmp_path / "found", model=OutOfMemory(), auto_find_batch_size=True, **LSAM)
    size = trainer._train_batch_size
    assert size <= 4
    _, given = run(tmp_path / "given", per_device_train_batch_size=size, **LSAM)
    assert_same_steps(found, given)
    assert trainer.worker_summary()["steps"] == 6


def test_batches_from_processes_of_the_data_loader_are_the_same(tmp_path):
    fields = {**LSAM, "max_steps": 12, "train_sampling_strategy": "random"}  # into the second epoch
    _, here = run(tmp_path / "here", **fields)
    _, there = run(tmp_path / "there", dataloader_num_workers=2, **fields)
    assert_same_steps(there, here)


# --- several trainers, several runs; launchers ---


def test_two_trainers_in_one_script_do_not_know_of_each_other(tmp_path):
    first = LSAMTrainer(
        model=net(1), args=arguments(LSAMConfig, tmp_path / "first", max_steps=6, **LSAM), train_dataset=blobs()
    )
    steps = Steps()
    second = LSAMTrainer(
        model=net(2),
        args=arguments(LSAMConfig, tmp_path / "second", max_steps=6, **LSAM),
        train_dataset=blobs(seed=4),
        callbacks=[steps],
    )
    first.train()
    anchor = vector(first.model)
    second.train()
    assert torch.equal(vector(first.model), anchor)
    _, alone = run(tmp_path / "alone", model=net(2), rows=blobs(seed=4), **LSAM)
    assert_same_steps(steps.x, alone)
    first.evaluate(blobs(8))
    assert torch.equal(vector(first.model), anchor)


LAUNCHED = """
import hashlib, json, os, sys
from pathlib import Path

OUT = Path(sys.argv[1])


def train():
    from models import arguments, blobs, net, vector

    from hf_lsam import LSAMConfig, LSAMTrainer

    def digest(model):
        return hashlib.sha256(vector(model).numpy().tobytes()).hexdigest()

    runs = []
    for name, seed in (("first", 1), ("second", 2)):  # two trainers of one launch
        fields = dict(max_steps=8, sync_steps=2, per_device_train_batch_size=4, num_workers=2)
        args = arguments(LSAMConfig, OUT / name, **fields)
        trainer = LSAMTrainer(model=net(seed), args=args, train_dataset=blobs(), eval_dataset=blobs(8))
        trainer.train()
        runs.append((digest(trainer.model), trainer.worker_summary(), trainer.evaluate()["eval_loss"]))
    trainer.train()  # the second one goes on from its anchor
    runs.append((digest(trainer.model), trainer.worker_summary(), trainer.evaluate()["eval_loss"]))
    (OUT / f"rank{args.identity.rank}.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        from accelerate import notebook_launcher

        notebook_launcher(train, num_processes=2, use_port=sys.argv[2])
    else:
        train()
"""


@pytest.mark.parametrize("launcher", ["torchrun", "notebook_launcher"])
def test_other_launchers_and_two_trainers_of_a_launch_of_which_one_trains_twice(tmp_path, launcher):
    script = write_script(tmp_path / "script.py", LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*command, script, tmp_path] if launcher == "torchrun" else []
    command = command or [sys.executable, script, tmp_path, str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for (anchor, summary, loss), (other_anchor, other_summary, other_loss) in zip(*ranks, strict=True):
        assert anchor == other_anchor
        assert loss == other_loss
        assert summary["steps"] == other_summary["steps"] == 8
        assert summary["anchor_version"] > 0
    assert len({anchor for anchor, _, _ in ranks[0]}) == 3
