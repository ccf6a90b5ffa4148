"""A small network with a custom training loop, used by several tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hf_lsam import LSAM

LSAM_FIELDS = {"sam_rho": 0.1, "sync_steps": 4, "coupling_strength": 0.5}


class Network(nn.Module):
    def __init__(self, normalised: bool = False):
        super().__init__()
        norm = nn.BatchNorm1d(16) if normalised else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(6, 16), norm, nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return logits if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def network(normalised: bool = False) -> Network:
    torch.manual_seed(0)
    return Network(normalised)


def data(size: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())


def batches(steps: int, size: int = 8):
    x, labels = data().tensors
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(x), (size,), generator=generator)
        yield x[rows], labels[rows]


def train(model, optimizer, steps=24, **options):
    lsam = LSAM(model, optimizer, **{**LSAM_FIELDS, **options})
    losses = []
    torch.manual_seed(5)
    with lsam:
        for x, labels in batches(steps):
            losses.append(lsam.step(lambda x=x, labels=labels: nn.functional.cross_entropy(model(x), labels)))
        own = lsam.worker.own_parameters
    return lsam, own, torch.stack(losses)
