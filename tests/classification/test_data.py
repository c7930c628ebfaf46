# SPDX-License-Identifier: Apache-2.0
"""Sources, damaged files, odd images, samplers and mixup."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from config import load_config
from data.dataset import ImageDataset, collate, decode, seeded
from data.loader import build_loaders
from data.mixup import build_mixup
from data.sampler import EvalSampler, TrainSampler
from data.sources import DataError, open_sources
from helpers import ROOT, write_images
from litv2.errors import UserError
from litv2.runs.unreadable import BadFiles

DIGITS = ROOT / "classification/configs/litv2-digits.yaml"


def config(*overrides):
    return load_config(DIGITS, ["DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 4, *overrides])


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "train", {"cat": 5, "dog": 4, "owl": 3})
    write_images(tmp_path / "val", {"cat": 2, "owl": 3})
    return tmp_path


def contents(source):
    """What a source holds, apart from how its files are named: decoded bytes and class name.

    It goes through a pickle first, as it does to the loader's workers on macOS and Windows.
    """
    source = pickle.loads(pickle.dumps(source))
    rows = [(decode(file, "RGB").tobytes(), source.class_names[target]) for file, target in (source[i] for i in range(len(source)))]
    return sorted(rows)


def test_folder(folder):
    train, val = open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))
    assert train.class_names == val.class_names == ["cat", "dog", "owl"]
    assert Counter(target for _, target in train.samples) == {0: 5, 1: 4, 2: 3}
    assert Counter(target for _, target in val.samples) == {0: 2, 2: 3}
    assert train.filename(0).endswith("train/cat/0.png")


def several_classes(folder):
    return open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder), "MODEL.TASK", "multi"))


def test_files_of_one_name_are_one_image_of_several_classes(folder):
    """The folders number their images alike; here each has images of its own, and shares some: as a link, and as a copy below a folder."""
    for path in sorted(folder.rglob("*.png")):
        path.rename(path.with_stem(f"{path.parent.name}{path.stem}"))
    (folder / "train/owl/dog1.png").symlink_to(folder / "train/dog/dog1.png")
    os.link(folder / "train/dog/dog1.png", folder / "train/cat/dog1.png")
    for name in ("cat", "dog"):
        (folder / "train" / name / "more").mkdir()
        shutil.copy(folder / "train/owl/owl2.png", folder / "train" / name / "more/cat1.png")
    train, val = several_classes(folder)
    found = {os.path.relpath(name, folder / "train"): "".join(str(int(share)) for share in target) for name, target in train.samples}
    assert found == {
        **{f"cat/cat{i}.png": "100" for i in range(5)}, **{f"dog/dog{i}.png": "010" for i in (0, 2, 3)}, "cat/dog1.png": "111",
        **{f"owl/owl{i}.png": "001" for i in range(3)}, "cat/more/cat1.png": "110",
    }  # fmt: skip
    assert [target.tolist() for _, target in val.samples] == [[1, 0, 0]] * 2 + [[0, 0, 1]] * 3
    assert train[0][1].dtype == np.float32


def test_other_images_of_one_name(folder):
    """As of folders that are meant for one class per image."""
    with pytest.raises(DataError, match=r"train/cat/0.png and .*train/dog/0.png have one name, but are different images"):
        several_classes(folder)


@pytest.mark.parametrize("name", ["a|b", "true"])
def test_names_that_a_table_of_predictions_would_confuse(name, folder):
    for split in ("train", "val"):
        (folder / split / "owl").rename(folder / split / name)
    with pytest.raises(UserError, match=rf"the class '{re.escape(name)}' must be renamed: with MODEL.TASK multi"):
        several_classes(folder)
    open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))  # with one class per image there is no such table


@pytest.mark.parametrize("cache", ["no", "full", "part"])
def test_zip_equals_folder(folder, cache):
    for split in ("train", "val"):
        files = sorted((folder / split).rglob("*.png"))
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder / split))
        numbers = {"cat": 0, "dog": 1, "owl": 2}
        lines = [f"{file.relative_to(folder / split)}\t{numbers[file.parent.name]}" for file in files]
        (folder / f"{split}_map.txt").write_text("\n".join(lines) + "\n")
    zipped = open_sources(config("DATA.ZIP_MODE", True, "DATA.CACHE_MODE", cache, "DATA.DATA_PATH", str(folder)))
    plain = open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))
    assert contents(zipped[0]) == contents(plain[0])
    loaders = build_loaders(config("DATA.ZIP_MODE", True, "DATA.CACHE_MODE", cache, "DATA.DATA_PATH", str(folder), "DATA.NUM_WORKERS", 2))
    assert sum(len(batch.targets) for batch in loaders.val) == 5


def test_tar_equals_folder(folder):
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as archive:
            for file in sorted((folder / split).rglob("*.png")):
                archive.add(file, str(file.relative_to(folder / split)))
    packed = open_sources(config("DATA.DATASET", "tar", "DATA.DATA_PATH", str(folder)))
    plain = open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))
    for a, b in zip(packed, plain):
        assert contents(a) == contents(b)


def test_each_process_has_its_own_handle_of_a_tar(folder, monkeypatch):
    """A worker is forked when ``samples.png`` has been drawn from the archive: with one handle they would read across each other."""
    with tarfile.open(folder / "train.tar", "w") as archive:
        for file in sorted((folder / "train").rglob("*.png")):
            archive.add(file, str(file.relative_to(folder / "train")))
    shutil.copy(folder / "train.tar", folder / "val.tar")
    source, _ = open_sources(config("DATA.DATASET", "tar", "DATA.DATA_PATH", str(folder)))
    first, state = source[0][0].read(), source._read.reader.tar_state
    ours = state.tf
    assert source[0][0].read() == first and state.tf is ours
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert source[0][0].read() == first and state.tf is not ours
    assert pickle.loads(pickle.dumps(source))[0][0].read() == first


def test_hugging_face_equals_folder(folder, tmp_path_factory):
    pytest.importorskip("datasets")
    cache = str(tmp_path_factory.mktemp("cache"))
    overrides = ["DATA.DATASET", f"hfds/{folder}", "DATA.DATA_PATH", cache, "DATA.VAL_SPLIT", "validation"]
    write_images(folder / "val", {"dog": 1})  # Hugging Face numbers the classes of each split by itself
    loaded = open_sources(config(*overrides))
    plain = open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))
    for a, b in zip(loaded, plain):
        assert contents(a) == contents(b)
    with pytest.raises(DataError, match="split 'test' cannot be opened"):
        open_sources(config(*overrides, "DATA.VAL_SPLIT", "test"))


def test_cifar(tmp_path):
    """torchvision's own format, with a few images in it."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (base / name).write_bytes(pickle.dumps({"data": pixels, "labels": [3, 9]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with pytest.raises(DataError, match="CIFAR10 .*cannot be downloaded"):  # its checksums are not the published ones
        open_sources(config("DATA.DATASET", "cifar10", "DATA.DATA_PATH", str(tmp_path / "empty")))
    from unittest import mock

    with (
        mock.patch.object(CIFAR10, "_check_integrity", lambda self: True),
        mock.patch.object(CIFAR10, "download", lambda self: None),
        mock.patch("torchvision.datasets.cifar.check_integrity", lambda *_: True),
    ):
        train, val = open_sources(config("DATA.DATASET", "cifar10", "DATA.DATA_PATH", str(tmp_path)))
    assert (len(train), len(val), train.class_names) == (10, 2, list("abcdefghij"))
    image, target = pickle.loads(pickle.dumps(train))[1]
    assert target == 9 and np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), pixels[1])


def test_webdataset(tmp_path):
    """A streaming reader of timm: shards without positions."""
    pytest.importorskip("webdataset")
    import json

    for split, count in (("train", 12), ("validation", 5)):
        with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as archive:
            for i in range(count):
                png = io.BytesIO()
                Image.new("RGB", (40, 40), (i * 9, 0, 0)).save(png, "PNG")
                for suffix, data in (("png", png.getvalue()), ("cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (tmp_path / "_info.json").write_text(
        json.dumps(
            {
                "splits": {
                    s: {"name": s, "filenames": [f"{s}-0000.tar"], "shard_lengths": [n], "num_samples": n}
                    for s, n in (("train", 12), ("validation", 5))
                }
            }
        )
    )
    overrides = ["DATA.DATASET", "wds/", "DATA.DATA_PATH", str(tmp_path), "DATA.VAL_SPLIT", "validation", "DATA.NUM_WORKERS", 1]
    with pytest.raises(DataError, match="MODEL.NUM_CLASSES"):
        build_loaders(config(*overrides))
    loaders = build_loaders(config(*overrides, "MODEL.NUM_CLASSES", 3))
    assert loaders.steps_per_epoch == 3 and len(loaders.class_names) == 3
    assert sum(len(batch.targets) for batch in loaders.val) == 5
    assert next(iter(loaders.train)).images.shape == (4, 3, 32, 32)


def test_digits_are_split_once_and_for_all():
    train, val = open_sources(config())
    assert (len(train), len(val)) == (1437, 360)
    names = {train.filename(i) for i in range(len(train))} & {val.filename(i) for i in range(len(val))}
    assert names == set()
    assert open_sources(config("SEED", 7))[1].samples == val.samples
    counts = Counter(target for _, target in val.samples)
    assert len(counts) == 10 and min(counts.values()) >= 34


def test_every_mode_of_image_decodes_to_the_same_picture(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    grey = Image.fromarray(ramp)
    wide = Image.fromarray(ramp.astype(np.uint16) * 257)
    colour = grey.convert("RGB")
    saved = {
        "grey.png": grey,
        "rgb.png": colour,
        "rgba.png": grey.convert("RGBA"),
        "palette.png": grey.convert("P"),
        "la.png": grey.convert("LA"),
        "cmyk.tif": colour.convert("CMYK"),
        "sixteen.png": wide,
        "sixteen.tif": wide,
        "thirtytwo.tif": Image.fromarray(ramp.astype(np.int32) * 257),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
        with open(tmp_path / name, "rb") as file:
            decoded = decode(file, "RGB")
        assert decoded.mode == "RGB" and decoded.size == (64, 48), name
        assert np.abs(np.asarray(decoded).astype(int) - ramp[..., None]).max() <= 1, name
        with open(tmp_path / name, "rb") as file:
            assert decode(file, "L").mode == "L"
    floats = io.BytesIO()
    Image.fromarray(ramp.astype(np.float32)).save(floats, "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        decode(floats, "RGB")


def damage(folder):
    """Three unreadable files among the training images, one among the validation images."""
    good = (folder / "train/cat/0.png").read_bytes()
    (folder / "train/cat/1.png").write_bytes(good[: len(good) // 2])
    (folder / "train/dog/0.png").write_bytes(b"<html>")
    (folder / "train/owl/2.png").write_bytes(b"")
    (folder / "val/owl/0.png").write_bytes(good[:60])


def test_damaged_files_are_reported_and_skipped(folder):
    damage(folder)
    loaders = build_loaders(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder), "DATA.NUM_WORKERS", 2))
    lines = []
    bad = BadFiles(3, lines.append)
    shapes = []
    for batch in loaders.train:
        bad.add(batch.unreadable)
        shapes.append(len(batch.targets))
    assert shapes == [4, 4, 4], "training batches stay whole"
    for batch in loaders.train:  # the second pass meets the same files: reported once
        bad.add(batch.unreadable)
    assert len(lines) == 3
    assert all(any(name in line for line in lines) for name in ("train/cat/1.png", "train/dog/0.png", "train/owl/2.png"))
    seen = list(loaders.val)
    assert sum(len(batch.targets) for batch in seen) == 4
    with pytest.raises(UserError, match=r"4 unreadable images, more than DATA.MAX_BAD_FILES=3(.|\n)*train/dog/0.png(.|\n)*val/owl/0.png"):
        for batch in seen:
            bad.add(batch.unreadable)


def test_nothing_readable(tmp_path):
    write_images(tmp_path, {"a": 2})
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"no image")
    from data.sources import ListSource

    source = ListSource([(str(file), 0) for file in tmp_path.rglob("*.png")], ["a"], lambda name: io.BytesIO(Path(name).read_bytes()))
    with pytest.raises(DataError, match="none of the 2 images"):
        ImageDataset(source, lambda image: image)[0, 1]
    assert len(collate([ImageDataset(source, lambda image: image)[0]]).targets) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda root: (root / "train").rename(root / "trian"), "no folder .*train; --data-path must contain train/CLASS/IMAGE"),
        (lambda root: write_images(root / "val", {"yak": 1}), "1 classes that are missing from training: yak"),
        (lambda root: (root / "train/empty").mkdir(), "empty"),
    ],
)
def test_bad_folders(folder, change, words):
    change(folder)
    with pytest.raises((DataError, FileNotFoundError), match=words):
        open_sources(config("DATA.DATASET", "folder", "DATA.DATA_PATH", str(folder)))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["DATA.DATASET", "folder"], "needs --data-path"),
        (["DATA.DATA_PATH", "."], "digits, which is not read from --data-path"),
        (["DATA.DATASET", "imagenat"], "'imagenat' is unknown"),
        (["DATA.ZIP_MODE", True, "DATA.DATA_PATH", "."], "there is no train.zip"),
        (["DATA.DATASET", "cifar", "DATA.DATA_PATH", "nowhere"], "CIFAR100 is not in nowhere"),
        (["DATA.DATASET", "tar", "DATA.DATA_PATH", "."], "no archive train.tar"),
    ],
)
def test_bad_sources(overrides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        open_sources(config(*overrides))


def test_bad_zip_map(tmp_path):
    zipfile.ZipFile(tmp_path / "train.zip", "w").close()
    (tmp_path / "train_map.txt").write_text("a/1.png\t0\nb/2.png 1\n")
    with pytest.raises(DataError, match="train_map.txt, line 2: expected path<TAB>class number, at most 100000, got 'b/2.png 1'"):
        open_sources(config("DATA.ZIP_MODE", True, "DATA.DATA_PATH", str(tmp_path)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_train_sampler(world, fixed):
    samplers = [TrainSampler(50, 4, rank, world, seed=3, fixed_share=fixed) for rank in range(world)]
    epochs = []
    whole, other = (TrainSampler(50, 50, 0, 1, seed=seed) for seed in (3, 4))
    for epoch in range(2):
        for sampler in (*samplers, whole, other):
            sampler.epoch = epoch
        shares = [list(sampler) for sampler in samplers]
        augmented = dict(whole)
        assert all(augmented[index] == seed for share in shares for index, seed in share), "whichever process has the image"
        assert augmented != dict(other) and list(augmented) != list(dict(other))
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) % 4 == 0
        indices = [index for share in shares for index, _ in share]
        assert len(set(indices)) == len(indices) >= 50 - 4 * world
        if fixed:
            assert all(index % world == rank for rank, share in enumerate(shares) for index, _ in share)
        epochs.append(shares)
    assert epochs[0] != epochs[1]
    samplers[0].skip = 8
    assert list(samplers[0]) == epochs[1][0][8:] and len(samplers[0]) == len(epochs[1][0]) - 8


def test_small_data_sets():
    assert len(list(TrainSampler(5, 8, 0, 1, seed=0))) == 5, "fewer images than a batch: one short batch"
    with pytest.raises(ValueError, match="1 training images are too few for 2 processes"):
        TrainSampler(1, 8, 0, 2, seed=0)


@pytest.mark.parametrize("size, world", [(10, 1), (10, 3), (2, 4)])
def test_eval_sampler_covers_each_image_once(size, world):
    assert sorted(i for rank in range(world) for i in EvalSampler(size, rank, world)) == list(range(size))


def test_augmentation_does_not_depend_on_workers():
    """The same pictures with 0 and 2 workers, and other ones in the next epoch."""
    batches = {}
    for workers in (0, 2):
        loaders = build_loaders(config("DATA.NUM_WORKERS", workers, "AUG.REPROB", 0.5, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"))
        loaders.sampler.count = 12
        for epoch in (0, 1):
            loaders.sampler.epoch = epoch
            batches[workers, epoch] = torch.cat([batch.images for batch in loaders.train])
    assert torch.equal(batches[0, 0], batches[2, 0]) and torch.equal(batches[0, 1], batches[2, 1])
    assert not torch.equal(batches[0, 0], batches[0, 1])


def test_loaders_can_be_sent_to_spawned_workers():
    loaders = build_loaders(config("AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"))
    for loader, key in ((loaders.train, (3, 7)), (loaders.val, 3)):
        copy = pickle.loads(pickle.dumps(loader.dataset))
        assert torch.equal(copy[key].image, loader.dataset[key].image)


def test_seeded_leaves_the_outside_alone():
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(11):
            draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all() and torch.equal(torch.get_rng_state(), state[2])


@pytest.mark.parametrize("mixup, cutmix", [(0, 1.0), (0.8, 0), (0.8, 1.0)])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_mixup(mixup, cutmix, mode, batch):
    mix = build_mixup(config("AUG.MIXUP", mixup, "AUG.CUTMIX", cutmix, "AUG.MIXUP_PROB", 1.0, "AUG.MIXUP_MODE", mode), num_classes=6)
    images = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()
    mixed, target = mix(images, torch.arange(batch) % 6)
    assert mixed.shape == images.shape and target.shape == (batch, 6)
    assert target.sum(1).tolist() == pytest.approx([1.0] * batch, abs=1e-5)
    # The share of each class in the target is the share of its pixels in the picture, but for the label smoothing of 0.1.
    if batch == 2:
        share = mixed[0].mean().item()
        assert target[0, 1].item() == pytest.approx(0.9 * share + 0.1 / 6, abs=2e-2)


@pytest.mark.parametrize("batch", [2, 5])
def test_cutmix_of_a_given_size(batch):
    """AUG.CUTMIX_MINMAX: the rectangle's sides are 0.3 to 0.5 of the image's, and the target has its share."""
    mix = build_mixup(config("AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.CUTMIX_MINMAX", [0.3, 0.5], "MODEL.LABEL_SMOOTHING", 0), num_classes=6)
    shares = set()
    for _ in range(20):
        images = torch.arange(batch, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 40, 40).clone()
        mixed, target = mix(images, torch.arange(batch))
        pasted = mixed[0, 0] != 0
        sides = pasted.any(1).sum().item(), pasted.any(0).sum().item()
        assert all(12 <= side < 20 for side in sides) and pasted.sum() == sides[0] * sides[1]
        assert target[0, 0].item() == pytest.approx(1 - sides[0] * sides[1] / 1600, abs=1e-5)
        shares.add(sides)
    assert len(shares) > 5


def test_mixup_off():
    assert build_mixup(config("AUG.MIXUP", 0, "AUG.CUTMIX", 0), 6) is None
