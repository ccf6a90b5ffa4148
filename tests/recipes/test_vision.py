"""hf_lsam/vision.py against the literature and timm; the image scripts on every format, and on broken ones."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image
from scipy.io import savemat
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

import hf_lsam.timm_models  # noqa: F401  registers its networks with timm
from hf_lsam import vision
from recipes.common import image_data
from recipes.common.image_batches import Batches, augment, channel_statistics, normalize
from recipes.common.image_data import ImageDataArguments, load_images
from recipes.common.image_formats import read_matlab, read_plain_pickle

SMALL = {"resnet20": 4, "vgg16": 8, "wrn_16_8": 2, "wrn_28_10": 2}


# --- the networks ---


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", 269_722),  # 0.27M in He et al., table 6
        ("vgg16", 14_724_042),  # 13 convolutions of 14,710,464 weights, BatchNorm, and 512 x 10 + 10
        ("wrn_16_8", 10_961_370),  # 11.0M in Zagoruyko and Komodakis, table 4
        ("wrn_28_10", 36_479_194),  # 36.5M there
    ],
)
def test_parameter_counts_are_those_of_the_literature(name, count):
    with torch.device("meta"):
        model = vision.create(name, 10)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", vision.NETWORKS)
def test_every_network_takes_images_of_16_pixels_and_more(name):
    model = vision.create(name, 7, width=SMALL[name], in_chans=1)
    for size in (16, 17, 32, 40):
        x = torch.randn(2, 1, size, size)
        assert model(x).shape == (2, 7)
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_convolutions_start_with_he_variance_and_the_shortcut_has_no_parameters():
    torch.manual_seed(0)
    model = vision.resnet20(width=32)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.kernel_size == (3, 3)  # no projection
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
    block = vision.BasicBlock(2, 4, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # the branch gives 0: what is left is the shortcut
    x = torch.rand(1, 2, 4, 4)
    expected = torch.cat([x[:, :, ::2, ::2], torch.zeros(1, 2, 2, 2)], dim=1)
    torch.testing.assert_close(block(x), expected)


def test_dropout_is_in_the_blocks_of_wide_resnets_and_before_the_layer_of_the_others():
    x = torch.randn(2, 3, 16, 16)
    for name in vision.NETWORKS:
        for rate, same in ((0.0, True), (0.5, False)):
            torch.manual_seed(0)
            model = vision.create(name, 5, width=SMALL[name], drop_rate=rate)
            assert torch.equal(model(x), model(x)) is same
            model.eval()
            assert torch.equal(model(x), model(x))
    wide = vision.wrn_16_8(width=2, drop_rate=0.5)
    assert not torch.equal(wide.forward_features(x), wide.forward_features(x))


@pytest.mark.parametrize("name", vision.NETWORKS)
def test_timm_builds_the_same_networks(name):
    torch.manual_seed(0)
    ours = vision.create(name, 5, width=SMALL[name])
    torch.manual_seed(0)
    theirs = timm.create_model(f"hf_lsam_{name}", num_classes=5, width=SMALL[name])
    for (a, p), (b, q) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert a == b
        assert torch.equal(p, q)
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (3, 32, 32)
    assert theirs.get_classifier() is theirs.head
    assert theirs.get_submodule(theirs.default_cfg["first_conv"]).in_channels == 3
    assert isinstance(theirs.get_submodule(theirs.default_cfg["classifier"]), torch.nn.Linear)
    x = torch.randn(2, 3, 32, 32)
    theirs.reset_classifier(3)
    assert theirs(x).shape == (2, 3)
    theirs.reset_classifier(0)
    assert theirs(x).shape == (2, theirs.num_features)
    theirs.reset_classifier(0, global_pool="")
    assert theirs(x).shape == theirs.forward_features(x).shape


def test_weights_that_there_are_not_are_not_made_up(tmp_path):
    with pytest.raises(ValueError, match=r"no pretrained weights for hf_lsam_resnet20.*overlay=\{'file': PATH\}"):
        timm.create_model("hf_lsam_resnet20", pretrained=True)
    trained = vision.resnet20(width=4)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    loaded = timm.create_model("hf_lsam_resnet20", pretrained=True, pretrained_cfg_overlay=overlay, width=4)
    assert torch.equal(loaded.head.weight, trained.head.weight)
    with pytest.raises(ValueError, match="global_pool='max' is not a pooling"):
        timm.create_model("hf_lsam_resnet20", global_pool="max")
    with pytest.raises(ValueError, match=r"num_classes=10 cannot take.*num_classes=0"):
        timm.create_model("hf_lsam_resnet20", global_pool="")


def test_transformers_wraps_saves_and_loads_them(tmp_path):
    config = TimmWrapperConfig(architecture="hf_lsam_resnet20", num_labels=4, model_args={"width": 4})
    model = TimmWrapperForImageClassification(config).eval()
    model.timm_model.init_weights()  # transformers draws weights of its own over those of the network
    assert model.timm_model.features[0].weight.std().item() == pytest.approx((2 / 36) ** 0.5, rel=0.3)
    x, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 3])
    output = model(pixel_values=x, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixel_values=x).logits, output.logits)


def test_create_also_builds_models_of_timm_and_lists_what_there_is():
    assert vision.create("test_resnet", 3).eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(ValueError, match=r"no network 'resnet21': neither here \(resnet20, vgg16.*resnet.*list_models"):
        vision.create("resnet21", 10)


def test_without_timm_the_module_imports_and_names_the_extra():
    script = (
        "import sys; sys.modules['timm'] = None\n"
        "from hf_lsam import vision\n"
        "assert vision.create('resnet20', 10, width=4).num_features == 16\n"
        "try: vision.create('resnet50', 10)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True)
    assert "pip install timm, or in a checkout of hf-lsam pip install -e '.[vision]'" in done.stdout
    assert not done.stderr


# --- the official files ---


def python2_pickle(content: dict) -> bytes:
    """A dict of strings, lists and arrays of bytes as Python 2's cPickle and its numpy wrote it, by protocol 2."""
    memo = [0]

    def put() -> bytes:
        memo[0] += 1
        return b"q" + bytes([memo[0]]) if memo[0] < 256 else b"r" + struct.pack("<I", memo[0])

    def integer(value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)

    def string(value: bytes) -> bytes:
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<I", len(value))
        return head + value + put()

    def value_of(value) -> bytes:
        if isinstance(value, np.ndarray):
            start = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
            start += b"K\x00\x85" + put() + string(b"b") + b"\x87" + put() + b"R" + put() + b"(K\x01"
            dtype = b"cnumpy\ndtype\n" + put() + string(b"u1") + b"K\x00K\x01\x87" + put() + b"R" + put()
            dtype += b"(K\x03" + string(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00t" + put() + b"b"
            shape = b"".join(integer(size) for size in value.shape) + b"\x86" + put()
            return start + shape + dtype + b"\x89" + string(value.tobytes()) + b"t" + put() + b"b"
        if isinstance(value, list):
            return b"]" + put() + b"(" + b"".join(value_of(item) for item in value) + b"e"
        return integer(value) if isinstance(value, int) else string(value.encode())

    pairs = b"".join(string(key.encode()) + value_of(value) for key, value in content.items())
    return b"\x80\x02}" + b"q\x00(" + pairs + b"u."


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)


def cifar_file(count: int, seed: int, key: str, classes: int, label: str) -> bytes:
    content = {
        "batch_label": label,
        key: [number % classes for number in range(count)],
        "data": pixels(count, seed).reshape(count, -1),
        "filenames": [f"image_{number}.png" for number in range(count)],
    }
    return python2_pickle(content)


def cifar_folder(root: Path, dataset: str, count: int = 6) -> Path:
    layout = image_data.CIFAR[dataset]
    classes = 10 if dataset == "cifar10" else 100
    folder = root / layout.folder
    folder.mkdir(parents=True)
    names = [f"class {number}" for number in range(classes)]
    (folder / layout.meta).write_bytes(python2_pickle({"num_vis": 3072, layout.names: names}))
    for seed, name in enumerate((*layout.train, layout.test)):
        (folder / name).write_bytes(cifar_file(count, seed, layout.labels, classes, f"training batch {seed} of 5"))
    return folder


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_as_a_folder_and_as_the_official_archive(tmp_path, dataset):
    layout = image_data.CIFAR[dataset]
    folder = cifar_folder(tmp_path / "folder", dataset, count=120)
    (tmp_path / "archived").mkdir()
    archive = tmp_path / "archived" / layout.archive
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, layout.folder)
    for place in (folder, folder.parent, archive, archive.parent):
        images = load_images(ImageDataArguments(dataset=dataset, data_dir=str(place)))
        expected = np.concatenate([pixels(120, seed) for seed in range(len(layout.train))])
        assert np.array_equal(images.train_images, expected)
        assert np.array_equal(images.eval_images, pixels(120, len(layout.train)))
        assert images.train_images.dtype == torch.uint8
        assert images.train_labels.dtype == torch.int64
        classes = len(images.labels)
        assert classes == (10 if dataset == "cifar10" else 100)
        assert images.labels[3] == "class 3"
        assert images.train_labels.tolist() == [n % classes for n in range(120)] * len(layout.train)
        assert images.eval_labels.tolist() == [n % classes for n in range(120)]


def test_the_reader_agrees_with_unpickling_whatever_protocol_wrote_the_data():
    content = {"names": ["a", "b", "a" * 300], "numbers": [0, 1, 300, 70_000, -5, 2**40], "none": None}
    content |= {"nested": {"x": (1, (2, 3), ()), "t": True}, "one": [1]}
    for protocol in (0, 1, 2):
        assert read_plain_pickle(pickle.dumps(content, protocol)) == content
    array = pixels(2, 0).reshape(2, -1)
    written = python2_pickle({"data": array, "labels": [1, 300]})
    assert np.array_equal(read_plain_pickle(written)["data"].values, array)
    assert np.array_equal(pickle.loads(written, encoding="latin1")["data"], array)  # the test's own writer is right


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path):
    folder = cifar_folder(tmp_path, "cifar10")
    mark = tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {mark}",)

    good = (folder / "data_batch_3").read_bytes()
    for evil in (
        pickle.dumps({"data": Evil()}, 0),
        pickle.dumps({"data": Evil()}, 2),
        pickle.dumps(Evil(), 4),
        good[:-1] + b"cposix\nsystem\nU\x04true\x85R0.",
        good.replace(b"cnumpy.core.multiarray\n_reconstruct", b"cnumpy.core.multiarray\nfromstring", 1),
        good.replace(b"U\x02u1", b"U\x02O8", 1),
        b"\x80\x02}(U\x01acnumpy\nndarray\nK\x05\x85Ru.",
    ):
        (folder / "data_batch_3").write_bytes(evil)
        with pytest.raises(ValueError, match=r"data_batch_3.*damaged or not cifar10.*more than data.*kriz/cifar"):
            load_images(ImageDataArguments(data_dir=str(tmp_path)))
        assert not mark.exists()


def test_missing_or_damaged_cifar_files_say_what_to_put_where(tmp_path):
    def load(place, dataset="cifar10"):
        load_images(ImageDataArguments(dataset=dataset, data_dir=None if place is None else str(place)))

    folder = cifar_folder(tmp_path, "cifar10")
    good = (folder / "data_batch_2").read_bytes()
    with pytest.raises(ValueError, match=r"cifar10 needs data_dir: put cifar-10-python\.tar\.gz of https://www\.cs"):
        load(None)
    with pytest.raises(ValueError, match=r"There is no .*nowhere.*put cifar-10-python\.tar\.gz"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither cifar-100-python\.tar\.gz nor cifar-100-python"):
        load(tmp_path, "cifar100")
    half = good[: len(good) // 2]
    for damaged in (half, good[:-2], b"", b"(.", b"a.", b"]e.", b"\x80\x02}(U\x01a.", b"<html>", b"\x80\x02]."):
        (folder / "data_batch_2").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data_batch_2.*is damaged or not cifar10.*Fetch it again"):
            load(tmp_path)
    whole_file = {"labels": [0, 9], "data": pixels(2, 0).reshape(2, -1)}
    for content, message in (
        (
            {**whole_file, "labels": [0, 10]},
            r"cifar-10-batches-py is damaged.*`labels` of data_batch_2 are not numb",
        ),
        ({**whole_file, "labels": [0]}, "images of data_batch_2 are not 1 rows of 3,072 bytes"),
        ({**whole_file, "data": pixels(2, 0).reshape(3, -1)}, "data_batch_2 are not 2 rows"),
        ({**whole_file, "data": "none"}, "data_batch_2 are not 2 rows"),
        ({"data": whole_file["data"]}, "`labels` of data_batch_2 are not"),
    ):
        (folder / "data_batch_2").write_bytes(python2_pickle(content))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    (folder / "data_batch_2").unlink()
    with pytest.raises(ValueError, match=r"lacks data_batch_2 of cifar10: put cifar-10-python"):
        load(tmp_path)
    (folder / "data_batch_2").write_bytes(good)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    whole = archive.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"not an archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tar\.gz is damaged or not cifar10"):
            load(archive)


def svhn_folder(root: Path) -> Path:
    for seed, split in enumerate(("train", "test")):
        images = pixels(20, seed).transpose(2, 3, 1, 0)
        labels = np.arange(20, dtype=np.uint8)[:, None] % 10 + 1
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": labels}, do_compression=True)
    return root


def test_svhn_label_10_is_the_digit_0(tmp_path):
    images = load_images(ImageDataArguments(dataset="svhn", data_dir=str(svhn_folder(tmp_path))))
    assert np.array_equal(images.train_images, pixels(20, 0))
    assert np.array_equal(images.eval_images, pixels(20, 1))
    assert images.labels == list("0123456789")
    assert images.eval_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2


@pytest.mark.parametrize("compressed", [True, False])
def test_matlab_files_are_read_as_scipy_wrote_them(tmp_path, compressed):
    draw = np.random.default_rng(0)
    arrays = {"a": draw.normal(size=(2, 3, 4)), "long_name": draw.normal(size=(5, 1)).astype(np.float32)}
    for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        arrays[code] = draw.integers(0, 100, (1, 3)).astype(code)
    savemat(tmp_path / "arrays.mat", arrays, do_compression=compressed)
    read = read_matlab((tmp_path / "arrays.mat").read_bytes())
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)


def test_missing_or_damaged_svhn_files_say_what_to_put_where(tmp_path):
    arguments = ImageDataArguments(dataset="svhn", data_dir=str(svhn_folder(tmp_path)))
    path = tmp_path / "test_32x32.mat"
    good = path.read_bytes()
    for damaged in (good[:3000], good[:60], b"", b"x" * 500, b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(500)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"test_32x32\.mat is damaged or not svhn.*housenumbers"):
            load_images(arguments)
    images = pixels(3, 0).transpose(2, 3, 1, 0)
    for content, message in (
        ({"X": images, "y": [[1], [2]]}, r"not uint8 \(32, 32, 3, 2\)"),
        ({"X": images, "y": [[0], [1], [2]]}, "not from 1 to 10"),
        ({"X": images}, "its variables are X, not X and y"),
        ({"X": images, "y": [[1.5], [2], [3]]}, "not from 1 to 10"),
        ({"X": images, "y": {"a": 1}}, "something other than arrays of real numbers"),
        ({"X": images, "y": np.array([1j, 2, 3])}, "something other than arrays of real numbers"),
    ):
        savemat(path, content)
        with pytest.raises(ValueError, match=message):
            load_images(arguments)
    path.unlink()
    with pytest.raises(ValueError, match=r"no .*test_32x32\.mat.*put train_32x32\.mat"):
        load_images(arguments)


# --- other image sets ---


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, count: int, seed: int, labels=None, plain: bool = False, metadata=None) -> Path:
    cells = [png(image) for image in pixels(count, seed)]
    cells = cells if plain else [{"bytes": cell, "path": None} for cell in cells]
    labels = [number % 5 for number in range(count)] if labels is None else labels
    table = pyarrow.table({"image": cells, "label": labels}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path)
    return path


NAMES = b'{"info": {"features": {"label": {"names": ["zero", "one", "two", "three", "four"], "_type": "ClassLabel"}}}}'


def test_parquet_folders_and_data_sets_of_the_hub_give_the_same_images(tmp_path):
    data, tree = tmp_path / "data", tmp_path / "tree"
    data.mkdir()
    train = write_parquet(data / "train-0.parquet", 20, 0)
    test = write_parquet(data / "test-0.parquet", 10, 1)
    plain = write_parquet(tmp_path / "plain.parquet", 20, 0, plain=True)
    for split, count, seed in (("train", 20, 0), ("val", 10, 1)):
        for number, image in enumerate(pixels(count, seed)):
            folder = tree / split / str(number % 5)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:02}.png").write_bytes(png(image))
    sources = [
        {"dataset": "parquet", "train_file": str(train), "eval_file": str(test)},
        {"dataset": "parquet", "data_dir": str(data)},
        {"dataset": "parquet", "data_dir": str(data), "train_file": str(plain)},
        {"dataset": "hub", "dataset_name": str(data)},
        {"dataset": "folder", "data_dir": str(tree)},
    ]
    by_class = [number for label in range(5) for number in range(label, 20, 5)]
    for source in sources:
        images = load_images(ImageDataArguments(**source))
        order = by_class if source["dataset"] == "folder" else list(range(20))
        assert np.array_equal(images.train_images, pixels(20, 0)[order])
        assert images.train_labels.tolist() == [number % 5 for number in order]
        assert sorted(images.eval_labels.tolist()) == sorted(n % 5 for n in range(10))
        assert images.labels == list("01234")


def test_class_names_come_from_the_file_or_from_the_labels(tmp_path):
    named = write_parquet(tmp_path / "named.parquet", 10, 0, metadata={b"huggingface": NAMES})
    images = load_images(ImageDataArguments(dataset="parquet", train_file=str(named), eval_file=str(named)))
    assert images.labels == ["zero", "one", "two", "three", "four"]
    assert images.eval_labels.tolist() == [0, 1, 2, 3, 4] * 2
    words = write_parquet(tmp_path / "words.parquet", 4, 0, labels=["10", "2", "dog", "cat"])
    images = load_images(ImageDataArguments(dataset="parquet", train_file=str(words), eval_file=str(words)))
    assert images.labels == ["2", "10", "cat", "dog"]
    assert images.train_labels.tolist() == [1, 0, 3, 2]


def test_only_the_images_that_are_kept_are_decoded_and_each_class_keeps_its_share(tmp_path):
    labels = [0] * 60 + [1] * 30 + [2] * 10
    path = write_parquet(tmp_path / "train.parquet", 100, 0, labels=labels)
    table = pyarrow.parquet.read_table(path)
    arguments = {"dataset": "parquet", "train_file": str(path), "eval_file": str(path)}
    images = load_images(ImageDataArguments(**arguments, max_train_images=20, max_eval_images=10))
    assert images.train_labels.bincount().tolist() == [12, 6, 2]
    assert images.eval_labels.bincount().tolist() == [6, 3, 1]
    again = load_images(ImageDataArguments(**arguments, max_train_images=20, max_eval_images=10))
    assert torch.equal(again.train_images, images.train_images)
    other = load_images(ImageDataArguments(**arguments, max_train_images=20, max_eval_images=10, data_seed=1))
    assert not torch.equal(other.train_images, images.train_images)
    kept = {image.tobytes() for image in images.train_images.numpy()}
    cells = [c if p.tobytes() in kept else {"bytes": b"broken", "path": None}
             for c, p in zip(table.column("image").to_pylist(), pixels(100, 0), strict=True)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table({"image": cells, "label": labels}), tmp_path / "broken.parquet")
    arguments["train_file"] = str(tmp_path / "broken.parquet")
    images = load_images(ImageDataArguments(**arguments, max_train_images=20))
    assert torch.equal(again.train_images, images.train_images)
    with pytest.raises(ValueError, match=r"row \d+ of .*broken\.parquet is not an image that can be decoded"):
        load_images(ImageDataArguments(**arguments))


def test_validation_images_are_held_out_of_training_and_the_test_files_are_not_read(tmp_path):
    folder = cifar_folder(tmp_path, "cifar10", count=20)
    (folder / "test_batch").write_bytes(b"not to be read")
    everything = {image.tobytes() for seed in range(5) for image in pixels(20, seed)}
    arguments = {"data_dir": str(folder), "validation_fraction": 0.2}
    images = load_images(ImageDataArguments(**arguments))
    train = {image.tobytes() for image in images.train_images.numpy()}
    held_out = {image.tobytes() for image in images.eval_images.numpy()}
    assert len(train) == 80
    assert len(held_out) == 20
    assert train | held_out == everything
    assert images.eval_labels.bincount().tolist() == [2] * 10
    tuned = load_images(ImageDataArguments(**arguments, tuning=True))
    judged, rest = ({image.tobytes() for image in part.numpy()} for part in (tuned.eval_images, tuned.train_images))
    assert (len(judged), len(rest)) == (16, 64)
    assert judged | rest == train  # settings are chosen on images that are neither trained on nor evaluated on later
    alone = load_images(ImageDataArguments(data_dir=str(folder), tuning=True))
    assert (len(alone.train_images), len(alone.eval_images)) == (90, 10)
    fewer = load_images(ImageDataArguments(**arguments, max_train_images=30, max_eval_images=10))
    assert {image.tobytes() for image in fewer.train_images.numpy()} < train
    assert {image.tobytes() for image in fewer.eval_images.numpy()} < held_out
    (tmp_path / "svhn").mkdir()
    (svhn_folder(tmp_path / "svhn") / "test_32x32.mat").unlink()
    path = write_parquet(tmp_path / "train.parquet", 20, 0)
    (tmp_path / "tree/train/a").mkdir(parents=True)
    (tmp_path / "tree/train/b").mkdir()
    for number, image in enumerate(pixels(20, 0)):
        (tmp_path / "tree/train" / "ab"[number % 2] / f"{number}.png").write_bytes(png(image))
    for source in (
        {"dataset": "svhn", "data_dir": str(tmp_path / "svhn")},
        {"dataset": "parquet", "train_file": str(path)},
        {"dataset": "folder", "data_dir": str(tmp_path / "tree")},
    ):
        images = load_images(ImageDataArguments(**source, validation_fraction=0.5))
        assert len(images.train_images) == len(images.eval_images) == 10
    with pytest.raises(ValueError, match=r"would hold out 0 of 20 images"):
        load_images(ImageDataArguments(**source, validation_fraction=0.01))


def test_scaling_averages_and_takes_the_central_square(tmp_path):
    checks = np.zeros((3, 16, 16), np.uint8)
    checks[:, ::2, ::2] = checks[:, 1::2, 1::2] = 255
    assert image_data.scale(torch.from_numpy(checks)[None], 4).float().mean().item() == pytest.approx(127.5, abs=1)
    wide = torch.zeros(1, 3, 8, 20, dtype=torch.uint8)
    wide[..., 6:14] = 200
    assert torch.equal(image_data.scale(wide, 8), torch.full((1, 3, 8, 8), 200, dtype=torch.uint8))
    assert torch.equal(image_data.scale(wide, 4)[..., 1:3], torch.full((1, 3, 4, 2), 200, dtype=torch.uint8))
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(1, 3, 32, 32).contiguous()
    pillow = Image.fromarray(ramp[0].permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR)
    torch.testing.assert_close(image_data.scale(ramp, 16)[0].permute(1, 2, 0), torch.from_numpy(np.array(pillow)),
                               atol=1, rtol=0)  # fmt: skip
    for split in ("train", "test"):
        for number, size in enumerate((20, 24)):
            folder = tmp_path / split / "ab"[number]
            folder.mkdir(parents=True)
            Image.new("L", (size, size + 6), 100).save(folder / "grey.png")
    with pytest.raises(ValueError, match=r"several sizes: 26x20, 30x24\. Set image_size"):
        load_images(ImageDataArguments(dataset="folder", data_dir=str(tmp_path)))
    images = load_images(ImageDataArguments(dataset="folder", data_dir=str(tmp_path), image_size=16))
    assert torch.equal(images.train_images, torch.full((2, 3, 16, 16), 100, dtype=torch.uint8))


def test_photographs_are_turned_as_their_file_says_and_16_bits_are_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("left", "right"):
            (tmp_path / split / name).mkdir(parents=True)
            exif = Image.Exif()
            exif[0x0112] = 6  # turned by a quarter
            Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / split / name / "photo.jpg", exif=exif)
    arguments = ImageDataArguments(dataset="folder", data_dir=str(tmp_path))
    assert load_images(arguments).train_images.shape == (2, 3, 8, 4)
    Image.fromarray(np.full((8, 4), 40_000, np.uint16)).save(tmp_path / "train/left/scan.png")
    with pytest.raises(
        ValueError, match=r"scan\.png is not an image that can be decoded: its mode is 'I;16'.*convert it"
    ):
        load_images(arguments)


def test_bad_image_sets_are_errors_that_say_what_to_do(tmp_path):
    path = str(write_parquet(tmp_path / "good.parquet", 10, 0))
    other = str(write_parquet(tmp_path / "other.parquet", 3, 0, labels=[1, 2, 9]))
    unlabelled = str(write_parquet(tmp_path / "unlabelled.parquet", 3, 0, labels=[1, None, 2]))
    negative = str(write_parquet(tmp_path / "negative.parquet", 3, 0, [-1, 0, 1], metadata={b"huggingface": NAMES}))
    (tmp_path / "torn.parquet").write_bytes(Path(path).read_bytes()[:2000])
    pyarrow.parquet.write_table(pyarrow.table({"image": [1] * 5, "label": range(5)}), tmp_path / "numbers.parquet")
    (tmp_path / "empty/train/a").mkdir(parents=True)
    both = {"dataset": "parquet", "train_file": path, "eval_file": path}
    for arguments, message in (
        ({"dataset": "mnist"}, r"dataset must be one of cifar10, .*hub, got 'mnist'"),
        ({"dataset": "hub", "data_dir": "x"}, r"hub does not read data_dir='x'.*set dataset to one of cifar10"),
        ({"dataset": "cifar10", "train_file": "x"}, r"cifar10 does not read train_file='x'.*one of parquet\."),
        ({"dataset": "hub"}, "hub needs dataset_name"),
        ({"dataset": "hub", "dataset_name": str(tmp_path / "nowhere")}, r"nowhere, which is no folder here"),
        ({"dataset": "parquet"}, r"parquet needs data_dir.*train_file and eval_file"),
        ({"dataset": "parquet", "data_dir": str(tmp_path)}, r"train_file is not set and .* has no train\*\.parquet"),
        ({"dataset": "parquet", "train_file": path}, r"eval_file is not set and no file.*validation_fraction"),
        ({**both, "train_file": "none.parquet"}, r"no file none\.parquet \(train_file\)"),
        ({**both, "train_file": str(tmp_path / "torn.parquet")}, r"torn\.parquet cannot be read as parquet"),
        ({**both, "train_file": str(tmp_path / "numbers.parquet")}, r"`image` holds no encoded image at row 1"),
        ({**both, "image_column": "img"}, r"no column `img`; its columns are 'image', 'label'\. Set image_column"),
        ({**both, "label_column": "y"}, r"no column `y`; its columns are 'image', 'label'\. Set label_column"),
        ({**both, "eval_file": other}, r"other\.parquet has labels that the training images never have: '9'"),
        ({**both, "train_file": unlabelled}, r"no usable label in column `label` at row 2: None"),
        ({**both, "train_file": negative}, r"at row 1: -1\. Each must be a number from 0 to 4"),
        ({**both, "image_size": 0}, "image_size must be at least 1, got 0"),
        ({**both, "max_eval_images": 0}, "max_eval_images must be at least 1, got 0"),
        ({**both, "validation_fraction": 1.0}, r"validation_fraction must be in \[0, 1\), got 1"),
        ({"dataset": "folder", "data_dir": str(tmp_path)}, r"no folder .*train.*put the images into train/CLASS/"),
        ({"dataset": "folder", "data_dir": str(tmp_path / "empty")}, r"train has no folders with images"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(ImageDataArguments(**arguments))
    data = tmp_path / "data"
    data.mkdir()
    write_parquet(data / "train.parquet", 10, 0)
    hub = {"dataset": "hub", "dataset_name": str(data)}
    with pytest.raises(ValueError, match=r"no split `test`, only train\. Set eval_split"):
        load_images(ImageDataArguments(**hub))
    with pytest.raises(ValueError, match=r"no column `img`.*Set image_column"):
        load_images(ImageDataArguments(**hub, image_column="img"))


# --- batches ---


@pytest.mark.parametrize("pad", [None, 0, 3])
def test_augment_crops_and_flips_each_image_by_itself(pad):
    images = torch.from_numpy(pixels(64, 0))
    augmented = augment(images, torch.Generator().manual_seed(5), pad)
    reach = 4 if pad is None else pad
    draw = torch.Generator().manual_seed(5)
    down, right, mirrored = (torch.randint(n, (64,), generator=draw) for n in (2 * reach + 1, 2 * reach + 1, 2))
    for image, top, left, mirror, result in zip(images, down, right, mirrored, augmented, strict=True):
        padded = torch.zeros(3, 32 + 2 * reach, 32 + 2 * reach, dtype=torch.uint8)
        padded[:, reach : 32 + reach, reach : 32 + reach] = image
        crop = padded[:, top : top + 32, left : left + 32]
        assert torch.equal(result, crop.flip(2) if mirror else crop)
    assert 16 < mirrored.sum() < 48
    assert {int(n) for n in down} == set(range(2 * reach + 1))
    unflipped = augment(images, torch.Generator().manual_seed(5), 0, flip=False)
    assert torch.equal(unflipped, images)


def test_small_images_move_by_an_eighth_of_their_height():
    images = torch.full((256, 3, 16, 16), 9, dtype=torch.uint8)
    augmented = augment(images, torch.Generator().manual_seed(0))
    black_rows = (augmented[:, 0].sum(dim=2) == 0).sum(dim=1)
    assert sorted(set(black_rows.tolist())) == [0, 1, 2]


def test_normalised_training_images_have_mean_0_and_deviation_1():
    images = torch.from_numpy(pixels(50, 0)) // torch.tensor([1, 2, 4], dtype=torch.uint8)[:, None, None]
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean, (images.float() / 255).mean(dim=(0, 2, 3)))
    torch.testing.assert_close(std, (images.float() / 255).std(dim=(0, 2, 3), correction=0))
    normal = normalize(images, mean, std)
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)


def test_a_channel_that_is_the_same_everywhere_becomes_0():
    images = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0], images[:, 2] = 0, 77
    normal = normalize(images, *channel_statistics(images))
    torch.testing.assert_close(normal[:, [0, 2]], torch.zeros(20, 2, 8, 8), atol=1e-6, rtol=0)
    assert normal[:, 1].std().item() == pytest.approx(1.0, abs=1e-3)


def numbered(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of one level each, their own number as their label, and statistics that leave levels / 255 alone."""
    levels = torch.arange(count, dtype=torch.uint8)
    images = levels[:, None, None, None].expand(count, 3, 16, 16).contiguous()
    return images, levels.long(), torch.zeros(3), torch.ones(3)


def test_workers_share_each_epoch_without_overlap_and_without_ragged_ends():
    images, labels, mean, std = numbered(103)
    workers = [Batches(images, labels, 8, mean, std, seed=3, rank=rank, world_size=3) for rank in range(3)]
    epochs = []
    for _ in range(2):
        shares = [[batch for _, batch in worker] for worker in workers]
        assert [len(share) for share in shares] == [4, 4, 4] == [len(worker) for worker in workers]
        assert all(len(batch) == 8 for share in shares for batch in share)
        seen = torch.cat([batch for share in shares for batch in share]).tolist()
        assert len(set(seen)) == 96
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    whole = [Batches(images[:96], labels[:96], 8, mean, std, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(int(n) for worker in whole for _, batch in worker for n in batch) == list(range(96))


def test_epochs_are_determined_by_seed_number_and_rank():
    images, labels, mean, std = numbered(32)
    images = torch.from_numpy(pixels(32, 0))
    make = lambda seed, rank=0: Batches(images, labels, 8, mean, std, seed=seed, rank=rank, world_size=2)  # noqa: E731
    first = make(0)
    (a, _), *_ = first
    (b, _), *_ = first
    assert torch.equal(a, next(make(0).epoch(0))[0])
    assert torch.equal(b, next(make(0).epoch(1))[0])
    assert not torch.equal(a, b)
    assert not torch.equal(b, next(make(1).epoch(0))[0])
    plain = Batches(images, labels, 8, mean, std, pad=0, flip=False)
    for batch, numbers in plain:
        assert torch.equal(batch, images[numbers].float() / 255)


def test_evaluation_sees_every_image_once_in_order_as_it_is():
    images, labels, mean, std = numbered(21)
    batches = Batches(images, labels, 8, mean, std, rank=1, world_size=2, train=False)
    for _ in range(2):
        seen = list(batches)
        assert [len(batch) for _, batch in seen] == [8, 8, 5]
        assert len(batches) == 3
        assert torch.cat([batch for _, batch in seen]).tolist() == list(range(21))
        assert torch.equal(torch.cat([batch for batch, _ in seen]), images.float() / 255)


def test_too_few_images_for_a_batch_are_an_error():
    images, labels, mean, std = numbered(15)
    with pytest.raises(ValueError, match=r"15 images do not make one batch of 8 for each of 2 workers"):
        Batches(images, labels, 8, mean, std, world_size=2)
