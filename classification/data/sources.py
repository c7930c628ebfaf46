# SPDX-License-Identifier: Apache-2.0
"""Image sources. A source is a sequence of (encoded file or PIL image, target) with names for both.

A target is the number of a class, or a vector (classes,) float32 with a number in [0, 1] for each. The pipeline uses only ``source[i]``,
``len(source)``, ``source.filename(i)`` and the attributes of ``ListSource``. Sources can be pickled: on macOS and Windows, where
processes are not forked, each loader worker gets a copy. timm's streaming readers (WebDataset, streamed Hugging Face data sets, TFDS)
have no indices; ``loader.py`` reads them directly.
"""

from __future__ import annotations

import filecmp
import io
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from yacs.config import CfgNode

import distributed
from litv2.errors import UserError

from .table import check_class_names, read_class_names, read_table

STREAMING = ("wds/", "hfids/", "tfds/")
FOLDERS = ("folder", "imagenet", "imagenet100")  # DATA_PATH/SPLIT/CLASS/IMAGE, by any of these names
LARGEST_CLASS = 100_000  # number of a class in a listing: each has an output of the network
LARGEST_FILE = 1 << 28  # bytes of an encoded image in an archive, which may expand a small file to any size
CIFAR = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "cifar": "CIFAR100"}  # torchvision's classes
Target = int | np.ndarray


class DataError(UserError):
    """Unusable data set; the message says what was found and what was expected."""


class ListSource:
    """A list of named samples and a function that reads them. ``note`` is what the log says of them."""

    def __init__(self, samples: Sequence[tuple[str, Target]], class_names: list[str], read: Callable, note: str = ""):
        if not samples:
            raise DataError("the data set has no images")
        self.samples, self.class_names, self._read, self.note = samples, class_names, read, note

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO | Image.Image, Target]:
        name, target = self.samples[index]
        return self._read(name), target

    def filename(self, index: int) -> str:
        return self.samples[index][0]


def open_sources(config: CfgNode) -> tuple[ListSource, ListSource]:
    """Opens the training and the validation source that DATA specifies.

    Raises:
        DataError: a folder or file is missing, there are no images, or the classes of the two differ; the message names them.
    """
    data = config.DATA
    if data.ZIP_MODE:
        train, val = (_zip(config, split) for split in (data.TRAIN_SPLIT, data.VAL_SPLIT))
    elif data.DATASET == "digits":
        if data.DATA_PATH:
            raise DataError("DATA.DATASET is digits, which is not read from --data-path; set it to folder for your own images")
        train, val = _digits()
    elif data.DATASET in FOLDERS:
        train = _folder(config, data.VAL_SPLIT if data.CLASS_MAP else data.TRAIN_SPLIT)
        val = _folder(config, data.VAL_SPLIT, train.class_names)
    elif data.DATASET == "csv":
        return _tables(config)
    elif data.DATASET in CIFAR:
        train, val = (_cifar(config, training) for training in (True, False))
    elif data.DATASET == "tar":
        train = _tar(config, data.TRAIN_SPLIT)
        val = _tar(config, data.VAL_SPLIT, train.class_names)
    elif data.DATASET.startswith("hfds/"):
        train, val = (_hugging_face(config, split) for split in (data.TRAIN_SPLIT, data.VAL_SPLIT))
    else:
        raise DataError(
            f"DATA.DATASET={data.DATASET!r} is unknown; use digits, csv, tar, {', '.join(FOLDERS)}, {', '.join(CIFAR)}, "
            f"or a timm reader: hfds/, {', '.join(STREAMING)}"
        )
    if max(target for _, target in val.samples) >= len(train.class_names):
        raise DataError(f"validation has class numbers of {len(train.class_names)} or more, but training has fewer classes")
    if config.MODEL.TASK == "multi":
        check_class_names(train.class_names)
        return _by_name(config, data.TRAIN_SPLIT, train), _by_name(config, data.VAL_SPLIT, val)
    return train, val


def _digits() -> tuple[ListSource, ListSource]:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels; a fixed, stratified fifth is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).astype("uint8")
    rows = train_test_split(range(len(pixels)), test_size=0.2, random_state=0, stratify=digits.target)
    names = [str(name) for name in digits.target_names]
    train, val = (ListSource([(f"digit-{i}", int(digits.target[i])) for i in part], names, partial(_array_row, pixels)) for part in rows)
    return train, val


def _folder(config: CfgNode, split: str, class_names: list[str] | None = None) -> ListSource:
    """Opens DATA_PATH/split/CLASS/IMAGE. ``class_names`` are the training classes, to which validation is limited."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    root = _data_path(config) / split
    if not root.is_dir():
        raise DataError(f"there is no folder {root}; --data-path must contain {split}/CLASS/IMAGE for each class")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not found:
        raise DataError(f"{root} contains no class folders; expected {root}/CLASS/IMAGE")
    numbers = _number_classes(found, class_names, root)
    samples = make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=class_names is not None)
    return ListSource(samples, class_names or found, partial(open, mode="rb"))


def _by_name(config: CfgNode, split: str, source: ListSource) -> ListSource:
    """Returns the images of folders with vectors as targets: files of one name below several class folders are one image of all of these
    classes.

    Raises:
        DataError: the contents of two of them differ.
    """
    root = _data_path(config) / split
    paths: dict[Path, str] = {}  # of the first file, by its name below the class folder
    targets: dict[Path, np.ndarray] = {}
    for path, number in source.samples:
        name = Path(*Path(path).relative_to(root).parts[1:])
        first = paths.setdefault(name, path)
        if not (os.path.samefile(first, path) or filecmp.cmp(first, path, shallow=False)):
            raise DataError(f"{first} and {path} have one name, but are different images; with MODEL.TASK multi, files of one name are one "
                            "image of several classes: rename one of them")  # fmt: skip
        targets.setdefault(name, np.zeros(len(source.class_names), dtype=np.float32))[number] = 1
    return ListSource([(path, targets[name]) for name, path in paths.items()], source.class_names, source._read)


def _number_classes(found: list[str], class_names: list[str] | None, where: Path) -> dict[str, int]:
    unknown = sorted(set(found) - set(class_names or found))
    if unknown:
        raise DataError(f"{where} has {len(unknown)} classes that are missing from training: {', '.join(unknown[:20])}")
    return {name: number for number, name in enumerate(class_names or found)}


def _tables(config: CfgNode) -> tuple[ListSource, ListSource]:
    """Opens DATA_PATH/split.csv. For evaluations an image of the task "single" has the class with the largest of its numbers."""
    root = _data_path(config)
    train, val = (read_table(root / f"{split}.csv") for split in (config.DATA.TRAIN_SPLIT, config.DATA.VAL_SPLIT))
    names = read_class_names(root / config.DATA.CLASSES) if config.DATA.CLASSES else train.class_names
    if not names:
        raise DataError(f"{train.path}: no image has a class")
    note = ""
    if config.MODEL.TASK == "multi":
        check_class_names(names)
        targets = [train.of_several_classes(names, certain=False), val.of_several_classes(names, certain=True)]
    else:
        targets = [train.of_one_class(names), val.of_one_class(names)]
        if targets[1].ndim == 2:
            note = f"{val.path} has a number for each class: the evaluation takes the class with the largest one as the true one"
            targets[1] = targets[1].argmax(axis=1)
    rows = [values.tolist() if values.ndim == 1 else list(values) for values in targets]
    read = partial(_file_in, root)
    return ListSource([*zip(train.images, rows[0])], names, read), ListSource([*zip(val.images, rows[1])], names, read, note)


def _cifar(config: CfgNode, training: bool) -> ListSource:
    from torchvision import datasets

    cls = getattr(datasets, CIFAR[config.DATA.DATASET])
    try:
        if distributed.rank() == 0:  # one process downloads
            cls(config.DATA.DATA_PATH or "data", train=training, download=True)
        distributed.barrier()
        dataset = cls(config.DATA.DATA_PATH or "data", train=training)
    except Exception as error:  # urllib, ssl and torchvision each raise their own types
        raise DataError(f"{cls.__name__} is not in {config.DATA.DATA_PATH or 'data'} and cannot be downloaded: {error}") from error
    samples = [(f"cifar-{i}", target) for i, target in enumerate(dataset.targets)]
    return ListSource(samples, list(dataset.classes), partial(_array_row, dataset.data))


def _tar(config: CfgNode, split: str, class_names: list[str] | None = None) -> ListSource:
    """Opens DATA_PATH/split.tar with CLASS/IMAGE inside (or a tar of tars) through timm's reader."""
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    path = _data_path(config) / f"{split}.tar"
    if not path.is_file():
        raise DataError(f"there is no archive {path}")
    try:
        reader = ReaderImageInTar(str(path), class_map="", cache_tarinfo=False)  # caching would write a pickle beside the archive
    except Exception as error:  # of a damaged archive tarfile and the reader raise nearly anything
        raise DataError(f"{path} cannot be read as a tar archive with CLASS/IMAGE inside: {error}") from error
    found = [reader.class_idx_to_name[i] for i in range(len(reader.class_idx_to_name))]
    numbers = _number_classes(found, class_names, path)
    renumber = [numbers[name] for name in found]
    samples = [(reader.filename(i), renumber[target]) for i, target in enumerate(reader.targets)]
    return ListSource(samples, class_names or found, _TarReader(reader, [name for name, _ in samples]))


def _hugging_face(config: CfgNode, split: str) -> ListSource:
    """Opens hfds/NAME, from the hub or a local folder, through timm's reader without decoding; DATA_PATH is the cache."""
    from timm.data.readers import create_reader

    try:
        reader = create_reader(config.DATA.DATASET, root=config.DATA.DATA_PATH or None, split=split)
    except Exception as error:  # ImportError, or anything that the hub's client raises
        raise DataError(f"DATA.DATASET={config.DATA.DATASET!r}, split {split!r} cannot be opened: {error}") from error
    class_names = [name for name, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1])]
    samples = [(f"{split}-{i}", target) for i, target in enumerate(reader.iter_targets())]
    return ListSource(samples, class_names, partial(_reader_row, reader))


def _file_in(root: Path, name: str) -> BinaryIO:
    return open(root / name, "rb")


def _array_row(pixels: np.ndarray, name: str) -> Image.Image:
    return Image.fromarray(pixels[_number(name)])


def _reader_row(reader: Any, name: str) -> BinaryIO:
    return reader[_number(name)][0]


def _number(name: str) -> int:
    """"digit-17" -> 17"""
    return int(name.rpartition("-")[2])


def _zip(config: CfgNode, split: str) -> ListSource:
    """Opens the release's archives: split.zip, and split_map.txt with a line "path<TAB>class number" per image."""
    archive = _data_path(config) / f"{split}.zip"
    listing = _data_path(config) / f"{split}_map.txt"
    for path in (archive, listing):
        if not path.is_file():
            raise DataError(f"there is no {path}; --zip needs {split}.zip and {split}_map.txt in --data-path")
    samples = []
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{listing} is not a text in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        name, tab, target = line.partition("\t")
        if not tab or not re.fullmatch(r"[0-9]{1,7}", target.strip()) or int(target) > LARGEST_CLASS:
            raise DataError(f"{listing}, line {number}: expected path<TAB>class number, at most {LARGEST_CLASS}, got {line!r}")
        samples.append((name, int(target)))
    if not samples:
        raise DataError(f"{listing} lists no images")
    # The map contains only class numbers; if each class has its own folder, the folders give the names.
    classes = 1 + max(target for _, target in samples)
    folders: dict[int, set[str]] = {}
    for name, number in samples:
        folders.setdefault(number, set()).add(name.partition("/")[0])
    named = len(folders) == classes and all(len(names) == 1 for names in folders.values())
    class_names = [next(iter(folders[i])) if named else str(i) for i in range(classes)]
    return ListSource(samples, class_names, _ZipReader(archive, [name for name, _ in samples], config.DATA.CACHE_MODE))


class _ZipReader:
    """Reads files from an archive. Each process opens its own handle, since a shared file position would mix up their reads."""

    def __init__(self, archive: Path, names: list[str], cache_mode: str):
        self.archive = archive
        self._file: tuple[int, zipfile.ZipFile] | None = None
        self._cache: dict[str, bytes] = {}
        try:
            self._open()
        except Exception as error:  # zipfile has several types, and so has struct
            raise DataError(f"{archive} cannot be read as a zip archive: {error}") from error
        if cache_mode != "no":
            for name in names if cache_mode == "full" else names[distributed.rank() :: distributed.world_size()]:
                with suppress(Exception):  # of a damaged entry, which is reported when it is asked for
                    self._cache[name] = self._read(name)

    def __call__(self, name: str) -> BinaryIO:
        return io.BytesIO(self._cache.get(name) or self._read(name))

    def _open(self) -> zipfile.ZipFile:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), zipfile.ZipFile(self.archive))
        return self._file[1]

    def _read(self, name: str) -> bytes:
        archive = self._open()
        if archive.getinfo(name).file_size > LARGEST_FILE:
            raise DataError(f"it has more than {LARGEST_FILE >> 20} MiB")
        return archive.read(name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}


class _TarReader:
    """Reads files by name through timm's reader, which keeps the archives open: each process has handles of its own, as above."""

    def __init__(self, reader: Any, names: list[str]):
        self.reader, self._process = reader, os.getpid()
        self._position = {name: i for i, name in enumerate(names)}

    def __call__(self, name: str) -> BinaryIO:
        if self._process != os.getpid():
            self._forget_handles()
            self._process = os.getpid()
        return self.reader[self._position[name]][0]

    def _forget_handles(self) -> None:
        pending = [self.reader.tar_state] if self.reader.root_is_tar else list(self.reader.tar_state.values())
        while pending:
            state = pending.pop()
            state.tf = None
            pending += state.children.values()

    def __getstate__(self) -> dict:
        self._forget_handles()
        return self.__dict__


def _data_path(config: CfgNode) -> Path:
    if not config.DATA.DATA_PATH:
        raise DataError(f"DATA.DATASET={config.DATA.DATASET!r} needs --data-path")
    return Path(config.DATA.DATA_PATH)
