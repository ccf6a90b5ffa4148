"""CIFAR-10, CIFAR-100, SVHN or an image set of your own, in memory as uint8 tensors."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor
from torch.nn import functional as F

from recipes.common.configuration import fetching, resolve
from recipes.common.image_batches import generator_for
from recipes.common.image_formats import PickledArray, read_matlab, read_plain_pickle
from recipes.common.labels import natural_order

# The keys that say where each kind of data set is.
SOURCES = {
    "cifar10": ("data_dir",),
    "cifar100": ("data_dir",),
    "svhn": ("data_dir",),
    "parquet": ("data_dir", "train_file", "eval_file"),
    "folder": ("data_dir",),
    "hub": ("dataset_name",),
}
TUNING_SHARE = 0.1  # what `tuning` holds out where there is no validation_fraction
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp")


@dataclass
class ImageDataArguments:
    """Where the images come from, and which of them."""

    dataset: str = field(default="cifar10", metadata={"help": f"What is read: {', '.join(SOURCES)}."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the official files (or the archive), of parquet files, or of train/CLASS/*.png."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "For hub: a data set on the Hub, or a folder."})
    train_file: str | None = field(default=None, metadata={"help": "For parquet: the training images."})
    eval_file: str | None = field(default=None, metadata={"help": "For parquet: the images to evaluate on."})
    train_split: str = field(default="train", metadata={"help": "For hub: split to train on."})
    eval_split: str = field(default="test", metadata={"help": "For hub: split to evaluate on."})
    image_column: str = field(default="image", metadata={"help": "For parquet and hub: column of the images."})
    label_column: str = field(default="label", metadata={"help": "For parquet and hub: column of the labels."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels a side that images are scaled to at load."})
    max_train_images: int | None = field(default=None, metadata={"help": "Train on so many only, stratified."})
    max_eval_images: int | None = field(default=None, metadata={"help": "Evaluate on so many only, stratified."})
    validation_fraction: float = field(
        default=0.0,
        metadata={"help": "Evaluate on this part of the training split, held out; the test split is not even read."},
    )
    tuning: bool = field(
        default=False,
        metadata={"help": "Hold out a part of what is trained on instead: choose settings, evaluation images unseen."},
    )
    data_seed: int = field(default=0, metadata={"help": "Seed of these choices; the run's own seed leaves them alone."})

    @property
    def held_out_shares(self) -> list[float]:
        """The shares of the training split that are held out, each of what the one before has left; the last is
        evaluated on. If there are none, the test split is."""
        return [self.validation_fraction or TUNING_SHARE] * ((self.validation_fraction > 0) + self.tuning)


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Args:
        train_images, eval_images: uint8 [N, 3, H, W].
        train_labels, eval_labels: int64 [N], indices into `labels`.
        labels: the names of the classes.
    """

    train_images: Tensor
    train_labels: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    labels: list[str]


@dataclass(frozen=True)
class Split:
    """Images that are decoded only on demand.

    Args:
        source: the file or split, for messages.
        labels: the label of every image.
        decode: takes image indices and returns the images in several parts, uint8 [n, 3, H, W].
    """

    source: str
    labels: list[str]
    decode: Callable[[list[int]], Iterable[Tensor]]


def load_images(args: ImageDataArguments) -> ImageSet:
    """The training images and those to evaluate on.

    Raises:
        ValueError: if the data cannot be what was meant; the message names the file, what it holds, and the remedy.
    """
    _check(args)
    reader = {"svhn": _svhn, "parquet": _parquet, "folder": _folder, "hub": _hub}.get(args.dataset, _cifar)
    train, held_out, names = reader(args)
    names = names or sorted(set(train.labels), key=natural_order)
    train_labels = _number(train, names)
    chosen = _stratified(train_labels, args.data_seed)
    if held_out is not None:
        eval_labels = _number(held_out, names)
        eval_chosen = _stratified(eval_labels, args.data_seed)
    for share in args.held_out_shares:
        held = round(share * len(chosen))
        if not 1 <= held < len(chosen):
            raise ValueError(
                f"validation_fraction={share:g} would hold out {held} of {len(chosen)} images of {train.source}, which "
                "leaves one side empty. Give more images or another fraction."
            )
        held_out, eval_labels = train, train_labels
        eval_chosen, chosen = chosen[:held], chosen[held:]
    train_chosen = sorted(chosen[: args.max_train_images])
    eval_chosen = sorted(eval_chosen[: args.max_eval_images])
    images = _decode(train, train_chosen, args.image_size)
    eval_images = _decode(held_out, eval_chosen, args.image_size)
    if images.shape[1:] != eval_images.shape[1:]:
        raise ValueError(
            f"{train.source} has images of {_size(images)} pixels and {held_out.source} of {_size(eval_images)}. Set "
            "image_size to scale them all to one size."
        )
    return ImageSet(images, train_labels[train_chosen], eval_images, eval_labels[eval_chosen], names)


def _check(args: ImageDataArguments) -> None:
    if args.dataset not in SOURCES:
        raise ValueError(f"dataset must be one of {', '.join(SOURCES)}, got {args.dataset!r}.")
    takes = SOURCES[args.dataset]
    unused = [key for key in ("data_dir", "dataset_name", "train_file", "eval_file") if key not in takes]
    unused = [key for key in unused if getattr(args, key) is not None]
    if unused:
        raise ValueError(
            f"dataset={args.dataset} does not read {unused[0]}={getattr(args, unused[0])!r}: it would have no effect. "
            f"Take it out, or set dataset to one of {', '.join(k for k, v in SOURCES.items() if unused[0] in v)}."
        )
    if all(getattr(args, key) is None for key in takes):
        raise ValueError(f"dataset={args.dataset} needs {takes[0]}: {_wanted(args.dataset)}")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(f"validation_fraction must be in [0, 1), got {args.validation_fraction:g}.")
    for key in ("image_size", "max_train_images", "max_eval_images"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(args, key)}. Leave it out for no limit.")


def _wanted(dataset: str) -> str:
    """Which files to put where, for error messages."""
    if dataset in CIFAR:
        return (
            f"put {CIFAR[dataset].archive} of https://www.cs.toronto.edu/~kriz/cifar.html, or the folder "
            f"{CIFAR[dataset].folder} it unpacks to, into a folder and name that folder as data_dir."
        )
    return {
        "svhn": "put train_32x32.mat and test_32x32.mat (format 2 of http://ufldl.stanford.edu/housenumbers) into a "
        "folder and name it as data_dir.",
        "parquet": "name the files as train_file and eval_file, or a folder with train*.parquet and test*.parquet.",
        "folder": "put the images into train/CLASS/ and test/CLASS/ of a folder and name it as data_dir.",
        "hub": "name a data set on the Hub, or a folder that one was saved to.",
    }[dataset]


def _place(args: ImageDataArguments) -> Path:
    path = Path(resolve(args.data_dir)).expanduser()
    if not path.exists():
        raise ValueError(f"There is no {path} (data_dir). For {args.dataset}: {_wanted(args.dataset)}")
    return path


# --- which images ---


def _stratified(labels: Tensor, seed: int) -> list[int]:
    """All image indices in a random order in which every prefix has each class in proportion.

    Args:
        labels: int64 [N].
    """
    shuffled = torch.randperm(len(labels), generator=generator_for("images", seed))
    of_class = labels[shuffled]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in of_class.unique():
        here = of_class == label
        count = int(here.sum())
        place[here] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[place.argsort(stable=True)].tolist()


def _number(split: Split, names: list[str]) -> Tensor:
    """The labels as indices into `names`, int64 [N].

    Raises:
        ValueError: if there are no images, or if some labels are not in `names`.
    """
    numbers = {name: number for number, name in enumerate(names)}
    unseen = sorted(set(split.labels) - set(names), key=natural_order)
    if unseen:
        raise ValueError(
            f"{split.source} has labels that the training images never have: {', '.join(map(repr, unseen[:10]))} "
            f"(there: {', '.join(map(repr, names[:10]))}). No model could predict them. Take them out or add training "
            "images."
        )
    if not split.labels:
        raise ValueError(f"{split.source} has no images. Add some.")
    return torch.tensor([numbers[label] for label in split.labels])


def _decode(split: Split, chosen: list[int], size: int | None) -> Tensor:
    parts = [part if size is None else scale(part, size) for part in split.decode(chosen)]
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        sizes = ", ".join(sorted(f"{height}x{width}" for _, height, width in shapes)[:5])
        raise ValueError(f"{split.source} has images of several sizes: {sizes}. Set image_size to scale them to one.")
    return torch.cat(parts)


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"


def scale(images: Tensor, size: int) -> Tensor:
    """Scales the images to `size` pixels on the shorter side, bilinear and antialiased, and then takes their central
    squares: the order and the rounding are those of transformers' image processors.

    Args:
        images: uint8 [N, 3, H, W].
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    if side != size:
        height, width = int(size * height / side), int(size * width / side)
        scaled = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
        images = scaled.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - size) // 2, (width - size) // 2
    return images[..., top : top + size, left : left + size].contiguous()


# --- images as arrays: CIFAR and SVHN ---


@dataclass(frozen=True)
class Cifar:
    """The layout of the official archive of one of the two data sets."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    labels: str
    meta: str
    names: str


CIFAR = {
    "cifar10": Cifar(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test="test_batch",
        labels="labels",
        meta="batches.meta",
        names="label_names",
    ),
    "cifar100": Cifar(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test="test",
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
    ),
}


def _cifar(args: ImageDataArguments) -> tuple[Split, Split | None, list[str]]:
    layout = CIFAR[args.dataset]
    test = () if args.held_out_shares else (layout.test,)
    contents = _cifar_files(args, (layout.meta, *layout.train, *test))
    try:
        names = contents[layout.meta].get(layout.names)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{layout.meta} has no list of names at `{layout.names}`")
        parts = {name: _cifar_part(name, contents[name], layout, names) for name in (*layout.train, *test)}
    except ValueError as error:
        raise _damaged(args, layout.folder, error) from error
    splits = [_cifar_split(args, [parts[name] for name in group]) for group in (layout.train, test) if group]
    return splits[0], splits[1] if test else None, names


def _cifar_files(args: ImageDataArguments, wanted: Sequence[str]) -> dict[str, dict]:
    layout = CIFAR[args.dataset]
    place = _place(args)
    folder = place if (place / layout.meta).is_file() else place / layout.folder
    archive = place if place.is_file() else place / layout.archive
    found = {}
    try:
        if folder.is_dir():
            found = {name: (folder / name).read_bytes() for name in wanted if (folder / name).is_file()}
        elif archive.is_file():
            members = {f"{layout.folder}/{name}": name for name in wanted}
            with tarfile.open(archive) as tar:
                for member in tar:
                    if member.isfile() and member.name in members:
                        found[members[member.name]] = tar.extractfile(member).read()
        else:
            raise ValueError(f"{place} has neither {layout.archive} nor {layout.folder}: {_wanted(args.dataset)}")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise _damaged(args, archive, error) from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)} of {args.dataset}: {_wanted(args.dataset)}")
    contents = {}
    for name, data in found.items():
        try:
            contents[name] = read_plain_pickle(data)
        except ValueError as error:
            raise _damaged(args, f"{place} ({name})", error) from error
    return contents


def _damaged(args: ImageDataArguments, what: object, error: Exception) -> ValueError:
    return ValueError(f"{what} is damaged or not {args.dataset}: {error}. Fetch it again: {_wanted(args.dataset)}")


def _cifar_part(name: str, content: dict, layout: Cifar, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Images, uint8 [N, 3, 32, 32], and their labels."""
    data, labels = content.get("data"), content.get(layout.labels)
    if not isinstance(labels, list) or not all(isinstance(label, int) and 0 <= label < len(names) for label in labels):
        raise ValueError(f"the `{layout.labels}` of {name} are not numbers from 0 to {len(names) - 1}")
    values = data.values if isinstance(data, PickledArray) else None
    if values is None or values.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"the images of {name} are not {len(labels)} rows of 3,072 bytes, one for each label")
    return values.reshape(-1, 3, 32, 32), [names[label] for label in labels]


def _cifar_split(args: ImageDataArguments, parts: list[tuple[np.ndarray, list[str]]]) -> Split:
    images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
    return _of_array(args.dataset, images, [label for _, labels in parts for label in labels])


def _of_array(source: str, images: Tensor, labels: list[str]) -> Split:
    return Split(source, labels, lambda chosen: images[chosen].split(1024))


def _svhn(args: ImageDataArguments) -> tuple[Split, Split | None, list[str]]:
    place = _place(args)
    train = _svhn_split(args, place / "train_32x32.mat")
    test = None if args.held_out_shares else _svhn_split(args, place / "test_32x32.mat")
    return train, test, [str(digit) for digit in range(10)]


def _svhn_split(args: ImageDataArguments, path: Path) -> Split:
    if not path.is_file():
        raise ValueError(f"There is no {path}. For svhn: {_wanted('svhn')}")
    try:
        content = read_matlab(path.read_bytes())
        if not {"X", "y"} <= set(content):
            raise ValueError(f"its variables are {', '.join(content) or 'none'}, not X and y")
        images, labels = content["X"], content["y"].ravel()
        if images.dtype != np.uint8 or images.shape != (32, 32, 3, len(labels)):
            raise ValueError(f"X is {images.dtype} {images.shape}, not uint8 (32, 32, 3, {len(labels)})")
        if not np.isin(labels, range(1, 11)).all():
            raise ValueError("y has labels that are not from 1 to 10")
    except ValueError as error:
        raise _damaged(args, path, error) from error
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return _of_array(str(path), images, [str(int(label) % 10) for label in labels])  # label 10 is the digit 0


# --- images as encoded files: parquet, folders, the Hub ---


def _parquet(args: ImageDataArguments) -> tuple[Split, Split | None, list[str] | None]:
    train, names = _parquet_split(args, _parquet_files(args, "train_file", ("train",)))
    if args.held_out_shares:
        return train, None, names
    held_out, _ = _parquet_split(args, _parquet_files(args, "eval_file", ("test", "val")))
    return train, held_out, names


def _parquet_files(args: ImageDataArguments, key: str, prefixes: Sequence[str]) -> list[Path]:
    place = _place(args) if args.data_dir else Path()
    if getattr(args, key) is not None:
        path = place / Path(resolve(getattr(args, key))).expanduser()
        if not path.is_file():
            raise ValueError(f"There is no file {path} ({key}). For parquet: {_wanted('parquet')}")
        return [path]
    for prefix in prefixes if args.data_dir else ():
        if found := sorted(place.glob(f"{prefix}*.parquet")):
            return found
    where = f"{place} has no {' or '.join(f'{prefix}*.parquet' for prefix in prefixes)}" if args.data_dir else "no file"
    hint = "" if key == "train_file" else " Or hold out a part of the training images with validation_fraction."
    raise ValueError(f"{key} is not set and {where}. For parquet: {_wanted('parquet')}{hint}")


def _parquet_split(args: ImageDataArguments, paths: list[Path]) -> tuple[Split, list[str] | None]:
    source = ", ".join(map(str, paths))
    columns = [args.image_column, args.label_column]
    try:
        for path in paths:
            schema = pyarrow.parquet.read_schema(path)
            _require_columns(str(path), schema.names, args)
        table = pyarrow.concat_tables([pyarrow.parquet.read_table(path, columns=columns) for path in paths])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source} cannot be read as parquet: {error}. Write or fetch it again.") from error
    names = _class_names(schema.metadata, args.label_column)
    images = table.column(args.image_column)
    labels = _label_names(source, table.column(args.label_column).to_pylist(), names, args)
    return _of_cells(source, labels, lambda chosen: images.take(chosen).to_pylist(), args), names


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> list[str] | None:
    """The class names that the datasets library stores in the parquet files it writes; None if there are none."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _hub(args: ImageDataArguments) -> tuple[Split, Split | None, list[str] | None]:
    from datasets import load_dataset  # takes a second, which the other kinds of data need not wait for

    with fetching("dataset_name", args.dataset_name):
        splits = load_dataset(resolve(args.dataset_name))
    train, names = _hub_split(args, splits, "train_split")
    return train, None if args.held_out_shares else _hub_split(args, splits, "eval_split")[0], names


def _hub_split(args: ImageDataArguments, splits: dict[str, Any], key: str) -> tuple[Split, list[str] | None]:
    from datasets import ClassLabel, Image

    name = getattr(args, key)
    if name not in splits:
        raise ValueError(f"{args.dataset_name} has no split `{name}`, only {', '.join(splits)}. Set {key}.")
    source, split = f"{args.dataset_name} (split {name})", splits[name]
    _require_columns(source, split.column_names, args)
    feature = split.features[args.label_column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    labels = _label_names(source, list(split[args.label_column]), names, args)
    if isinstance(split.features[args.image_column], Image):
        split = split.cast_column(args.image_column, Image(decode=False))
    cells = lambda chosen: list(split.select(chosen)[args.image_column])  # noqa: E731
    return _of_cells(source, labels, cells, args), names


def _require_columns(source: str, columns: Sequence[str], args: ImageDataArguments) -> None:
    for key in ("image_column", "label_column"):
        if getattr(args, key) not in columns:
            raise ValueError(
                f"{source} has no column `{getattr(args, key)}`; its columns are {', '.join(map(repr, columns))}. Set "
                f"{key} to one of them."
            )


def _label_names(source: str, labels: list, names: list[str] | None, args: ImageDataArguments) -> list[str]:
    for number, label in enumerate(labels):
        if not isinstance(label, int if names else (int, str)) or (names and not 0 <= label < len(names)):
            raise ValueError(
                f"{source} has no usable label in column `{args.label_column}` at row {number + 1}: {label!r}. Each "
                f"must be {f'a number from 0 to {len(names) - 1}' if names else 'a string or an integer'}."
            )
    return [names[label] if names else str(label) for label in labels]


def _of_cells(source: str, labels: list[str], cells: Callable[[list[int]], list], args: ImageDataArguments) -> Split:
    def decode(chosen: list[int]) -> Iterator[Tensor]:
        for number, cell in zip(chosen, cells(chosen), strict=True):
            content = cell if isinstance(cell, bytes) else None
            if isinstance(cell, dict):
                content = cell.get("bytes") or cell.get("path")
            if not content:
                raise ValueError(
                    f"{source}: column `{args.image_column}` holds no encoded image at row {number + 1}. It must hold "
                    "bytes of PNG or JPEG files, or structs with a field `bytes`. Set image_column."
                )
            yield _open(content, f"row {number + 1} of {source}")

    return Split(source, labels, decode)


def _folder(args: ImageDataArguments) -> tuple[Split, Split | None, list[str]]:
    place = _place(args)
    train, names = _folder_split(place / "train")
    if args.held_out_shares:
        return train, None, names
    found = [place / name for name in ("test", "val", "validation") if (place / name).is_dir()]
    return train, _folder_split(found[0] if found else place / "test")[0], names


def _folder_split(folder: Path) -> tuple[Split, list[str]]:
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}. For folder: {_wanted('folder')} Without a test folder, hold out a part of "
            "the training images with validation_fraction."
        )
    classes = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: natural_order(path.name))
    files = [path for kind in classes for path in sorted(kind.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise ValueError(f"{folder} has no folders with images ({', '.join(IMAGE_SUFFIXES)}). {_wanted('folder')}")
    labels = [path.parent.name for path in files]
    return (
        Split(str(folder), labels, lambda chosen: (_open(files[number], str(files[number])) for number in chosen)),
        [path.name for path in classes],
    )


def _open(content: bytes | str | Path, source: str) -> Tensor:
    """One image as uint8 [1, 3, H, W]."""
    try:
        with Pillow.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ValueError(f"its mode is {image.mode!r}, and images of 8 bits a channel are read; convert it")
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))  # as transformers turns it
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ValueError(f"{source} is not an image that can be decoded: {error}. Mend it or take it out.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def write_example_images(folder: Path, size: int) -> Path:
    """Writes a small image set for `dataset: folder`: dark and light noise, `size` pixels a side, 12 + 6 of each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for name, level in (("dark", 60), ("light", 180)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = level + draw.integers(-50, 50, (size, size, 3))
                Pillow.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder
