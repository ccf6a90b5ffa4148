"""The tasks: a network whose loss is measured, and a larger one whose time is measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_lsam import vision
from hf_lsam.batchnorm import reestimate
from recipes.common.image_batches import Batches, channel_statistics
from recipes.common.image_data import ImageSet
from scripts.benchmarks.step import SyntheticTokens

WORKERS = 2


class Images:
    """ResNet-20 on images; the learning rate rises for 5 % of the run and then follows a cosine."""

    def __init__(self, images: ImageSet, steps: int, batch: int, rate: float, rank: int, workers: int):
        torch.manual_seed(0)
        self.model = vision.create("resnet20", len(images.labels)).to(memory_format=torch.channels_last)
        self.optimizer = (torch.optim.SGD, {"lr": rate, "momentum": 0.9, "weight_decay": 5e-4})
        self.steps = steps
        mean, std = channel_statistics(images.train_images)
        self._train = Batches(
            images.train_images, images.train_labels, batch, mean, std, seed=0, rank=rank, world_size=workers
        )
        self._whole = Batches(images.train_images, images.train_labels, batch, mean, std, seed=0)
        self._held_out = Batches(images.eval_images, images.eval_labels, 250, mean, std, train=False)

    def batches(self) -> Iterator[Any]:
        for x, labels in itertools.chain.from_iterable(map(self._train.epoch, itertools.count())):
            yield x.contiguous(memory_format=torch.channels_last), labels

    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(forward(batch[0]), batch[1])

    def share_of_rate(self, step: int) -> float:
        warmup = max(1, self.steps // 20)
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * min(step, self.steps) / self.steps)) / 2

    @torch.no_grad()
    def evaluate(self, parameters: list[Tensor]) -> dict[str, float]:
        """Loss and accuracy at these parameters, with BatchNorm statistics from the same 16 batches for everybody."""
        for parameter, value in zip(self.model.parameters(), parameters, strict=True):
            parameter.copy_(value)
        reestimate(self.model, itertools.islice(self._whole.epoch(0), 16), lambda batch: self.model(batch[0]))
        self.model.eval()
        logits, labels = map(torch.cat, zip(*((self.model(x), y) for x, y in self._held_out), strict=True))
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        return {"loss": cross_entropy(logits, labels).item(), "accuracy": accuracy}


class Sentences:
    """MiniLM on random tokens, for measuring time."""

    def __init__(self, minilm: nn.Module, steps: int, batch: int, rate: float, rank: int, workers: int):
        torch.manual_seed(0)
        self.model = minilm
        self.optimizer = (torch.optim.AdamW, {"lr": rate})
        self.steps = steps
        rows = SyntheticTokens(batch * WORKERS, 32)
        own = [rows[index] for index in range(rank * batch, (rank + 1) * batch)]
        self._batch = {name: torch.stack([row[name] for row in own]) for name in own[0]}

    def batches(self) -> Iterator[Any]:
        return itertools.repeat(self._batch)

    def loss(self, forward: nn.Module, batch: Any) -> Tensor:
        return forward(**batch).loss

    def share_of_rate(self, step: int) -> float:
        return 1.0
