# SPDX-License-Identifier: Apache-2.0
"""The readers of untrusted files: small valid files of each, how these are damaged, and the library's function that reads them.

A reader returns a value or raises ``UserError``; anything else is a finding. Its memory is bounded by twice the size of the file and a
constant, which is what it needs for the largest image that it takes, or for the model that it builds.
"""

from __future__ import annotations

import io
import json
import pickletools
import shutil
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from litv2.preprocess import PIXELS

from .fuzz_mutation import Mutation, changed_tree, damaged, in_json, in_pickle, in_png, in_safetensors, in_tar, in_text, in_yaml, in_zip

__all__ = ["READERS", "Reader"]

ROOT = Path(__file__).resolve().parents[2]
PIXEL = 16  # bytes at most, of an image that is decoded, converted and transformed
IMAGE = PIXELS * PIXEL >> 20  # MiB for the largest image that is read
UPLOAD = 50_000_000 * PIXEL >> 20  # MiB for the largest that the page takes


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        share: of the inputs of a run, in parts per thousand.
        mebibytes: that it may take beyond twice the size of the file.
        file: the name of the damaged file in the folder of the run.
        prepare: called once with that folder; returns the valid files, the mutation, and the function that reads the file.
        program: whether the file is a program in Python, as its reader says; then its code is run.
    """

    share: int
    mebibytes: int
    file: str
    prepare: Callable[[Path], tuple[list[bytes], Mutation, Callable[[Path], Any]]]
    program: bool = False


# Images


def _pictures(*formats: tuple[str, str]) -> list[bytes]:
    """Small pictures of each (format, mode)."""
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    pictures = []
    for format, mode in formats:
        buffer = io.BytesIO()
        source = Image.fromarray(pixels[:, :, 0]) if mode.startswith("I") else Image.fromarray(pixels)
        source.convert(mode).save(buffer, format, **(dict(exif=_turned()) if format in ("JPEG", "WEBP", "PNG") else {}))
        pictures.append(buffer.getvalue())
    return pictures


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _image_reader(*formats: tuple[str, str]) -> Callable:
    def prepare(folder: Path):
        from litv2.preprocess import read_image

        turns = Counter()

        def read(path: Path):
            turns["files"] += 1
            image = read_image(path, *(("RGB", False), ("L", False), ("RGB", True))[turns["files"] % 3])
            assert image.mode in ("RGB", "L")

        return _pictures(*formats), in_png, read

    return prepare


def _loader(folder: Path):
    """The trainer's: a folder, the transform of evaluation and of training."""
    from config import default_config
    from data.dataset import ImageDataset
    from data.sources import open_sources
    from data.transforms import build_transform

    for split in ("train", "val"):
        (folder / split / "cat").mkdir(parents=True)
    (folder / "val/cat/0.png").write_bytes(_pictures(("PNG", "RGB"))[0])
    config = default_config()
    config.DATA.DATA_PATH, config.DATA.DATASET, config.DATA.IMG_SIZE = str(folder), "folder", 32
    transforms = [build_transform(config, training) for training in (False, True)]
    (folder / "train/cat/0.png").touch()
    source, _ = open_sources(config)
    datasets = [ImageDataset(source, transform) for transform in transforms]

    def read(path: Path):
        for dataset, key in zip(datasets, (0, (0, 7))):
            sample = dataset[key]
            assert sample.image is None or sample.image.shape == (3, 32, 32)

    return _pictures(("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("BMP", "P")), in_png, read


def _page(folder: Path):
    """What a visitor uploads: the prediction, and with it the preprocessing."""
    from litv2 import LITv2
    from litv2.explain.page import Page
    from litv2.explain.subjects import Classifier

    lit = dict(EMBED_DIM=8, DEPTHS=[1, 1, 1, 1], NUM_HEADS=[1, 1, 1, 1], LOCAL_WS=[0, 0, 2, 1])
    model = LITv2(num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    config = dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=32))
    torch.save(dict(model=model.state_dict(), config=config), folder / "page.pth")
    page = Page(Classifier(folder / "page.pth"))

    def read(path: Path):
        took, found = page.prediction(page.view(str(path)))
        assert len(found) == 3

    pictures = _pictures(("PNG", "RGB"), ("PNG", "P"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGBA"), ("BMP", "RGB"))
    return pictures, in_png, read


# Checkpoints


def _contents() -> list[dict]:
    weights = OrderedDict((f"layers.{i}.weight", torch.arange(6.0).view(2, 3)[:, : 2 + i]) for i in range(2))
    optimizer = dict(state={0: dict(step=torch.tensor(3.0), exp_avg=torch.ones(2, 3).bfloat16())}, param_groups=[dict(lr=1e-3, params=[0])])
    scheduler = dict(milestones=Counter({8: 1, 11: 1}), last=torch.Size([1, 2]), betas=(0.9, 0.999), on=True, off=None, text="é" * 20)
    return [dict(model=weights, epoch=3, config=dict(A=[1, (2, 3)])), dict(state_dict=weights, optimizer=optimizer, meta=scheduler)]


def _saved(content: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def _inside(name: str) -> Mutation:
    return in_pickle if name.endswith("data.pkl") else damaged


def _checkpoint(seeds: Callable[[], list[bytes]], mutation: Mutation, mmengine: bool = False) -> Callable:
    def prepare(folder: Path):
        from litv2.weights.reading import read_checkpoint

        also = ()
        if mmengine:
            from litv2.openmmlab.runner import MMENGINE_CLASSES as also

        def read(path: Path):
            content = read_checkpoint(path, also)
            assert isinstance(content, dict)

        return seeds(), mutation, read

    return prepare


def _pickles(folder: Path):
    """The check of a pickle alone, without torch."""
    from litv2.weights.formats import check_format, check_pickles

    archives = [_saved(content) for content in _contents()]

    def read(path: Path):
        check_pickles(path, check_format(path))

    return archives, in_zip(_inside), read


def _old_mutation(random: Random, seeds) -> bytes:
    """Of torch's format before 1.6: five pickles after each other, then the storages."""
    if random.random() < 0.4:
        return damaged(random, seeds)
    rest, parts = random.choice(seeds), []
    for _ in range(5):
        stream = io.BytesIO(rest)
        for _ in pickletools.genops(stream):
            pass
        end = stream.tell()
        parts.append(rest[:end])
        rest = rest[end:]
    at = random.choice((2, 3, 3, 3, 4))
    parts[at] = in_pickle(random, [parts[at]])
    return b"".join(parts) + rest


def _safetensors() -> list[bytes]:
    from safetensors.torch import save

    weights = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.0).bfloat16()}
    return [save(weights), save(weights, metadata=dict(config='{"A": [1, 2]}', note="text"))]


def _mmengine() -> list[bytes]:
    from mmengine.logging import HistoryBuffer

    history = HistoryBuffer(log_history=[1.0, 2.0], count_history=[1, 1])
    history.mean()
    content = dict(_contents()[1], message_hub=dict(log_scalars=dict(loss=history), runtime_info=dict(epoch=np.int64(1))))
    return [_saved(content)]


def _classifiers(folder: Path):
    """What a classifier's file says of its network: every value of the content may be another."""
    from litv2 import LITv2
    from litv2.explain.subjects import Classifier

    lit = dict(EMBED_DIM=8, DEPTHS=[1, 1, 1, 1], NUM_HEADS=[1, 1, 2, 2], LOCAL_WS=[0, 0, 2, 1])
    model = LITv2(num_classes=3, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), alpha=0.5)
    config = dict(MODEL=dict(LIT=lit), DATA=dict(IMG_SIZE=32), TEST=dict(IMG_SIZE=0, CROP=True))
    whole = dict(model=dict(model.state_dict()), config=config, class_names=["a", "b", "c"])

    def mutated(random: Random, seeds) -> bytes:
        content = dict(whole)
        if random.random() < 0.5:
            content["config"] = changed_tree(random, config)
        if random.random() < 0.3:
            content["class_names"] = changed_tree(random, content["class_names"])
        if random.random() < 0.5:
            weights = content["model"] = dict(whole["model"])
            key = random.choice(list(weights))
            changed = [torch.zeros(0), torch.zeros(1), torch.zeros(7, 3, 4, 4), weights[key].flatten(), torch.full((2, 2), torch.nan)]
            kind = random.randrange(3)
            if kind == 0:
                del weights[key]
            elif kind == 1:
                weights[key] = random.choice((*changed, 3, "text", weights[key].long(), weights[random.choice(list(weights))]))
            else:
                weights[random.choice(("layers.9.blocks.0.a", "layers.x.blocks.y", "module.a", "", "layers.0", key + "x"))] = weights[key]
        return _saved(content)

    def read(path: Path):
        subject = Classifier(path)
        assert len(subject.names) == subject.model.num_classes

    return [_saved(whole)], mutated, read


def _features(folder: Path):
    """Features of images: three arrays and the fingerprint of the model, in a zip."""
    from litv2.features import Features, read_features, write_features

    content = Features(np.ones((3, 4), np.float32), np.array(["a/0.png", "a/1.png", "é.png"]), np.array(["a", "a", ""]), "0123456789abcdef")
    write_features(folder / "good.npz", content)

    def read(path: Path):
        found = read_features(path)
        assert len(found.features) == len(found.images) == len(found.classes)

    return [(folder / "good.npz").read_bytes()], in_zip(lambda name: damaged), read


# Data sets


def _samples(source) -> None:
    """Reads all images as the trainer does in an evaluation."""
    from data.dataset import ImageDataset

    dataset = ImageDataset(source, lambda image: torch.zeros(1))
    for i in range(len(dataset)):
        dataset[i]


def _data_config(folder: Path, **values):
    from config import default_config

    config = default_config()
    config.DATA.DATA_PATH = str(folder)
    for key, value in values.items():
        config.DATA[key] = value
    return config


def _zip_seeds() -> list[bytes]:
    archives = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name in ("cat/0.png", "dog/1.png"):
                archive.writestr(name, _pictures(("PNG", "RGB"))[0])
        archives.append(buffer.getvalue())
    return archives


LISTING = b"cat/0.png\t0\ndog/1.png\t1\n"


def _zips(folder: Path):
    from data.sources import open_sources

    (folder / "val.zip").write_bytes(_zip_seeds()[0])
    for split in ("train", "val"):
        (folder / f"{split}_map.txt").write_bytes(LISTING)
    configs = [_data_config(folder, ZIP_MODE=True, CACHE_MODE=mode) for mode in ("no", "full")]
    turns = Counter()

    def read(path: Path):
        turns["files"] += 1
        source, _ = open_sources(configs[turns["files"] % 2])
        _samples(source)

    return _zip_seeds(), in_zip(lambda name: in_png), read


def _listings(folder: Path):
    from data.sources import open_sources

    for split in ("train", "val"):
        (folder / f"{split}.zip").write_bytes(_zip_seeds()[0])
        (folder / f"{split}_map.txt").write_bytes(LISTING)
    config = _data_config(folder, ZIP_MODE=True, CACHE_MODE="no")

    def read(path: Path):
        source, _ = open_sources(config)
        _samples(source)

    return [LISTING, LISTING * 10], in_text, read


def _tars(folder: Path):
    from data.sources import open_sources

    buffer, outer = io.BytesIO(), io.BytesIO()  # a tar, and a tar of tars
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("cat/0.png", "dog/1.png"):
            content = _pictures(("PNG", "RGB"))[0]
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with tarfile.open(fileobj=outer, mode="w") as archive:
        entry = tarfile.TarInfo("cat.tar")
        entry.size = len(buffer.getvalue())
        archive.addfile(entry, io.BytesIO(buffer.getvalue()))
    (folder / "val.tar").write_bytes(outer.getvalue())
    config = _data_config(folder, DATASET="tar")

    def read(path: Path):
        source, _ = open_sources(config)
        _samples(source)

    return [outer.getvalue(), buffer.getvalue()], in_tar, read


def _coco(folder: Path):
    """The checks of our runner, then the boxes and masks of every image, which is not read."""
    from mmengine.registry import TRANSFORMS, init_default_scope

    from litv2.openmmlab.runner import StrictRunner

    init_default_scope("mmdet")
    content: dict = dict(images=[], annotations=[], categories=[dict(id=1, name="cat"), dict(id=11, name="dog")])
    masks = [[6, 10, 46, 10, 46, 40, 6, 40]], dict(size=[64, 80], counts=[700, 40, 4380])
    for number, mask in enumerate(masks):
        content["images"].append(dict(id=number, file_name=f"{number}.jpg", width=80, height=64))
        box = dict(bbox=[6, 10, 40, 30], area=1200, segmentation=mask, iscrowd=0)
        content["annotations"].append(dict(id=number, image_id=number, category_id=10 * number + 1, **box))
    step = dict(type="LoadAnnotations", with_bbox=True, with_mask=True)
    load = TRANSFORMS.build(step)

    def read(path: Path):
        dataset = dict(
            type="CocoDataset", ann_file=str(path), data_prefix=dict(img=str(folder)), metainfo=dict(classes=("cat", "dog")),
            filter_cfg=dict(filter_empty_gt=True, min_size=1), pipeline=[step],
        )  # fmt: skip
        loader = StrictRunner.build_dataloader(dict(batch_size=1, num_workers=0, dataset=dataset, sampler=dict(type="DefaultSampler")))
        for number in range(len(loader.dataset)):
            info = loader.dataset.get_data_info(number)
            load({**info, "ori_shape": (info["height"], info["width"])})["gt_masks"].to_ndarray()

    return [json.dumps(content).encode()], in_json, read


# Configurations


def _yaml(folder: Path):
    from config import load_config

    for path in (ROOT / "classification/configs").glob("*.yaml"):
        shutil.copy(path, folder)
    seeds = [path.read_bytes() for path in sorted(folder.glob("*.yaml"))]
    seeds.append(b"BASE: [litv2-small.yaml]\nTRAIN: {EPOCHS: 30, OPTIMIZER: {BETAS: [0.9, 0.99]}}\nAUG: {CUTMIX_MINMAX: [0.2, 0.8]}\n")

    def read(path: Path):
        load_config(path)

    return seeds, in_yaml, read


def _options(folder: Path):
    """--opts KEY VALUE ..., separated by lines."""
    from config import load_config

    seeds = [
        b"TRAIN.EPOCHS\n30\nTRAIN.BASE_LR\n1e-3\nAUG.CUTMIX_MINMAX\n[0.2, 0.8]",
        b"DATA.IMG_SIZE\n64\nMODEL.LIT.NUM_HEADS\n[1, 2, 4, 8]\nAMP_OPT_LEVEL\nO1\nMODEL.LIT.HAS_MSA\n[0, 0, 1, 1]",
    ]

    def read(path: Path):
        load_config(ROOT / "classification/configs/litv2-digits.yaml", path.read_bytes().decode(errors="surrogateescape").split("\n"))

    return seeds, in_text, read


# Exported graphs


class _Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 2, 3)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.layer(images).relu().mean((2, 3)),)


def _exported(format: str, suffix: str, mutation: Mutation) -> Callable:
    def prepare(folder: Path):
        from litv2.export import FORMATS, Network, Settings, load

        write = import_module(f"litv2.export.{FORMATS[format][0]}").write
        network = Network(_Small(), _Small(), ("features",), smallest=4)
        path = folder / f"input{suffix}"
        write(network, path, Settings(image_size=(8, 8), dynamic=()))
        images = torch.zeros(1, 3, 8, 8)

        def read(path: Path):
            load(format, path)(images)

        return [path.read_bytes()], mutation, read

    return prepare


def _in_program(name: str) -> Mutation:
    return in_json if name.endswith(".json") else damaged


PNG = _image_reader(("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "RGBA"), ("PNG", "1"))
JPEG = _image_reader(("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA"))
READERS = {
    "image: PNG": Reader(120, IMAGE, "input.png", PNG),
    "image: JPEG, WebP": Reader(80, IMAGE, "input.jpg", JPEG),
    "image: GIF, BMP, TIFF, PPM": Reader(
        80, IMAGE, "input.bmp", _image_reader(("GIF", "P"), ("BMP", "RGB"), ("BMP", "P"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("PPM", "RGB"))
    ),
    "trainer's image": Reader(40, IMAGE, "train/cat/0.png", _loader),
    "upload to the page": Reader(20, UPLOAD, "input.png", _page),
    "pickle check": Reader(250, 16, "input.pth", _pickles),
    "checkpoint, zip": Reader(100, 16, "input.pth", _checkpoint(lambda: [_saved(content) for content in _contents()], in_zip(_inside))),
    "checkpoint, before torch 1.6": Reader(
        80, 16, "input.pth", _checkpoint(lambda: [_saved(content, old=True) for content in _contents()], _old_mutation)
    ),
    "checkpoint, mmengine": Reader(20, 16, "input.pth", _checkpoint(_mmengine, in_zip(_inside), mmengine=True)),
    "checkpoint, safetensors": Reader(100, 16, "input.safetensors", _checkpoint(_safetensors, in_safetensors)),
    "classifier's content": Reader(5, 64, "input.pth", _classifiers),
    "features": Reader(20, 16, "input.npz", _features),
    "zip data set": Reader(30, IMAGE, "train.zip", _zips),
    "its listing": Reader(20, 16, "train_map.txt", _listings),
    "tar data set": Reader(15, IMAGE, "train.tar", _tars),
    "COCO annotations": Reader(5, 64, "input.json", _coco),
    "configuration, YAML": Reader(10, 64, "input.yaml", _yaml),
    "configuration, --opts": Reader(20, 64, "input.txt", _options),
    "graph, ONNX": Reader(3, 256, "input.onnx", _exported("onnx", ".onnx", damaged)),
    "graph, OpenVINO": Reader(1, 256, "input.xml", _exported("openvino", ".xml", in_text)),
    "graph, torch.export": Reader(1, 256, "input.pt2", _exported("torch-export", ".pt2", in_zip(_in_program)), program=True),
}
