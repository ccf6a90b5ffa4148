"""LSAMArguments: every field out of range, configurations that cannot be stable, and what LSAM refuses."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from transformers import HfArgumentParser, TrainingArguments
from transformers.optimization import Adafactor

from hf_lsam import LSAM, LSAMArguments, LSAMConfig
from hf_lsam.conflicts import refuse_first, with_optimizer
from hf_lsam.identity import Identity, detach
from hf_lsam.loop import LoopArguments


def config(tmp_path, **fields):
    return LSAMConfig(output_dir=tmp_path, use_cpu=True, report_to=[], **fields)


OUT_OF_RANGE = {
    "sam_rho": [-0.1, math.nan, math.inf, "0.1"],
    "sam_eps": [-1e-9, math.nan],
    "sam_interval": [0, -1, 1.5],
    "sam_ascent_fraction": [0.0, 1.1, -0.5, math.nan],
    "sam_direction": ["random", None],
    "langevin_temperature": [-1.0, math.inf],
    "sync_steps": [0, -4, 2.5, True],
    "coupling_strength": [-0.1, 1.5, math.nan, math.inf],
    "coupling": ["hard", None],
    "num_workers": [0, -1, 1.5],
    "shared_memory_dir": ["/no/such/folder"],
    "server_address": ["/no/such/folder", "localhost:29500"],
    "server_port": [-1, 65536, "29400", True],
    "server_timeout": [0.0, math.inf, math.nan, "120"],
    "machine_timeout": [1.9, math.inf, math.nan, "30"],
    "worker_timeout": [0, -1.0, math.nan],
    "snapshot_seconds": [-1.0, math.inf],
    "max_bad_pushes": [0, 1.5, True],
    "exchange_bits": [16, 0, "8"],
    "data_distribution": ["replicated"],
    "momentum_at": ["server", ""],
    "anchor_lr": [0.0, -1.0, math.nan, math.inf],
    "anchor_momentum_correction": [-0.1, math.nan],
    "anchor_optimizer": ["lion"],
    "anchor_momentum": [1.0, -0.1],
    "batchnorm_batches": [0, 0.5],
    "batchnorm_statistics": ["none"],
    "algorithm": ["majority"],
    "landscape_points": [-1, 1, 8, 10, 2.5, True],
    "landscape_batches": [0, 1.5],
}


CASES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_every_field_out_of_range_is_an_error_that_names_field_value_and_remedy(tmp_path, name, value):
    fields = {name: value}
    if name == "anchor_momentum":
        fields["anchor_optimizer"] = "nesterov"
    with pytest.raises(ValueError, match=rf"(?s)^`{name}` must be .*, got .*\. \S+") as error:
        config(tmp_path, **fields)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"sam_rho": 0, "sam_eps": 0.0, "langevin_temperature": 0, "snapshot_seconds": 0, "anchor_momentum": 0.0},
        {"sam_rho": 0.0, "coupling_strength": 0.0, "machine_timeout": 2.0, "anchor_momentum_correction": 0.0},
        {"sam_interval": 1, "sync_steps": 1, "num_workers": 1, "max_bad_pushes": 1, "batchnorm_batches": 1},
        {"sam_ascent_fraction": 1, "landscape_points": 5, "landscape_batches": 1, "coupling_strength": 1.0},
        {"sync_steps": None, "num_workers": None, "server_address": None, "shared_memory_dir": Path("/dev/shm")},
    ],
)
def test_the_ends_of_a_range_that_belong_to_it_are_taken(tmp_path, fields):
    args = config(tmp_path, **fields)
    assert {name: getattr(args, name) for name in fields} == fields


def test_workers_and_servers_get_every_setting_by_its_name(tmp_path):
    values = {
        "coupling_strength": 0.25,
        "coupling": "decoupled",
        "langevin_temperature": 0.5,
        "max_bad_pushes": 7,
        "anchor_lr": 0.75,
        "anchor_momentum_correction": 0.125,
        "anchor_optimizer": "nesterov",
        "anchor_momentum": 0.375,
        "worker_timeout": 11.0,
        "snapshot_seconds": 12.0,
        "server_timeout": 13.0,
        "machine_timeout": 14.0,
        "exchange_bits": 4,
    }
    args = config(tmp_path, **values)
    given = {"algorithm": "lsam", "sync_steps": 9, "moving_rate": 0.0, **values}
    given |= {"pushes_movement": False, "keeps_anchor_move": False, "weight": 3}
    timeouts = args.timeouts()
    for settings in (args.worker_settings(9, 3), args.server_settings(9), timeouts, timeouts.service):
        told = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        told.pop("service", None)
        assert told == {name: given[name] for name in told}
    assert config(tmp_path, sam_direction="anchor").worker_settings(9).keeps_anchor_move
    assert config(tmp_path).server_settings(9).pushes_movement
    assert config(tmp_path, algorithm="easgd", coupling_strength=0.5).server_settings(9).moving_rate == 0.5


def test_the_help_of_every_field_is_its_paragraph_of_the_docstring(monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # argparse would break lines within words
    shown = HfArgumentParser(LSAMConfig).format_help()
    text = " ".join(LSAMArguments.__doc__.split())
    for field in dataclasses.fields(LSAMArguments):
        paragraph = field.metadata["help"].replace("%%", "%")
        assert len(paragraph) > 20, field.name
        assert f"{paragraph} " in text
        assert paragraph in shown


def test_every_field_has_a_value_out_of_range_in_this_test():
    own = {field.name for field in dataclasses.fields(LSAMArguments)} - {
        "sam_adaptive",
        "compensate_coupling",
        "scale_learning_rate",
        "share_steps",
    }  # any truth value will do
    assert own == set(OUT_OF_RANGE)


def test_the_defaults_are_those_of_the_documentation():
    for field in dataclasses.fields(LSAMArguments):
        documented = f"{field.name} (`"
        assert documented in LSAMArguments.__doc__, field.name
        if field.default is not None:
            line = LSAMArguments.__doc__.split(documented)[1].split("):")[0]
            assert repr(field.default).replace("'", '"') in line, field.name


@pytest.mark.parametrize(("workers", "sync_steps"), [(1, 4), (2, 4), (3, 2), (64, 2)])
def test_more_workers_exchange_more_often_unless_told_otherwise(tmp_path, workers, sync_steps):
    assert config(tmp_path).steps_between_pushes(workers) == sync_steps
    (tmp_path / "run.json").touch()
    assert config(tmp_path, server_address=str(tmp_path)).steps_between_pushes(workers) == 2
    assert config(tmp_path, sync_steps=3).steps_between_pushes(workers) == 3


def test_the_environment_says_which_server_a_worker_joins_and_which_of_how_many_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LSAM_SERVER_ADDRESS", str(tmp_path))
    assert config(tmp_path).server_address == str(tmp_path)
    assert config(tmp_path).identity == Identity()
    monkeypatch.setenv("HF_LSAM_WORKER", "2")
    monkeypatch.setenv("HF_LSAM_NUM_WORKERS", "3")
    monkeypatch.setenv("RANK", "7")  # of whatever launcher has started what starts the workers
    model = torch.nn.Linear(1, 1)
    for arguments in (config(tmp_path), LSAM(model, torch.optim.SGD(model.parameters())).arguments):
        assert arguments.identity == Identity(2, num_workers=3, comes_and_goes=True)
        assert not arguments.identity.meets_others
    with pytest.raises(ValueError, match=r"landscape_points.*worker 0 would have to wait"):
        config(tmp_path, landscape_points=5)
    monkeypatch.delenv("HF_LSAM_SERVER_ADDRESS")
    with pytest.raises(ValueError, match=r"HF_LSAM_WORKER says.*Set HF_LSAM_SERVER_ADDRESS"):
        config(tmp_path)
    monkeypatch.setenv("HF_LSAM_WORKER", "3")
    with pytest.raises(ValueError, match=r"HF_LSAM_WORKER=3 and HF_LSAM_NUM_WORKERS=3 do not say"):
        config(tmp_path)


def test_the_learning_rate_is_raised_by_what_a_coupling_at_every_step_brakes(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    sgd, plain = torch.optim.SGD(parameters, 0.1, momentum=0.9), torch.optim.SGD(parameters, 0.1)
    assert config(tmp_path).learning_rate_factor(16, sgd) == 1.0
    stepwise = {"coupling": "decoupled", "coupling_strength": 2.0, "anchor_lr": 1.5, "sync_steps": 16}
    assert config(tmp_path, **stepwise).learning_rate_factor(16, sgd) == pytest.approx(1 + 2 / 1.5 / (1 - 2 / 16))
    assert config(tmp_path, compensate_coupling=False, **stepwise).learning_rate_factor(16, plain) == 1.0
    both = config(tmp_path, scale_learning_rate=True, **stepwise).learning_rate_factor(16, sgd, workers=9)
    assert both == pytest.approx(3 * (1 + 2 / 1.5 / (1 - 2 / 16)))
    score = config(tmp_path, coupling="score", coupling_strength=0.1)
    assert score.learning_rate_factor(16, sgd) == pytest.approx(1 + (1 - 1 / 16))  # lambda0 / (1 - momentum) = 1


def test_momentum_at_the_anchor_is_that_of_as_many_steps_and_a_learning_rate_means_what_it_did(tmp_path):
    parameters, args = [torch.nn.Parameter(torch.zeros(1))], config(tmp_path)
    sgd, adam = torch.optim.SGD(parameters, 0.1, momentum=0.9), torch.optim.AdamW(parameters, 0.1, betas=(0.8, 0.99))
    assert (args.shared_momentum(sgd, 4), args.shared_momentum(adam, 4)) == (0.9, 0.8)
    assert args.shared_momentum(sgd) == 0.0  # a lone worker keeps its own
    server = args.server_settings(3, 0.9)
    assert (server.anchor_optimizer, server.anchor_momentum) == ("nesterov", pytest.approx(0.729))
    assert args.server_settings(3) == config(tmp_path, momentum_at="worker").server_settings(3)
    assert args.learning_rate_factor(3, sgd, workers=4) == pytest.approx(1 + 0.9 + 0.81)
    assert args.learning_rate_factor(3, adam, workers=4) == pytest.approx(2 * (1 - 0.8**3))
    assert args.learning_rate_factor(3, sgd) == 1.0


ELSEWHERE = [
    ({"algorithm": "easgd", "sam_rho": 0.0, "coupling_strength": 0.5}, "hand in what they have moved"),
    ({"coupling": "decoupled", "sync_steps": 4}, "hand in what they have moved"),
    ({"anchor_optimizer": "adam"}, "gives the anchor its momentum, got anchor_optimizer='adam'"),
    ({"sam_direction": "momentum"}, "perturbs along the worker's momentum"),
]


@pytest.mark.parametrize(("fields", "reason"), ELSEWHERE)
def test_momentum_stays_at_workers_where_something_else_has_it_or_needs_it_and_asking_otherwise_is_an_error(
    tmp_path, fields, reason
):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    assert config(tmp_path, **fields).shared_momentum(sgd, 4) == 0.0
    with pytest.raises(ValueError, match=rf"{reason}.*momentum_at='worker'"):
        config(tmp_path, momentum_at="anchor", **fields)


def dampened(parameters, rate):
    return torch.optim.SGD(parameters, rate, momentum=0.9, dampening=0.5)


def in_two_groups(parameters, rate):
    return torch.optim.SGD(
        [{"params": parameters, "momentum": 0.9}, {"params": [torch.nn.Parameter(torch.ones(1))]}], rate
    )


@pytest.mark.parametrize("kind", [torch.optim.SGD, dampened, in_two_groups, torch.optim.Adamax, torch.optim.Muon])
def test_momentum_that_cannot_be_taken_from_an_optimizer_is_left_there_and_asking_otherwise_is_an_error(tmp_path, kind):
    optimizer = kind([torch.nn.Parameter(torch.zeros(1, 1))], 0.1)
    refuse_first(with_optimizer(config(tmp_path), optimizer))
    assert config(tmp_path).shared_momentum(optimizer, 4) == 0.0
    with pytest.raises(ValueError, match=r"has none that could be taken from it\. Use SGD with momentum"):
        refuse_first(with_optimizer(config(tmp_path, momentum_at="anchor"), optimizer))


def test_an_optimizer_that_chooses_its_learning_rate_by_itself_is_refused(tmp_path):
    optimizer = Adafactor([torch.nn.Parameter(torch.zeros(1, 1))])
    with pytest.raises(ValueError, match=r"Adafactor chooses its learning rate by itself \(lr=None\).*Give it one"):
        LSAM(torch.nn.Linear(1, 1), optimizer)


def adafactor(parameters, rate):
    return Adafactor(parameters, rate, relative_step=False)


OF_ADAMS_KIND = [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.Adamax, adafactor]


@pytest.mark.parametrize("kind", [*OF_ADAMS_KIND, torch.optim.SGD, torch.optim.Adagrad])
def test_the_learning_rate_of_adam_and_its_kind_grows_with_the_root_of_n_unless_told_otherwise(tmp_path, kind):
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], 0.1)

    def factor(workers, **fields):
        return config(tmp_path, momentum_at="worker", **fields).learning_rate_factor(16, optimizer, workers)

    assert factor(4) == (2.0 if kind in OF_ADAMS_KIND else 1.0)
    assert factor(1) == factor(4, scale_learning_rate=False) == factor(4, algorithm="lsgd", sam_rho=0.0) == 1.0
    assert factor(4, scale_learning_rate=True) == 2.0


@pytest.mark.parametrize(
    "fields",
    [
        {"coupling_strength": 0.1, "anchor_momentum_correction": 0.9, "anchor_lr": 1.0},
        {"coupling_strength": 0.9, "anchor_momentum_correction": 0.9, "anchor_lr": 1.0},
        {"coupling_strength": 0.1, "anchor_momentum_correction": 0.3, "anchor_lr": 2.0},
        {"coupling_strength": 0.1, "anchor_optimizer": "nesterov", "anchor_lr": 1.4},
    ],
)
def test_a_configuration_outside_the_stability_region_names_the_bound_and_a_value_inside(tmp_path, fields):
    fields = {"coupling": "decoupled", "sync_steps": 16, **fields}
    with pytest.raises(ValueError, match="outside the stability region") as error:
        config(tmp_path, **fields)
    suggested = float(str(error.value).split("Use anchor_lr=")[1].split(",")[0])
    bound = float(str(error.value).split("anchor_lr < ")[1].split(")")[0])
    assert suggested < bound < fields["anchor_lr"]
    config(tmp_path, **{**fields, "anchor_lr": suggested})


def test_the_configuration_that_a_prototype_trained_with_is_inside(tmp_path):
    config(
        tmp_path,
        coupling="decoupled",
        coupling_strength=0.1,
        anchor_momentum_correction=0.9,
        anchor_lr=0.5,
        sync_steps=16,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": "full_shard"}, r"fsdp.*whole parameters.*LoRA"),
        ({"deepspeed": "zero.json"}, r"deepspeed.*whole parameters"),
        ({"optim": "galore_adamw_layerwise", "optim_target_modules": "all-linear"}, r"backward pass.*adamw_torch"),
        ({"optim": "lomo"}, r"backward pass.*adamw_torch"),
        ({"optim": "adalomo"}, r"backward pass.*adamw_torch"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, r"only worker 0.*'linear'"),
    ],
)
def test_what_cannot_be_right_is_refused_with_cause_and_remedy(tmp_path, fields, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        config(tmp_path, **fields)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_sharding_asked_of_the_launcher_is_refused(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="cannot be combined with"):
        config(tmp_path)


def test_auto_find_batch_size_is_refused_among_several_workers(tmp_path, monkeypatch):
    config(tmp_path, auto_find_batch_size=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="per_device_train_batch_size"):
        config(tmp_path, auto_find_batch_size=True)


def test_a_sampler_that_is_not_seeded_is_refused_among_several_workers(tmp_path, monkeypatch):
    config(tmp_path, accelerator_config={"use_seedable_sampler": False})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="shares of an epoch would overlap"):
        config(tmp_path, accelerator_config={"use_seedable_sampler": False})


def test_fewer_workers_than_meant_is_an_error_that_names_the_launch(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"num_workers=4, but 1 were started.*--multi_gpu --num_processes 4"):
        config(tmp_path, num_workers=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert config(tmp_path, num_workers=4).identity == Identity(0, 0, 4, local_workers=4)


def test_several_machines_are_told_apart_by_the_launcher_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="does not say which machine this is"):
        config(tmp_path)
    for name, value in {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert config(tmp_path).identity == Identity(3, 1, 4, machine=1, num_machines=2, local_workers=2)
    with pytest.raises(ValueError, match="algorithm='easgd' works on one machine only"):
        config(tmp_path, algorithm="easgd")
    with pytest.raises(ValueError, match="algorithm='lsgd' works on one machine only"):
        LoopArguments(algorithm="lsgd")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ValueError, match=r"--max_restarts is set. With several machines.*Remove it"):
        config(tmp_path)


def test_a_worker_is_a_job_of_its_own_to_accelerate_and_keeps_its_rank(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    args = config(tmp_path)
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 1, 1)
    assert args.device.type == "cpu"
    assert args.parallel_mode.value == "not_parallel"
    assert not args.should_save
    with args.saving_own_state():
        assert args.should_save
    assert not args.should_save
    assert os.environ["RANK"] == "1"


@pytest.mark.filterwarnings("ignore:Can't initialize NVML:UserWarning")
def test_a_loop_stays_on_the_gpu_that_its_model_is_on(monkeypatch):
    """On a machine whose four GPUs are pretended, for a worker started on its own, which is always the first there."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device).index))
    detach(Identity(2, num_workers=3, comes_and_goes=True), torch.device("cuda:3"))
    assert current[-1] == 3
    assert PartialState().device == torch.device("cuda:3")
    assert PartialState().process_index == 2


def test_a_worker_without_a_gpu_pins_no_memory(tmp_path):
    """Torch would warn of it at each loader."""
    args = LSAMConfig(output_dir=tmp_path, report_to=[])
    assert args.dataloader_pin_memory == (args.device.type != "cpu")


def test_every_training_argument_is_there_and_unknown_ones_are_errors(tmp_path):
    ours = {field.name for field in dataclasses.fields(LSAMConfig)}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= ours
    with pytest.raises(TypeError, match="sam_roh"):
        config(tmp_path, sam_roh=0.1)
    with pytest.raises(ValueError, match="sam_roh"):
        HfArgumentParser(LSAMConfig).parse_dict({"output_dir": str(tmp_path), "sam_roh": 0.1})


def test_the_former_name_of_a_field_is_refused_with_its_new_one(tmp_path):
    with pytest.raises(TypeError, match="`server_rule` is now algorithm, with 'lsam'"):
        config(tmp_path, server_rule="smoothed")
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="`server_rule` is now algorithm, with 'lsam'"):
        LSAM(model, torch.optim.SGD(model.parameters()), server_rule="smoothed")


def test_arguments_survive_the_command_line_and_json(tmp_path):
    (args,) = HfArgumentParser(LSAMConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--sam_rho", "0.2", "--sync_steps", "8", "--num_workers", "1"]
    )
    assert (args.sam_rho, args.sync_steps, args.num_workers) == (0.2, 8, 1)
    assert args.to_dict()["coupling_strength"] == 1.0
    assert '"sync_steps": 8' in args.to_json_string()
