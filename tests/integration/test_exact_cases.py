"""The cases in which LSAM must coincide with something known exactly."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest
import torch
from launch import TESTS
from lockstep import SYNC_STEPS, LockstepProblem, digest, initial_parameters
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer
from hf_lsam.algorithms import ServerSettings, WorkerSettings
from hf_lsam.coupling import add_coupling_to_gradient, add_langevin_noise, anchor_lr_bound, couple_and_accumulate
from hf_lsam.sam import perturb, restore
from hf_lsam.server.core import ServerCore
from hf_lsam.server.lifetime import start_server
from hf_lsam.transport.in_process import InProcessLink
from hf_lsam.transport.mailbox import RunFolder
from hf_lsam.worker import Worker

FIXED = {
    "per_device_train_batch_size": 8,
    "max_steps": 24,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "use_cpu": True,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "seed": 3,
}


class Classifier(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)).to(dtype)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Quadratic(nn.Module):
    """f(x) = 1/2 (x - mu)' A (x - mu), whatever the batch."""

    def __init__(self, a, mu):
        super().__init__()
        self.register_buffer("a", a)
        self.register_buffer("mu", mu)
        self.x = nn.Parameter(torch.zeros_like(mu))

    def forward(self, labels):
        offset = self.x - self.mu
        return {"loss": 0.5 * offset @ self.a @ offset}


def classification_data(dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(96, 6, generator=generator, dtype=dtype)
    labels = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    return [{"x": row, "labels": label} for row, label in zip(x, labels, strict=True)]


def trained_worker(model, data, tmp_path, **fields):
    """x after training, as float64 tensors."""
    trainer = LSAMTrainer(model=model, args=LSAMConfig(output_dir=tmp_path, **{**FIXED, **fields}), train_dataset=data)
    trainer.train()
    with trainer.local():
        return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_1_without_sam_and_coupling_a_worker_is_the_plain_trainer(tmp_path, optim):
    data = classification_data()
    torch.manual_seed(0)
    plain = Classifier()
    torch.manual_seed(0)
    ours = Classifier()
    args = TrainingArguments(output_dir=tmp_path, **{**FIXED, "optim": optim, "max_grad_norm": 0.5})
    Trainer(model=plain, args=args, train_dataset=data).train()
    x = trained_worker(
        ours, data, tmp_path, sam_rho=0.0, coupling_strength=0.0, sync_steps=4, optim=optim, max_grad_norm=0.5
    )
    assert all(torch.equal(a, b) for a, b in zip(x, plain.parameters(), strict=True))


def test_2_without_coupling_a_worker_is_sam_on_a_quadratic(tmp_path):
    a = torch.tensor([[2.0, 0.3], [0.3, 0.5]])
    mu = torch.tensor([1.0, -2.0])
    x = torch.zeros(2, dtype=torch.float64)
    rho, eta = 0.4, FIXED["learning_rate"]
    for _ in range(FIXED["max_steps"]):
        gradient = a.double() @ (x - mu.double())
        x = x - eta * a.double() @ (x + rho * gradient / gradient.norm() - mu.double())
    data = [{"labels": torch.tensor(0)}] * 96
    (ours,) = trained_worker(
        Quadratic(a, mu), data, tmp_path, sam_rho=rho, coupling_strength=0.0, sync_steps=4, optim="sgd"
    )
    torch.testing.assert_close(ours.double(), x, rtol=1e-5, atol=1e-6)


def test_2_without_coupling_a_worker_is_sam_on_a_small_network(tmp_path):
    """In float64, against SAM written with plain autograd, clones and subtraction."""
    data = classification_data(torch.float64)
    torch.manual_seed(0)
    reference = Classifier(torch.float64)
    torch.manual_seed(0)
    ours = Classifier(torch.float64)
    reference.layers[2].p = ours.layers[2].p = 0.0
    rho, eta = 0.1, FIXED["learning_rate"]

    batches = []

    class Recorder(LSAMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, num_items_in_batch)

    args = LSAMConfig(
        output_dir=tmp_path, **{**FIXED, "optim": "sgd"}, sam_rho=rho, coupling_strength=0.0, sync_steps=4
    )
    trainer = Recorder(model=ours, args=args, train_dataset=data)
    trainer.train()

    for batch in batches:
        parameters = list(reference.parameters())
        gradients = torch.autograd.grad(reference(**batch)["loss"], parameters)
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter += rho * gradient / norm
        second = torch.autograd.grad(reference(**batch)["loss"], parameters)
        with torch.no_grad():
            for parameter, gradient, step in zip(parameters, gradients, second, strict=True):
                parameter -= rho * gradient / norm + eta * step
    assert len(batches) == FIXED["max_steps"]
    # The worker's x is kept in float32 between the end of training and `local()`.
    with trainer.local():
        for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


# --- 3: the sampler draws from q(x | y), and the anchor finds the mode ---

A = torch.tensor([[1.5, 0.4], [0.4, 0.8]])
MU = torch.tensor([1.0, -1.0])
ETA, TAU, LAMBDA = 0.01, 4, 2.0
COUPLING = LAMBDA * ETA * TAU  # lambda0, since lambda = lambda0 / (eta tau)


def test_3_the_sampler_has_the_mean_and_covariance_of_the_coupled_gaussian():
    """rho = 0, T = 1, y fixed: mean of x - y is (A + lambda I)^-1 A (mu - y), covariance (A + lambda I)^-1."""
    generator = torch.Generator().manual_seed(0)
    chains = 40_000
    y = torch.tensor([-0.5, 0.5]).expand(chains, 2).contiguous()
    x = y.clone()
    total = torch.zeros_like(x)
    for step in range(700):
        x -= ETA * (x - MU) @ A
        add_langevin_noise(x, ETA, 1.0, generator)
        if step == 500:  # burnt in: the slowest mode has decayed by exp(-500 * 0.01 * 2.6)
            total.zero_()
        couple_and_accumulate([x], [y], [total], COUPLING / TAU)
    precision = A + LAMBDA * torch.eye(2)
    expected_mean = torch.linalg.solve(precision, A @ (MU - y[0]))
    expected_covariance = torch.linalg.inv(precision)
    # 40,000 chains: standard error 0.003 for the mean, 0.7 % for a variance; the step size adds a bias of about 2 %.
    torch.testing.assert_close((total / 199).mean(0), expected_mean, rtol=0.02, atol=0.01)
    torch.testing.assert_close(torch.cov(x.T), expected_covariance, rtol=0.06, atol=0.01)


def test_3_the_anchor_tends_to_the_mode():
    generator = torch.Generator().manual_seed(1)
    chains = 500  # independent copies of the problem, side by side in one worker
    x = nn.Parameter(torch.zeros(chains, 2))
    core = ServerCore(torch.zeros(chains * 2), ServerSettings(TAU, anchor_lr=0.2, anchor_momentum_correction=0.3))
    worker = Worker([("x", x)], InProcessLink(core), WorkerSettings(TAU, COUPLING, "decoupled"))
    late = []
    for step in range(6000):
        with torch.no_grad():
            x -= ETA * (x - MU) @ A
        add_langevin_noise(x, ETA, 1.0, generator)
        worker.after_optimizer_step([ETA])
        if step >= 3000 and step % 50 == 0:
            late.append(worker.anchor.view(chains, 2).mean(0))
    torch.testing.assert_close(torch.stack(late).mean(0), MU, rtol=0, atol=0.05)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_3_with_sam_the_sampler_agrees_with_numerical_integration(rho):
    """One dimension, f = x^2 / 2: SAM's score is -(x + rho sign x), so f_SAM = x^2 / 2 + rho |x|."""
    generator = torch.Generator().manual_seed(2)
    eta, strength, anchor = 0.05, 1.0, 1.5
    x = nn.Parameter(torch.zeros(1))
    y = torch.tensor([anchor])
    samples = []
    for step in range(60_000):
        x.grad = x.detach().clone()
        moved = perturb([x], rho)
        gradient = x.detach().clone()
        restore(moved)
        x.grad = gradient
        add_coupling_to_gradient(x, y, strength)
        with torch.no_grad():
            x -= eta * x.grad
        add_langevin_noise(x, eta, 1.0, generator)
        if step >= 500:
            samples.append(x.item())
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2 - rho * grid.abs() - strength * (grid - anchor) ** 2 / 2)
    density /= density.sum()
    mean = (grid * density).sum()
    deviation = ((grid - mean) ** 2 * density).sum().sqrt()
    samples = torch.tensor(samples, dtype=torch.float64)
    # About 60,000 * eta * (1 + lambda) / 2 = 3,000 independent samples: standard error 0.013.
    assert samples.mean().item() == pytest.approx(mean.item(), abs=0.06)
    assert samples.std().item() == pytest.approx(deviation.item(), rel=0.07)


# --- 4: processes in lock step are their simulation ---


def test_4_processes_in_lock_step_are_one_process_that_simulates_them_bit_for_bit(tmp_path):
    workers, rounds = 3, 5
    orders = list(itertools.islice(itertools.permutations(range(workers)), rounds))
    settings = ServerSettings(SYNC_STEPS, anchor_lr=0.8, anchor_momentum_correction=0.3)

    core = ServerCore(torch.cat([p.detach().flatten() for p in initial_parameters()]), settings)
    problems = [LockstepProblem(rank) for rank in range(workers)]
    simulated = [
        problem.make_worker(InProcessLink(core, rank), WorkerSettings(SYNC_STEPS))
        for rank, problem in enumerate(problems)
    ]
    for order in orders:
        for rank in order:
            problems[rank].run_period(simulated[rank])
        for worker in simulated:
            worker.pull_newest()
    expected = [digest(problem.parameters, worker.anchor) for problem, worker in zip(problems, simulated, strict=True)]

    path = tmp_path / "run"
    path.mkdir()
    layout = simulated[0].layout
    run = {"fingerprint": layout.fingerprint.hex(), "settings": settings.as_dict()}
    folder = RunFolder.create(
        path, torch.cat([p.detach().flatten() for p in initial_parameters()]), workers, layout.manifest, run
    )
    server = start_server(folder.path, tmp_path / "server.log")
    script = TESTS / "lockstep.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(path), str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(workers)
    ]

    def ask(rank: int, request: str):
        processes[rank].stdin.write(request + "\n")
        processes[rank].stdin.flush()

    def answer(rank: int):
        return json.loads(processes[rank].stdout.readline())

    try:
        assert [answer(rank) for rank in range(workers)] == ["joined"] * workers
        for order in orders:
            for rank in order:
                ask(rank, "period")
                assert answer(rank) == "pushed"
            for rank in range(workers):
                ask(rank, "pull")
                answer(rank)
        for rank in range(workers):
            ask(rank, "digest")
        assert [answer(rank) for rank in range(workers)] == expected
    finally:
        for process in processes:
            process.stdin.close()
            process.wait(20)
            process.stdout.close()
        server.wait(20)
    assert not path.exists()


# --- 5, 6, 7: the server ---


@pytest.mark.parametrize("workers", [1, 2, 5, 16, 64])
def test_5_the_order_of_arrival_changes_the_anchor_by_rounding_only(workers):
    generator = torch.Generator().manual_seed(workers)
    pushes = [torch.randn(1000, generator=generator) for _ in range(workers)]

    def anchor_after(order):
        core = ServerCore(torch.zeros(1000), ServerSettings(4))
        for worker in range(workers):
            core.join(worker)
        for period in range(3):
            for worker in order:
                core.push(pushes[worker] * (period + 1), 4)
        assert core.anchor.version == 3
        return core.anchor.vector

    reference = anchor_after(range(workers))
    shuffled = list(range(workers))
    random.Random(0).shuffle(shuffled)
    for order in (reversed(range(workers)), shuffled):
        rounding = workers * torch.finfo(torch.float32).eps
        torch.testing.assert_close(anchor_after(list(order)), reference, rtol=8 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("coupling_strength", [0.1, 0.9, 4.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_6_the_offset_contracts_inside_the_stability_bound_and_grows_outside(coupling_strength, beta, momentum):
    sync_steps = 16
    bound = anchor_lr_bound(coupling_strength, sync_steps, beta, momentum)

    def offset_after(lr: float) -> float:
        x = nn.Parameter(torch.ones(1))
        optimizer = "nesterov" if momentum else "sgd"
        core = ServerCore(torch.zeros(1), ServerSettings(sync_steps, lr, beta, optimizer, momentum))
        worker = Worker([("x", x)], InProcessLink(core), WorkerSettings(sync_steps, coupling_strength, "decoupled"))
        for _ in range(250 * sync_steps):
            worker.after_optimizer_step([0.0])
        return (x.detach() - worker.anchor).abs().item()

    assert offset_after(0.95 * bound) < 0.2
    assert not offset_after(1.05 * bound) < 5.0  # or NaN


def test_6_the_bound_says_what_a_prototype_saw():
    assert anchor_lr_bound(0.1, 16, 0.9) == pytest.approx(0.72, abs=0.005)
    assert anchor_lr_bound(0.9, 16, 0.9) == pytest.approx(0.79, abs=0.005)


def test_7_with_differences_at_the_last_step_only_lsam_is_elastic_averaging():
    """EASGD (arXiv 1412.6651), equations 5 and 6 with communication period tau:

        x_i <- x_i - alpha (x_i - y)        y <- (1 - beta) y + beta mean_i x_i

    With the coupling c = alpha at the last step of a period, the pushed difference is (1 - alpha)(x_i - y), so the
    anchor's step size is eta' = beta / (1 - alpha).
    """
    generator = torch.Generator().manual_seed(5)
    workers, tau, alpha, beta, eta = 4, 5, 0.2, 0.6, 0.1
    targets = torch.randn(workers, 7, generator=generator)
    x = torch.randn(workers, 7, generator=generator)
    expected_x, expected_y = x.double(), torch.zeros(7, dtype=torch.float64)

    ours = list(x.clone())
    core = ServerCore(torch.zeros(7), ServerSettings(1, anchor_lr=beta / (1 - alpha), anchor_momentum_correction=0.0))
    for worker in range(workers):
        core.join(worker)
    for _ in range(30):
        for _ in range(tau):
            expected_x -= eta * (expected_x - targets.double())
            for worker in range(workers):
                ours[worker] -= eta * (ours[worker] - targets[worker])
        elastic = expected_x - expected_y
        expected_y = (1 - beta) * expected_y + beta * expected_x.mean(0)
        expected_x = expected_x - alpha * elastic

        y = core.anchor.vector.clone()
        for worker in range(workers):
            difference = torch.zeros(7)
            couple_and_accumulate([ours[worker]], [y], [difference], alpha)
            core.push(difference, 1)
        torch.testing.assert_close(core.anchor.vector.double(), expected_y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(ours).double(), expected_x, rtol=1e-5, atol=1e-5)
