"""What LSAMTrainer refuses at construction, with the reason."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import trl
from models import VOCABULARY, arguments, blobs, net, sentences, tiny_bert
from reference import LSAM, train
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer, LSAMTrainerMixin
from hf_lsam.parameters import trainable_parameters
from hf_lsam.trainer.trl import makes_its_batches


def refuse(tmp_path, match: str, model=None, kind=LSAMTrainer, error=ValueError, **fields):
    with pytest.raises(error, match=match):
        kind(model=model or net(), args=arguments(LSAMConfig, tmp_path, **LSAM, **fields), train_dataset=blobs())


def test_fsdp_is_refused(tmp_path, monkeypatch):
    refuse(tmp_path, r"cannot be combined with fsdp.*whole parameters.*Launch without it", fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refuse(tmp_path, r"cannot be combined with FSDP.*whole parameters.*LoRA adapter")


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    refuse(tmp_path, r"cannot be combined with deepspeed.*whole parameters.*Launch without it", deepspeed={"a": 1})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refuse(tmp_path, r"cannot be combined with DeepSpeed.*whole parameters.*LoRA adapter")


def test_tensor_parallel_parameters_are_refused(tmp_path):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = net()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(model.first.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.first.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"`first.weight` is sharded \(DTensor.*without a device mesh"):
            trainable_parameters(model)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_the_backward_pass_are_refused(tmp_path, optim):
    refuse(tmp_path, rf"optim='{optim}' steps inside the backward pass.*optim='adamw_torch'", optim=optim)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_evaluations_are_refused(tmp_path, schedule):
    fields = {"lr_scheduler_type": schedule, "eval_strategy": "steps"}
    refuse(tmp_path, rf"{schedule}.*only worker 0.*'linear'", **fields)


def test_complex_parameters_are_refused(tmp_path):
    model = net()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"`phase` is complex \(torch\.complex64\).*torch\.view_as_complex"):
        train(tmp_path, model)


def test_a_model_without_trainable_parameters_is_refused(tmp_path):
    refuse(tmp_path, r"no trainable parameter.*nothing to perturb.*Unfreeze", model=net().requires_grad_(False))


@pytest.mark.parametrize(
    ("begins_frozen", "logging_strategy", "what"),
    [(True, "steps", "has become trainable"), (False, "no", "has been frozen")],
)
def test_a_layer_that_is_unfrozen_or_frozen_while_training_is_refused(tmp_path, begins_frozen, logging_strategy, what):
    """At the next log point; without any, before the run counts as finished."""

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 3:
                model.first.requires_grad_(begins_frozen)

    model = net()
    model.first.requires_grad_(not begins_frozen)
    with pytest.raises(ValueError, match=rf"`first\.weight` {what}.*end this run and start another"):
        train(tmp_path, model, max_steps=8, logging_strategy=logging_strategy, callbacks=[Change()])
    model.first.requires_grad_(True)
    train(tmp_path, model, max_steps=2)  # as the message says


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("logging_strategy", ["steps", "no"])
def test_embeddings_that_are_resized_while_training_are_refused(tmp_path, logging_strategy, optim):
    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **keywords):
            if state.global_step == 3:
                model.resize_token_embeddings(VOCABULARY + 8)

    fields = {"max_steps": 8, "logging_strategy": logging_strategy, "optim": optim}
    words = rf"word_embeddings\.weight` was \[{VOCABULARY}, 16\] .* is \[{VOCABULARY + 8}, 16\] now.*before training"
    model = tiny_bert()
    with pytest.raises(ValueError, match=words):
        train(tmp_path, model, sentences(), callbacks=[Change()], **fields)
    train(tmp_path, model, sentences(), **fields)  # resized before: as the message says


def test_easgd_without_a_single_exchange_is_an_error(tmp_path):
    fields = {"algorithm": "easgd", "coupling_strength": 0.1, "sam_rho": 0.0, "max_steps": 3}
    with pytest.raises(ValueError, match=r"makes 3 steps and would exchange after 8 .*Set sync_steps to 1, or"):
        train(tmp_path, net(), sync_steps=8, **fields)
    train(tmp_path, net(), sync_steps=3, **fields)


@pytest.mark.parametrize(
    ("device_map", "lies_on"),
    [({"first": 0, "last": 1}, r"several devices \(0, 1\)"), ({"": "meta"}, "device meta")],
)
def test_a_model_on_other_devices_than_the_workers_is_refused(tmp_path, device_map, lies_on):
    model = net()
    model.hf_device_map = device_map
    remedy = r'LSAMConfig first.*device_map=\{"": args\.device\}'
    refuse(tmp_path, rf"lies on {lies_on} .*worker's device is cpu.*{remedy}", model=model)


def trainer_of_trl(name: str) -> type:
    """From `trl`, or else from the module of its name under `trl.experimental`."""
    if hasattr(trl, name):
        return getattr(trl, name)
    folder = {"OnlineDPOTrainer": "online_dpo", "IWOPDTrainer": "iw_opd", "AsyncGRPOTrainer": "async_grpo"}
    folder |= {f"{kind}DistillationTrainer": f"{kind.lower()}_distillation" for kind in ("Server", "Async")}
    return getattr(
        importlib.import_module(f"trl.experimental.{folder.get(name, name.removesuffix('Trainer').lower())}"), name
    )


GENERATING = [
    *("GRPOTrainer", "RLOOTrainer", "DistillationTrainer", "GKDTrainer", "GOLDTrainer", "OnlineDPOTrainer"),
    *("GMPOTrainer", "AsyncGRPOTrainer", "SDFTTrainer", "SDPOTrainer", "A2POTrainer", "IWOPDTrainer"),
    *("ServerDistillationTrainer", "AsyncDistillationTrainer"),
]
PLAIN = ["SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer", "TPOTrainer"]


@pytest.mark.filterwarnings("ignore::Warning")  # of trl, that its experimental trainers may change
@pytest.mark.parametrize("name", GENERATING)
def test_trainers_that_generate_inside_the_step_are_refused(tmp_path, name):
    kind = type("Mixed", (LSAMTrainerMixin, trainer_of_trl(name)), {})
    refuse(tmp_path, rf"cannot train with {name} yet.*generates.*second pass.*SFTTrainer", kind=kind)


@pytest.mark.filterwarnings("ignore::Warning")
@pytest.mark.parametrize("name", PLAIN)
def test_trainers_whose_step_takes_the_batch_as_it_is_are_not(name):
    assert makes_its_batches(type("Mixed", (LSAMTrainerMixin, trainer_of_trl(name)), {})) is None


def test_no_trainer_of_trl_is_left_out():
    """Each one that the installed trl defines is among those above: whether a new one generates is to be looked up."""
    files = Path(trl.__file__).parent.rglob("*_trainer.py")
    found = {name for file in files for name in re.findall(r"^class (\w+Trainer)\(", file.read_text(), re.MULTILINE)}
    assert {"SFTTrainer", "AsyncGRPOTrainer"} < found
    assert found - {"_BaseTrainer", *GENERATING, *PLAIN} == set()


def test_plain_training_arguments_are_refused(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    with pytest.raises(TypeError, match=r"needs the LSAM fields.*got TrainingArguments.*Pass an LSAMConfig"):
        LSAMTrainer(model=net(), args=args, train_dataset=blobs())
    with pytest.raises(TypeError, match="got NoneType"):
        LSAMTrainer(model=net(), train_dataset=blobs())


@pytest.mark.parametrize("name", ["DPOTrainer", "KTOTrainer", "RewardTrainer"])
def test_part_of_a_batch_whose_rows_belong_together_is_refused(tmp_path, name):
    kind = type(f"My{name}", (LSAMTrainerMixin, getattr(trl, name)), {})
    args = arguments(LSAMConfig, tmp_path, sam_ascent_fraction=0.5)
    with pytest.raises(ValueError, match=rf"{name} rows belong together.*Use sam_ascent"):
        kind(model=net(), args=args)
