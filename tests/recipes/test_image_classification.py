"""The image recipes: five methods through the real launcher, their arithmetic, and the experiments."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from images import write_images
from launch import PATHS, ROOT, accelerate_launch, run_script, write_script
from safetensors.torch import load_model

from hf_lsam import vision
from recipes.cifar10_resnet20.methods import METHODS
from recipes.cifar10_resnet20.train import KEYS, run
from recipes.common.configuration import parse_configuration
from recipes.common.image_data import ImageDataArguments
from scripts.experiments import reproduce, simulate_images
from scripts.tools import gains
from scripts.tools.gains import Gains

TINY = {"use_cpu": True, "batch_size": 4, "model_width": 4, "learning_rate": 0.05, "log_steps": 2, "eval_points": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("images")
    train = write_images(folder / "train.parquet", 96, 0)
    held_out = write_images(folder / "test.parquet", 30, 1)
    return {"dataset": "parquet", "train_file": str(train), "eval_file": str(held_out)}


def values_of(**settings) -> dict:
    words = [f"--{key}={value}" for key, value in settings.items()]
    return parse_configuration(KEYS, words)


def test_five_methods_with_two_workers_each(tmp_path, data):
    """One launch makes all the runs, one after another, as the experiments do."""
    common = {**data, **TINY, "epochs": 4, "num_workers": 2, "sync_steps": 4, "sam_rho": 0.05}
    settings = {
        **{method: {"method": method} for method in METHODS},
        "easgd": {"method": "easgd", "coupling_strength": 0.45},
        "sam twice": {"method": "ddp_sam", "ascent_sync": True},
        "average": {"method": "lsam", "batchnorm_statistics": "average"},
    }
    plan = tmp_path / "plan.json"
    runs = [values_of(**common, **own, output_dir=tmp_path / name) for name, own in settings.items()]
    plan.write_text(json.dumps(runs))
    accelerate_launch(ROOT / "scripts/experiments/reproduce.py", "--runs", str(plan), fork=True)
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in settings}
    for name, result in results.items():
        assert result["method"] == settings[name]["method"]
        assert result["steps_per_worker"] == 96 * 4 // 8
        assert [worker["steps"] for worker in result["workers"]] == [48, 48]
        assert [point["step"] for point in result["points"]] == [24, 48]
        # Three plain colours. LSGD draws workers to the first anchor until its server has taken a push, and on a busy
        # machine it may come to none in a run of less than a second.
        assert result["accuracy"] > 0.5 or (name == "lsgd" and not any(w["pushes"] for w in result["workers"])), name
        assert result["points"][0]["bytes"] < result["points"][1]["bytes"]
    for name in ("easgd", "lsgd", "ddp"):
        assert results[name]["configuration"]["sam_rho"] == 0
    numel = results["lsam"]["workers"][0]["trainable_parameters"]
    statistics = sum(2 * m.num_features for m in vision.resnet20(3, width=4).modules() if hasattr(m, "running_mean"))
    assert results["average"]["workers"][0]["trainable_parameters"] == numel + statistics
    # A ring of two sends and receives each gradient once; with ascent_sync there are two a step.
    assert results["ddp"]["bytes"] == 48 * 2 * 2 * 4 * numel
    assert results["sam twice"]["bytes"] == 2 * results["ddp"]["bytes"]
    assert results["lsam"]["bytes"] < results["ddp"]["bytes"]
    model = vision.resnet20(3, width=4)
    load_model(model, str(tmp_path / "lsam/model.safetensors"))


SAM_OF_TWO = """
    import torch
    from torch import nn
    from hf_lsam.identity import Identity
    from recipes.cifar10_resnet20.methods import DataParallel

    identity = Identity.from_environment()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    fields = dict(sam_rho=0.2, sam_eps=1e-12, sam_adaptive=False, batchnorm_statistics="reestimate")
    x = torch.randn(6, 5).chunk(2)[identity.rank]
    with DataParallel(model, optimizer, identity, fields, ascent_sync={ascent_sync}) as method:
        for _ in range(3):
            method.step(lambda: method.forward(x).square().mean(), 0.2)
    if identity.rank == 0:
        torch.save([p.detach() for p in model.parameters()], {out!r})
"""


@pytest.mark.parametrize("ascent_sync", [True, False])
def test_data_parallel_sam_against_its_equations(tmp_path, ascent_sync):
    """w <- w - eta mean_i grad f_i(w + eps_i), eps_i = rho g_i / |g_i|; with ascent_sync all use g = mean_i g_i."""
    out = tmp_path / "parameters"
    source = SAM_OF_TWO.format(ascent_sync=ascent_sync, out=str(out))
    accelerate_launch(write_script(tmp_path / "sam.py", source), fork=True, PYTHONPATH=PATHS)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    parameters = list(model.parameters())
    halves = torch.randn(6, 5).chunk(2)

    def gradients(at, x):
        named = {name: p for (name, _), p in zip(model.named_parameters(), at, strict=True)}
        return torch.autograd.grad(torch.func.functional_call(model, named, (x,)).square().mean(), at)

    for _ in range(3):
        own = [gradients(parameters, x) for x in halves]
        mean = [(a + b) / 2 for a, b in zip(*own, strict=True)]
        descent = []
        for x, g in zip(halves, own, strict=True):
            g = mean if ascent_sync else g
            norm = torch.cat([each.flatten() for each in g]).norm()
            moved = [(p + 0.2 * each / norm).detach().requires_grad_() for p, each in zip(parameters, g, strict=True)]
            descent.append(gradients(moved, x))
        with torch.no_grad():
            for p, a, b in zip(parameters, *descent, strict=True):
                p -= 0.3 * (a + b) / 2
    for ours, expected in zip(torch.load(out, weights_only=True), parameters, strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_worker_alone_and_a_slow_one(tmp_path, data):
    """In this process: LSAM with n = 1, a pause after every step, a rho that decays, a worker that is reset."""
    settings = {"rho_schedule": "learning_rate", "slow_worker": 0, "slow_steps": 3}
    results = run(
        values_of(**data, **TINY, **settings, epochs=2, sync_steps=4, output_dir=tmp_path / "out", save_model=False)
    )
    assert results["workers"][0]["slept"] > 0
    assert results["num_workers"] == 1
    assert results["bytes"] == 0
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize(("key", "value", "held_out"), [("validation_fraction", 0.25, 24), ("tuning", True, 10)])
def test_validation_never_reads_the_test_split(tmp_path, data, key, value, held_out):
    settings = {**data, "eval_file": tmp_path / "missing.parquet", key: value}
    results = run(values_of(**settings, **TINY, method="ddp", epochs=1, output_dir=tmp_path / "out"))
    assert results["evaluated_on"] == "validation split"
    assert (results["eval_images"], results["train_images"]) == (held_out, 96 - held_out)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "adam"}, "`method` must be one of lsam, easgd, lsgd, ddp_sam, ddp"),
        ({"method": "lsam", "ascent_sync": True}, "ascent_sync is for method ddp_sam"),
        ({"num_workers": 3}, "num_workers=3, but 1 were started"),
        ({"lr_schedule": "linear"}, "`lr_schedule` must be one of cosine, constant"),
        ({"sam_ascent_fraction": 0.5}, "sam_ascent_fraction is for LSAMTrainer"),
        ({"landscape_points": 17}, "landscape_points is for LSAMTrainer"),
        ({"method": "lsam", "algorithm": "easgd"}, "algorithm=easgd would have no effect.*set method to easgd"),
        ({"method": "ddp", "algorithm": "lsgd"}, "algorithm=lsgd would have no effect: method ddp decides"),
        ({"method": "ddp_sam", "sam_interval": 2}, "Set sam_interval to 1"),
        (
            {"method": "ddp_sam", "sam_direction": "momentum"},
            "sam_direction=momentum would.*Set sam_direction to gradient",
        ),
        ({"batch_size": 0}, "`batch_size` must be >= 1"),
    ],
)
def test_what_cannot_be_done_is_said_first(tmp_path, data, settings, message):
    with pytest.raises(ValueError, match=message):
        run(values_of(**{**data, **TINY, "epochs": 1, **settings}, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


IMAGE_RECIPES = sorted(
    path for name in ("cifar10", "cifar100", "svhn") for path in ROOT.glob(f"recipes/{name}_*/*.yaml")
)


@pytest.mark.parametrize("path", IMAGE_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_image_recipe_is_read(path):
    values = parse_configuration(KEYS, ["--config", str(path)])
    assert values["method"] == path.stem.removesuffix("_paper")
    assert f"{values['dataset']}_{values['model']}" == path.parent.name
    assert (values["epochs"], values["batch_size"], values["learning_rate"], values["num_workers"]) == (
        150,
        128,
        0.2,
        4,
    )


def test_there_is_a_recipe_for_each_set_model_and_method():
    assert len(IMAGE_RECIPES) == 3 * 3 * len(METHODS) + 1  # and LSAM as in the paper


def run_experiment(tmp_path: Path, data: dict, experiment: str, *words: str) -> dict:
    words += ("--budget", "smoke", "--runs_dir", str(tmp_path / "runs"), "--output_dir", str(tmp_path / "tables"))
    words += tuple(f"--{key}={value}" for key, value in data.items())
    done = run_script(ROOT / "scripts/experiments/reproduce.py", experiment, *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for suffix in ("md", "png"):
        assert (tmp_path / "tables" / f"{experiment}.{suffix}").stat().st_size > 0
    return json.loads((tmp_path / "tables" / f"{experiment}.json").read_text())


def test_methods_are_tuned_alike_and_go_on_where_they_were_interrupted(tmp_path, data):
    compared = ("lsam", "ddp_sam")
    words = ("--methods", *compared, "--epochs=1")
    report = run_experiment(tmp_path, data, "methods", *words)
    trials = [trial["method"] for trial in report["trials"]]
    assert {method: trials.count(method) for method in trials} == dict.fromkeys(compared, 5)
    assert report["chosen"].keys() == set(compared)
    for method, chosen in report["chosen"].items():
        best = max(t["validation_accuracy"] for t in report["trials"] if t["method"] == method)
        assert {"settings": chosen, "validation_accuracy": best, "method": method} in report["trials"]
    assert {run["evaluated_on"] for run in report["runs"]} == {"test split"}
    assert str(tmp_path) not in json.dumps(report)  # no path of this machine is published
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/results.json")}
    # Not one of the trials: asynchronous workers end elsewhere the second time, and another setting may be chosen.
    lost = next(path for path in finished if json.loads(path.read_text())["evaluated_on"] == "test split")
    lost.unlink()
    again = run_experiment(tmp_path, data, "methods", *words)
    assert [run["settings"] for run in again["runs"]] == [run["settings"] for run in report["runs"]]
    assert {path for path, time in finished.items() if path.stat().st_mtime_ns != time} == {lost}


class Planned(reproduce.Runner):
    """Only plans: what its runs would reach decides nothing here."""

    def results(self, plans):
        return [{"accuracy": 0.5, "points": []} for _ in plans]


@pytest.mark.parametrize("experiment", [reproduce.async_vs_sync, reproduce.sync_interval, reproduce.open_choices])
def test_runs_are_what_their_labels_say_whatever_trials_have_chosen(tmp_path, experiment):
    (tmp_path / "methods.json").write_text(json.dumps({"chosen": {"lsam": {"coupling_strength": 0.5}}}))  # only of lsam
    runner = Planned("smoke", [], tmp_path / "runs", tmp_path)
    for plan in experiment(runner)[0]:
        values = runner.values(plan.settings)
        for name, key in (("tau", "sync_steps"), ("lambda0", "coupling_strength")):
            if said := re.search(rf"\b{name} = ([\d.]+)", plan.label):
                assert values[key] == float(said[1]), plan.label
        if experiment is reproduce.open_choices and "lambda0" not in plan.label:
            assert values["coupling_strength"] == 1, plan.label


# --- simulated ---


@pytest.mark.parametrize("method", simulate_images.METHODS)
def test_every_method_is_simulated_on_images(data, method):
    """Two workers, one at half speed behind a link; nothing is learnt in so few steps, but all of it runs."""
    machines = [{"step_seconds": 0.1}, {"step_seconds": 0.2, "latency": 0.01, "bandwidth": 1e7}]
    run = simulate_images.Run(method, 8, batch_size=4, machines=machines, moments=2)
    values = parse_configuration((ImageDataArguments,), [f"--{k}={v}" for k, v in data.items() if v is not None])
    result = simulate_images.simulate(run, json.dumps(values))
    first, last = result["points"]
    waits = simulate_images.METHODS[method].keys() & {"barrier", "data_parallel"}
    # Without a barrier workers share 16 steps, of which the fast one makes two of three.
    assert (first["step"], last["step"]) == ((4, 8) if waits else (6, 11))
    assert last["bytes"] > first["bytes"] > 0 or method == "LSAM as in the paper"  # it first exchanges at step 16
    assert (last["virtual_seconds"] > 8 * 0.2) == bool(waits)
    assert 0 <= last["error"] <= 100
    assert 0 <= last["train_error"] <= 100
    assert (result["sync_steps"] is None) == method.startswith("data-parallel")


def test_wrong_labels_are_of_training_images_alone(data):
    values = json.dumps(parse_configuration((ImageDataArguments,), [f"--{k}={v}" for k, v in data.items() if v]))
    right, wrong = simulate_images.images_of(values, False), simulate_images.images_of(values, False, 0.5)
    assert (right.train_labels != wrong.train_labels).sum() == round(len(right.train_labels) / 2)
    assert torch.equal(right.eval_labels, wrong.eval_labels)
    assert torch.equal(right.train_images, wrong.train_images)


def test_the_clusters_of_the_clock_are_machines():
    for cluster, method in itertools.product(simulate_images.CLUSTERS, simulate_images.CLOCKED):
        machines = [simulate_images.Machine(**fields) for fields in simulate_images.machines_of(cluster, method)]
        assert len(machines) == 4
    reduced, *_ = simulate_images.machines_of("links of 1 Gb/s", "data-parallel SGD")
    beside, *others = simulate_images.machines_of("links of 1 Gb/s", "LSAM without SAM")
    assert "bandwidth" not in beside
    assert [other["bandwidth"] for other in others] == [reduced["bandwidth"] / 3] * 3


def test_the_figure_of_the_clock_says_what_the_readme_does(tmp_path):
    Gains().draw(tmp_path / "clock.svg")
    said = re.findall(r">([^<>]+)</text>", (tmp_path / "clock.svg").read_text())
    assert {*simulate_images.CLUSTERS, "LSAM", "data-parallel SGD"} <= set(said)
    seconds = [text.removesuffix(", not level") for text in said if re.fullmatch(r"[\d,]+ s(, not level)?", text)]
    assert len(seconds) == 2 * len(simulate_images.CLUSTERS)
    readme = (ROOT / "README.md").read_text()
    assert all(f"{each}, " in readme for each in seconds)


def test_the_table_of_gains_counts_the_seeds_of_the_recipes(monkeypatch):
    fewer = {folder: gains.measured(folder) for folder in gains.RECIPES}
    fewer["sft"][0]["runs"].pop()
    monkeypatch.setattr(gains, "measured", fewer.get)
    assert ", 2 or 3 of the recipes, " in Gains().whole()


def test_a_simulation_is_held_against_two_processes(tmp_path, data):
    words = [f"--{key}={value}" for key, value in data.items()]
    words += ["--steps=8", "--seeds=1", f"--output_dir={tmp_path}", "--quiet"]
    done = run_script(ROOT / "scripts/experiments/confirm_simulation.py", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith((tmp_path / "confirmed.md").read_text())
    pairs = json.loads((tmp_path / "confirmed.json").read_text())["runs"]
    assert [pair["pace"] for pair in pairs] == ["alike", "worker 1 at half speed"]
    for pair in pairs:
        assert sum(pair["steps"]) == 16
        assert pair["seconds"] > 0
        # The clock has the step times that were measured, and workers that share 16 steps end within one of each other.
        times = [machine["step_seconds"] for machine in pair["run"]["machines"]]
        together = 16 / sum(1 / each for each in times)
        assert together <= pair["simulated"]["seconds"] <= together + max(times)
