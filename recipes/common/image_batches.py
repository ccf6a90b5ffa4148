"""Batches of images in memory: permuted, augmented and normalised as whole batches on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, for pixels in [0, 1]; float32 [3] each.

    Args:
        images: uint8 [N, 3, H, W].
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(images[:, channel].flatten(), minlength=256).double().cpu() for channel in range(3)]
    shares = torch.stack([counts / counts.sum() for counts in shares])
    mean = shares @ levels
    std = (shares @ levels.square() - mean.square()).clamp(min=0).sqrt()
    return mean.float(), torch.where(std > 1e-6, std, 1.0).float()  # a channel that is the same everywhere becomes 0


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalises images to mean 0 and standard deviation 1, float32 [B, 3, H, W].

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: of every channel, for pixels in [0, 1]; float32 [3], on the images' device.
    """
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def augment(images: Tensor, generator: torch.Generator, pad: int | None = None, flip: bool = True) -> Tensor:
    """Shifts each image by up to `pad` pixels in each direction, padding with black, and mirrors half of them.

    Random crop and flip as on CIFAR in He et al. 2015, section 4.2, for the whole batch with a single gather.

    Args:
        images: uint8 [B, 3, H, W], on any device.
        generator: draws B vertical offsets in [0, 2 pad], B horizontal ones, and B bits for the flips, in this order.
        pad: in pixels; if None, an eighth of the height, which is 4 for 32.
        flip: whether to mirror.
    """
    batch, channels, height, width = images.shape
    pad = height // 8 if pad is None else pad
    drawn = [torch.randint(limit, (batch,), generator=generator, device=generator.device)
             for limit in (2 * pad + 1, 2 * pad + 1, 2)]  # fmt: skip
    down, right, mirrored = torch.stack(drawn).to(images.device, non_blocking=True)
    rows = torch.arange(height, device=images.device) + down[:, None]
    columns = torch.arange(width, device=images.device).expand(batch, width)
    if flip:
        columns = torch.where(mirrored[:, None].bool(), width - 1 - columns, columns)
    columns = columns + right[:, None]
    padded = F.pad(images, (pad, pad, pad, pad))
    numbers = torch.arange(batch, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[numbers, channel, rows[:, None, :, None], columns[:, None, None, :]]


class Batches:
    """Batches of images in memory, normalised, on the device.

    In training, every epoch is a new permutation that all workers share. Each worker takes its own part, with the same
    number of batches as the others, and draws its own augmentation. Images that do not fill a batch are left out of
    that epoch. In evaluation every worker gets all images in order.

    Args:
        images: uint8 [N, 3, H, W]; moved to `device` once.
        labels: int64 [N].
        batch_size: images per batch of this worker.
        mean, std: `channel_statistics` of the training images.
        seed: seed of permutations and augmentation.
        rank, world_size: this worker's number, and the number of workers.
        train: whether to permute and augment.
        pad, flip: see `augment`; `pad=0, flip=False` disables augmentation.

    Raises:
        ValueError: if there are too few images for one batch per worker.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: Tensor,
        std: Tensor,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        train: bool = True,
        pad: int | None = None,
        flip: bool = True,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        if train and len(images) < batch_size * world_size:
            raise ValueError(
                f"{len(images)} images do not make one batch of {batch_size} for each of {world_size} workers: there "
                "is nothing to train on. Use more images or a smaller batch size."
            )
        self.images, self.labels, self.mean, self.std = (value.to(device) for value in (images, labels, mean, std))
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.train, self.pad, self.flip = train, pad, flip
        self.epochs_begun = 0

    def __len__(self) -> int:
        if self.train:
            return len(self.images) // (self.batch_size * self.world_size)
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The next epoch."""
        self.epochs_begun += 1
        return self.epoch(self.epochs_begun - 1)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch: images, float32 [B, 3, H, W], and labels, int64 [B]."""
        if not self.train:
            for start in range(0, len(self.images), self.batch_size):
                batch = slice(start, start + self.batch_size)
                yield normalize(self.images[batch], self.mean, self.std), self.labels[batch]
            return
        order = torch.randperm(len(self.images), generator=generator_for("epoch", self.seed, number))
        share = order[self.rank :: self.world_size][: len(self) * self.batch_size].to(self.images.device)
        draws = generator_for("augment", self.seed, number, self.rank)
        for chosen in share.split(self.batch_size):
            images = augment(self.images[chosen], draws, self.pad, self.flip)
            yield normalize(images, self.mean, self.std), self.labels[chosen]


def generator_for(*purpose: object) -> torch.Generator:
    """A separate generator for each purpose, so that seed 0 in epoch 1 differs from seed 1 in epoch 0."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
