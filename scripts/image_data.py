"""CIFAR-10, CIFAR-100, SVHN or an image set of your own in memory as uint8 tensors, and batches of it on the device."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickletools
import struct
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
from configuration import resolve
from datasets import ClassLabel, DatasetDict, Image, load_dataset
from PIL import Image as Pillow
from torch import Tensor
from torch.nn import functional as F

# What each kind of data set takes to say where it lies.
SOURCES = {
    "cifar10": ("data_dir",),
    "cifar100": ("data_dir",),
    "svhn": ("data_dir",),
    "parquet": ("data_dir", "train_file", "eval_file"),
    "folder": ("data_dir",),
    "hub": ("dataset_name",),
}
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
    data_seed: int = field(default=0, metadata={"help": "Seed of these choices; the run's own seed leaves them alone."})


@dataclass(frozen=True)
class ImageSet:
    """Images in memory.

    Args:
        train_images, eval_images: uint8 [N, 3, H, W].
        train_labels, eval_labels: int64 [N], numbers of `labels`.
        labels: the names of the classes.
    """

    train_images: Tensor
    train_labels: Tensor
    eval_images: Tensor
    eval_labels: Tensor
    labels: list[str]


@dataclass(frozen=True)
class Split:
    """Images that are decoded only when asked for.

    Args:
        source: the file or split, for messages.
        labels: the label of every image.
        decode: the images of the given numbers, as uint8 [n, 3, H, W], some at a time.
    """

    source: str
    labels: list[str]
    decode: Callable[[list[int]], Iterable[Tensor]]


def load_images(args: ImageDataArguments) -> ImageSet:
    """The training images and those to evaluate on.

    Raises:
        ValueError: if the data cannot be what was meant; it names the file, what there is, the remedy.
    """
    _check(args)
    reader = {"svhn": _svhn, "parquet": _parquet, "folder": _folder, "hub": _hub}.get(args.dataset, _cifar)
    train, held_out, names = reader(args)
    names = names or sorted(set(train.labels), key=_natural)
    train_labels = _number(train, names)
    chosen = _stratified(train_labels, args.data_seed)
    if held_out is None:
        held = round(args.validation_fraction * len(chosen))
        if not 1 <= held < len(chosen):
            raise ValueError(
                f"validation_fraction={args.validation_fraction:g} would hold out {held} of {len(chosen)} images of "
                f"{train.source}, which leaves one side empty. Give more images or another fraction."
            )
        held_out, eval_labels = train, train_labels
        eval_chosen, chosen = chosen[:held], chosen[held:]
    else:
        eval_labels = _number(held_out, names)
        eval_chosen = _stratified(eval_labels, args.data_seed)
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
    """What to put where."""
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
    """All image numbers in random order, such that every beginning has each class in its share.

    Args:
        labels: int64 [N].
    """
    shuffled = torch.randperm(len(labels), generator=_generator("images", seed))
    of_class = labels[shuffled]
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in of_class.unique():
        here = of_class == label
        count = int(here.sum())
        place[here] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[place.argsort(stable=True)].tolist()


def _number(split: Split, names: list[str]) -> Tensor:
    """The labels as numbers of `names`, int64 [N]."""
    numbers = {name: number for number, name in enumerate(names)}
    unseen = sorted(set(split.labels) - set(names), key=_natural)
    if unseen:
        raise ValueError(
            f"{split.source} has labels that the training images never have: {', '.join(map(repr, unseen[:10]))} "
            f"(there: {', '.join(map(repr, names[:10]))}). No model could predict them. Take them out or add training "
            "images."
        )
    if not split.labels:
        raise ValueError(f"{split.source} has no images. Add some.")
    return torch.tensor([numbers[label] for label in split.labels])


def _natural(label: str) -> tuple[bool, int, str]:
    """Sorts "2" before "10"."""
    return (False, int(label), "") if label.isdecimal() else (True, 0, label)


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
    """Their central squares scaled to `size` pixels a side, bilinear and antialiased.

    Args:
        images: uint8 [N, 3, H, W].
    """
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    scaled = F.interpolate(square.float(), size=(size, size), mode="bilinear", antialias=True)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


# --- images as arrays: CIFAR and SVHN ---


@dataclass(frozen=True)
class Cifar:
    """How the official archive of one of the two sets is laid out."""

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
    test = () if args.validation_fraction else (layout.test,)
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
    test = None if args.validation_fraction else _svhn_split(args, place / "test_32x32.mat")
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


MATLAB_HEADER = 128
MATLAB_MATRIX, MATLAB_COMPRESSED = 14, 15
MATLAB_NUMBERS = {
    1: "<i1", 2: "<u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"
}  # fmt: skip


def read_matlab(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of numbers in a MATLAB 5 file, by name, of the types they are stored as.

    scipy reads more kinds of them, and may crash the process on a damaged one. Layout: MathWorks, MAT-File Format.

    Raises:
        ValueError: if it is damaged, of another version, or holds something other than arrays of real numbers.
    """
    if data[124:MATLAB_HEADER] != b"\x00\x01IM":
        raise ValueError("it does not begin as a MATLAB 5 file with little-endian numbers does")
    arrays = {}
    for kind, content in _matlab_elements(memoryview(data)[MATLAB_HEADER:]):
        if kind == MATLAB_COMPRESSED:
            try:
                ((kind, content),) = _matlab_elements(memoryview(zlib.decompress(content)))
            except zlib.error as error:
                raise ValueError(str(error)) from error
        parts = list(_matlab_elements(content)) if kind == MATLAB_MATRIX else []
        if len(parts) != 4 or parts[3][0] not in MATLAB_NUMBERS:
            raise ValueError("it holds something other than arrays of real numbers")
        _, (_, shape), (_, name), (number, values) = parts
        values = np.frombuffer(values, MATLAB_NUMBERS[number])
        sizes = np.frombuffer(shape, "<i4")
        if (sizes < 0).any() or math.prod(sizes.tolist()) != len(values):
            raise ValueError(f"an array has {len(values)} numbers, not {' x '.join(map(str, sizes))}")
        arrays[bytes(name).decode("latin-1")] = values.reshape(sizes, order="F")
    return arrays


def _matlab_elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element in turn."""
    position = 0
    while position < len(data):
        if len(data) - position < 8:
            raise ValueError("it ends in the middle of an element")
        kind, size = struct.unpack_from("<II", data, position)
        start = position + 8
        if kind >> 16:  # up to four bytes are packed into the second half of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, position + 4
        end = start + size
        if end > len(data) or (start < position + 8 < end):
            raise ValueError("it ends in the middle of an element")
        yield kind, data[start:end]
        position = end if kind == MATLAB_COMPRESSED else end + -end % 8


# --- images as encoded files: parquet, folders, the Hub ---


def _parquet(args: ImageDataArguments) -> tuple[Split, Split | None, list[str] | None]:
    train, names = _parquet_split(args, _parquet_files(args, "train_file", ("train",)))
    if args.validation_fraction:
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
    """The class names that the datasets library leaves in a parquet file, if it wrote it."""
    try:
        return json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return None


def _hub(args: ImageDataArguments) -> tuple[Split, Split | None, list[str] | None]:
    try:
        splits = load_dataset(resolve(args.dataset_name))
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"{args.dataset_name} cannot be loaded: {error}. For hub: {_wanted('hub')}") from error
    assert isinstance(splits, DatasetDict)
    train, names = _hub_split(args, splits, "train_split")
    return train, None if args.validation_fraction else _hub_split(args, splits, "eval_split")[0], names


def _hub_split(args: ImageDataArguments, splits: DatasetDict, key: str) -> tuple[Split, list[str] | None]:
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
    if args.validation_fraction:
        return train, None, names
    found = [place / name for name in ("test", "val", "validation") if (place / name).is_dir()]
    return train, _folder_split(found[0] if found else place / "test")[0], names


def _folder_split(folder: Path) -> tuple[Split, list[str]]:
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}. For folder: {_wanted('folder')} Without a test folder, hold out a part of "
            "the training images with validation_fraction."
        )
    classes = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: _natural(path.name))
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
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise ValueError(f"{source} is not an image that can be decoded: {error}. Mend it or take it out.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


# --- pickled data, read without unpickling ---


@dataclass(frozen=True)
class PickledName:
    """A function or class that a pickle names; it is never looked up."""

    module: str
    name: str


@dataclass
class PickledArray:
    """A numpy array that a pickle describes; `values` is None until its description is complete."""

    values: np.ndarray | None = None


ARRAY = [PickledName(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
DTYPE = PickledName("numpy", "dtype")
KNOWN_NAMES = [*ARRAY, DTYPE, PickledName("numpy", "ndarray")]
BYTES_DTYPE = object()
# The state of that dtype as numpy writes it: version, byte order, three for structured types, size, alignment, flags.
BYTES_DTYPE_STATE = (3, "|", None, None, None, -1, -1, 0)
MARK = object()
PUSHES = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE",
    "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_plain_pickle(data: bytes) -> dict:
    """A pickled dict of lists, strings, numbers and arrays of bytes.

    Nothing that it names is imported or called: pickletools takes the file apart into operations, and the few that
    describe data are interpreted here. Python 2's strings come as str, by latin-1.

    Raises:
        ValueError: if it is damaged, or holds or does anything else.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            if not _interpret(opcode.name, argument, stack, memo):
                raise ValueError(f"{opcode.name} {argument!r:.80} at byte {position} is more than data")
        (content,) = stack
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its operations make no sense ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    return content


def _interpret(operation: str, argument: Any, stack: list, memo: dict[int, Any]) -> bool:
    """Carries out one operation; False for one that is not known to be harmless."""
    if operation == "PROTO":
        return True
    if operation in PUSHES:
        stack.append(argument)
    elif operation in CONSTANTS:
        stack.append(CONSTANTS[operation])
    elif operation == "MARK":
        stack.append(MARK)
    elif operation in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if operation == "EMPTY_DICT" else [])
    elif operation in ("DICT", "LIST", "TUPLE"):
        items = _since_mark(stack)
        stack.append(_pairs(items) if operation == "DICT" else items if operation == "LIST" else tuple(items))
    elif operation in SHORT_TUPLES:
        count = SHORT_TUPLES[operation]
        items = [stack.pop() for _ in range(count)]
        stack.append(tuple(reversed(items)))
    elif operation in ("APPEND", "APPENDS"):
        items = [stack.pop()] if operation == "APPEND" else _since_mark(stack)
        _of_type(stack[-1], list).extend(items)
    elif operation in ("SETITEM", "SETITEMS"):
        items = [stack.pop(), stack.pop()][::-1] if operation == "SETITEM" else _since_mark(stack)
        _of_type(stack[-1], dict).update(_pairs(items))
    elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif operation in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif operation == "GLOBAL":
        name = PickledName(*argument.split(" ", 1))
        stack.append(name)
        return name in KNOWN_NAMES
    elif operation == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        if function in ARRAY:
            stack.append(PickledArray())
        elif function == DTYPE and arguments[0] in ("u1", "|u1"):
            stack.append(BYTES_DTYPE)
        else:
            return False
    elif operation == "BUILD":
        state = stack.pop()
        if isinstance(stack[-1], PickledArray):
            stack[-1].values = _array(state)
        else:
            return stack[-1] is BYTES_DTYPE and state == BYTES_DTYPE_STATE
    else:
        return False
    return True


def _since_mark(stack: list) -> list:
    start = len(stack) - 1 - stack[::-1].index(MARK)
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _pairs(items: list) -> dict:
    return dict(zip(items[::2], items[1::2], strict=True))


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} is no {kind.__name__}")
    return value


def _array(state: tuple) -> np.ndarray:
    """The array that numpy's state tuple (version, shape, dtype, Fortran order, bytes) describes."""
    _, shape, dtype, fortran, content = state
    if dtype is not BYTES_DTYPE:
        raise ValueError("it has an array of something other than bytes")
    content = content.encode("latin-1") if isinstance(content, str) else content
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


# --- batches on the device ---


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, of pixels in [0, 1]; float32 [3] each.

    Args:
        images: uint8 [N, 3, H, W].
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(images[:, channel].flatten(), minlength=256).double().cpu() for channel in range(3)]
    shares = torch.stack([counts / counts.sum() for counts in shares])
    mean = shares @ levels
    return mean.float(), (shares @ levels.square() - mean.square()).clamp(min=0).sqrt().float()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images with mean 0 and deviation 1, float32 [B, 3, H, W].

    Args:
        images: uint8 [B, 3, H, W].
        mean, std: of every channel, of pixels in [0, 1]; float32 [3], on the images' device.
    """
    return (images.float() / 255 - mean[:, None, None]) / std[:, None, None]


def augment(images: Tensor, generator: torch.Generator, pad: int | None = None, flip: bool = True) -> Tensor:
    """Each image shifted by up to `pad` pixels each way, black where it ends, and half of them mirrored.

    Random crop and flip as on CIFAR in He et al. 2015, section 4.2, of the whole batch with one gather.

    Args:
        images: uint8 [B, 3, H, W], on any device.
        generator: draws B vertical offsets in [0, 2 pad], B horizontal ones, and B bits for the flips, in this order.
        pad: pixels; an eighth of the height unless given, which is 4 of 32.
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

    In training, every epoch is a new permutation that all workers share; each takes its own part of it, as many batches
    as the others, and augments them by itself. What does not fill a batch is left out of that epoch. In evaluation
    every worker gets all images in order.

    Args:
        images: uint8 [N, 3, H, W]; moved to `device` once.
        labels: int64 [N].
        batch_size: images a batch of this worker.
        mean, std: as `channel_statistics` of the training images gives them.
        seed: of permutations and augmentation.
        rank, world_size: of this worker, and the number of workers.
        train: permute and augment.
        pad, flip: as `augment` takes them; `pad=0, flip=False` augments nothing.

    Raises:
        ValueError: if there are not enough images for one batch a worker.
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
        order = torch.randperm(len(self.images), generator=_generator("epoch", self.seed, number))
        share = order[self.rank :: self.world_size][: len(self) * self.batch_size].to(self.images.device)
        draws = _generator("augment", self.seed, number, self.rank)
        for chosen in share.split(self.batch_size):
            images = augment(self.images[chosen], draws, self.pad, self.flip)
            yield normalize(images, self.mean, self.std), self.labels[chosen]


def _generator(*purpose: object) -> torch.Generator:
    """A generator of its own for every purpose, so that seed 0 in epoch 1 is not seed 1 in epoch 0."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
