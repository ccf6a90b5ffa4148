"""Images that tests write."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image


def write_images(path: Path, count: int, seed: int) -> Path:
    """Squares of one colour each with noise; the colour is the label."""
    generator = torch.Generator().manual_seed(seed)
    labels = [number % 3 for number in range(count)]
    images = []
    for label in labels:
        pixels = torch.randint(0, 90, (16, 16, 3), generator=generator)
        pixels[:, :, label] += 150
        stream = io.BytesIO()
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(stream, "PNG")
        images.append({"bytes": stream.getvalue(), "path": None})
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)
    return path
