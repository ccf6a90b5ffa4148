"""LSAM for one worker, written from the paper's equations in plain PyTorch, and the Trainer runs to compare with it.

The reference shares no code with the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from models import Rows, arguments, blobs, vector
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lsam import LSAMConfig, LSAMTrainer

# The paper's Algorithm 1 with all of its parts active.
LSAM = {
    "sam_rho": 0.1,
    "sync_steps": 4,
    "coupling": "decoupled",
    "coupling_strength": 0.5,
    "compensate_coupling": False,
    "anchor_lr": 0.8,
    "anchor_momentum_correction": 0.3,
}


def batches_of(rows: Rows, size: int = 8) -> list[dict[str, Tensor]]:
    """The rows in order, as batches."""
    chunks = [rows.rows[i : i + size] for i in range(0, len(rows), size)]
    return [{name: torch.stack([row[name] for row in chunk]) for name in chunk[0]} for chunk in chunks]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"])["logits"].float(), batch["labels"])


def reference(
    model: nn.Module,
    steps: list[list[dict[str, Tensor]]],
    make_optimizer: Callable,
    rho: float = 0.1,
    tau: int = 4,
    lambda0: float = 0.5,
    anchor_lr: float = 0.8,
    beta: float = 0.3,
    eps: float = 1e-12,
    clip: float | None = None,
    make_scheduler: Callable | None = None,
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] = mean_loss,
    loss_weight: Callable[[list], float] = lambda micro: 1 / len(micro),
    perturbs: Callable[[int], bool] = lambda step: True,
    ascent_rows: int | None = None,
    ascent_weight: float = 1.0,
    adaptive: bool = False,
    context: Callable = contextlib.nullcontext,
    coupling: str = "decoupled",
    direction: str = "gradient",
) -> SimpleNamespace:
    """LSAM with one worker: Algorithm 1 with SAM on each micro-batch, in plain PyTorch.

    Args:
        steps: the micro-batches of each optimizer step.
        loss_weight: the factor of each micro-batch's `loss_of`; in pass 1 there is also the factor `ascent_weight`.

    Returns:
        for each step: loss, sharpness, gradient norm, drift, x and y; and the final anchor with its version.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def flat() -> Tensor:
        return torch.cat([p.detach().flatten() for p in parameters])

    def put(values: Tensor) -> None:
        with torch.no_grad():
            nn.utils.vector_to_parameters(values, parameters)

    def gradient(batch: dict[str, Tensor], weight: float) -> tuple[list[Tensor], float]:
        with context():
            loss = loss_of(model, batch) * weight
        return list(torch.autograd.grad(loss, parameters)), loss.item()

    optimizer = make_optimizer(parameters)
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    handed_in, came = flat(), None
    y, total, in_total, previous, version = flat(), torch.zeros_like(flat()), 0, None, 0
    seen = SimpleNamespace(loss=[], sharpness=[], norm=[], drift=[], x=[], y=[])
    model.train()
    for number, micro in enumerate(steps):
        weight = loss_weight(micro)
        accumulated = [torch.zeros_like(p) for p in parameters]
        loss, sharpness = 0.0, 0.0
        for batch in micro:
            x = [p.detach().clone() for p in parameters]
            if rho and direction != "gradient":
                if direction == "momentum":  # MSAM: against the momentum
                    known = [optimizer.state[p].get("momentum_buffer") for p in parameters]
                    known = None if known[0] is None else [-v for v in known]
                else:  # FedLESAM: back along the anchor's last move
                    known = None if came is None else came.split([p.numel() for p in parameters])
                if known is not None:
                    norm = torch.cat([u.flatten() for u in known]).norm()
                    with torch.no_grad():
                        for p, u in zip(parameters, known, strict=True):
                            p.add_(rho * u.view_as(p) / (norm + eps))
                second, loss_1 = gradient(batch, weight)
                with torch.no_grad():
                    for p, kept in zip(parameters, x, strict=True):
                        p.copy_(kept)
                loss += loss_1
            elif rho and perturbs(number):
                part = batch if ascent_rows is None else {k: v[:ascent_rows] for k, v in batch.items()}
                rng = torch.get_rng_state()
                first, loss_1 = gradient(part, weight * ascent_weight)
                torch.set_rng_state(rng)
                units = [p.abs() + 0.01 if adaptive else torch.ones_like(p) for p in x]
                scaled = [u * g for u, g in zip(units, first, strict=True)]
                norm = torch.cat([g.flatten() for g in scaled]).norm()
                with torch.no_grad():
                    for p, u, g in zip(parameters, units, scaled, strict=True):
                        p.add_(rho * u * g / (norm + eps))
                second, loss_2 = gradient(batch, weight)
                with torch.no_grad():
                    for p, kept in zip(parameters, x, strict=True):
                        p.copy_(kept)
                sharpness += loss_2 - loss_1
                loss += loss_1 if ascent_rows is None else loss_2
            else:
                second, loss_1 = gradient(batch, weight)
                loss += loss_1
            accumulated = [a + g for a, g in zip(accumulated, second, strict=True)]
        norm = torch.cat([g.flatten() for g in accumulated]).norm().item()
        if clip is not None and norm > clip:
            accumulated = [g * (clip / (norm + 1e-6)) for g in accumulated]
        if coupling == "score":
            strength = lambda0 / (optimizer.param_groups[0]["lr"] * tau)
            away = (flat() - y).split([p.numel() for p in parameters])
            accumulated = [g + strength * a.view_as(g) for g, a in zip(accumulated, away, strict=True)]
        for p, g in zip(parameters, accumulated, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        if coupling == "decoupled":
            put(flat() - lambda0 / tau * (flat() - y))
        total, in_total = total + (flat() - y), in_total + 1
        if in_total == tau:
            mean = handed_in - flat() if coupling == "merge" else -total / tau
            before, y = y, y - anchor_lr * (mean if previous is None else mean + beta * (mean - previous))
            came = before - y
            if coupling == "merge":
                put(flat() + lambda0 * (y - flat()))
                handed_in = flat()
            total, in_total, previous, version = torch.zeros_like(y), 0, mean, version + 1
        seen.loss.append(loss)
        seen.sharpness.append(sharpness)
        seen.norm.append(norm)
        seen.drift.append(((flat() - y).norm() / y.norm()).item())
        seen.x.append(flat())
        seen.y.append(y)
    if in_total:
        mean = handed_in - flat() if coupling == "merge" else -total / tau
        y, version = y - anchor_lr * (mean if previous is None else mean + beta * (mean - previous)), version + 1
    seen.final_anchor, seen.version = y, version
    return seen


def sgd(lr: float = 0.05, **keywords) -> Callable:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, **keywords)


class Recorder(TrainerCallback):
    """Keeps x and y after every step."""

    def __init__(self):
        self.x, self.y, self.trainer = [], [], None  # the trainer is set by the code that builds it

    def on_step_end(self, args, state, control, model=None, **keywords):
        self.x.append(vector(model))
        self.y.append(self.trainer.worker.anchor.clone())


def train(output_dir, model, rows=None, kind=LSAMTrainer, resume=None, **fields) -> LSAMTrainer:
    """A finished run of `LSAMTrainer` with `LSAM` and `fields`; its steps are in `trainer.recorder`."""
    trainer_fields = {
        name: fields.pop(name)
        for name in ("eval_dataset", "compute_metrics", "callbacks", "compute_loss_func", "optimizers")
        if name in fields
    }
    args = arguments(LSAMConfig, output_dir, **{**LSAM, **fields})
    trainer = kind(model=model, args=args, train_dataset=blobs() if rows is None else rows, **trainer_fields)
    trainer.recorder = Recorder()
    trainer.recorder.trainer = trainer
    trainer.add_callback(trainer.recorder)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_plain(output_dir, model, rows=None, kind=Trainer, **fields) -> Trainer:
    args = arguments(TrainingArguments, output_dir, **fields)
    trainer = kind(model=model, args=args, train_dataset=blobs() if rows is None else rows)
    trainer.train()
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def assert_same_run(trainer: LSAMTrainer, expected: SimpleNamespace, rtol: float = 1e-5, atol: float = 2e-6) -> None:
    """Asserts that every step's x and y, and the final ones, are the reference's."""
    assert len(trainer.recorder.x) == len(expected.x)
    for ours, theirs in zip(trainer.recorder.x, expected.x, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    for ours, theirs in zip(trainer.recorder.y, expected.y, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    torch.testing.assert_close(vector(trainer.model), expected.final_anchor, rtol=rtol, atol=atol)
    with trainer.local():
        torch.testing.assert_close(vector(trainer.model), expected.x[-1], rtol=rtol, atol=atol)
    assert trainer.worker_summary()["anchor_version"] == expected.version
