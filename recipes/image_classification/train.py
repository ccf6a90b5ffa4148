"""A ViT or a timm model on images, through Trainer.

    accelerate launch --config_file recipes/accelerate.yaml recipes/image_classification/train.py \\
        --config recipes/image_classification/lsam.yaml --data_dir images [--key value ...]

The keys are the fields of `ModelArguments`, `DataArguments` (image_data.py) and `LSAMConfig`, which includes
`TrainingArguments`. All images are held in memory, as bytes, at the size that the model takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from transformers import AutoModelForImageClassification, CLIPImageProcessor, EvalPrediction

import hf_lsam.timm_models  # noqa: F401  registers its networks with timm
from hf_lsam import LSAMConfig
from recipes.common.arguments import MethodArguments, ScratchArguments, pick
from recipes.common.image_batches import channel_statistics, normalize
from recipes.common.image_data import ImageDataArguments, load_images
from recipes.common.methods import TRAINERS, build_trainer
from recipes.common.models import load_model
from recipes.common.run import begin, main, measured_run


@dataclass
class ModelArguments(ScratchArguments, MethodArguments):
    """Which model is trained, and how."""


@dataclass
class DataArguments(ImageDataArguments):
    """Where the images come from, and how they are augmented in training."""

    # TrainingArguments also has a `data_seed`, for the order of batches; here the choice of images has no key.
    data_seed: int = field(default=0, init=False)
    random_flip: bool = field(default=True, metadata={"help": "Mirror every second training image."})
    crop_padding: int = field(
        default=0, metadata={"help": "Pixels by which training images are padded before a crop at random."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Three numbers that normalise; default: of the training images."}
    )
    image_std: list[float] | None = field(default=None, metadata={"help": "Three more; see image_mean."})


class Images(Dataset):
    """Images and labels in the form that transformers' models take.

    Args:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].
        mean, std: float32 [3], for pixels in [0, 1].
        change: applied to an image, uint8 [3, H, W], whenever it is read.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, change=None):
        self._images, self._labels = images, labels
        self._mean, self._std, self._change = mean, std, change

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._images[index]
        image = image if self._change is None else self._change(image)
        return {"pixel_values": normalize(image[None], self._mean, self._std)[0], "labels": int(self._labels[index])}


PIPELINE_TAG = "image-classification"
KEYS = (ModelArguments, DataArguments, LSAMConfig)


def augmentation(args: DataArguments, size: tuple[int, int]) -> v2.Transform | None:
    """The augmentation of training images of `size` (height, width); None if there is none."""
    steps = [v2.RandomHorizontalFlip()] if args.random_flip else []
    if args.crop_padding:
        steps.append(v2.RandomCrop(size, padding=args.crop_padding))
    return v2.Compose(steps) if steps else None


def statistics_of(args: DataArguments, images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation for normalising, float32 [3] each.

    Raises:
        ValueError: if one of them is given without the other, or not for three channels.
    """
    given = (args.image_mean, args.image_std)
    if given == (None, None):
        return channel_statistics(images)
    if any(numbers is None or len(numbers) != 3 for numbers in given):
        raise ValueError(
            f"image_mean and image_std must be three numbers each, got {given[0]} and {given[1]}. Give both, "
            "those that the model was trained with, or neither."
        )
    return torch.tensor(given[0]), torch.tensor(given[1])


def image_processor(size: tuple[int, int], mean: Tensor, std: Tensor) -> CLIPImageProcessor:
    """The image processor saved with the model: it makes of any image what the model was evaluated on (see `scale`)."""
    height, width = size
    return CLIPImageProcessor(
        size={"shortest_edge": min(size)},
        crop_size={"height": height, "width": width},
        image_mean=mean.tolist(),
        image_std=std.tolist(),
        resample=2,
    )


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics`: the share of images whose most likely class is the right one."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run(values: dict[str, Any]) -> dict[str, Any] | None:
    """Trains, evaluates and saves; returns the results at worker 0, None at the others.

    Args:
        values: the value of every key, from `parse_configuration`.
    """
    data_args = pick(DataArguments, values)
    args = begin(values, TRAINERS)
    images = load_images(data_args)
    statistics = statistics_of(data_args, images.train_images)
    names = dict(enumerate(images.labels))
    changes: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    if values["model_name_or_path"]:
        changes["ignore_mismatched_sizes"] = True  # the pretrained head is for other classes
    model = load_model(values, AutoModelForImageClassification, **changes)
    # The model's loss is a mean over the micro-batch, whatever `num_items_in_batch` says.
    model.accepts_loss_kwargs = False
    size = tuple(images.train_images.shape[-2:])
    trainer, timer = build_trainer(
        values,
        args,
        TRAINERS,
        model=model,
        train_dataset=Images(images.train_images, images.train_labels, *statistics, augmentation(data_args, size)),
        eval_dataset=Images(images.eval_images, images.eval_labels, *statistics),
        processing_class=image_processor(size, *statistics),
        compute_metrics=accuracy,
    )
    facts = {
        "train_examples": len(images.train_labels),
        "eval_examples": len(images.eval_labels),
        "labels": images.labels,
    }
    return measured_run(trainer, timer, values, "accuracy", **facts)


if __name__ == "__main__":
    main(KEYS, run)
