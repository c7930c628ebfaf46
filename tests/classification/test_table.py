# SPDX-License-Identifier: Apache-2.0
"""Data sets as tables: what they mean, and one line for each thing that may be wrong."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from config import load_config
from data.loader import build_loaders
from data.sources import open_sources
from data.table import read_table
from helpers import ROOT, write_images
from litv2.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six images in a folder "photos", of which only the names matter here."""
    return write_images(tmp_path_factory.mktemp("tables") / "photos", {"a": 6}, size=32)


def config(root, *overrides):
    path = ROOT / "classification/configs/litv2-digits.yaml"
    return load_config(path, ["DATA.DATASET", "csv", "DATA.DATA_PATH", str(root), "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 3, *overrides])


@pytest.fixture
def opened(images):
    """Opens a data set of these tables: {image number: cells}, after a header."""

    def open_these(header: str, train: dict[int, str], val: dict[int, str], *overrides, classes: str = ""):
        for name, rows in (("train", train), ("val", val)):
            lines = [header, *(f"photos/a/{number}.png,{cells}" for number, cells in rows.items())]
            (images.parent / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")  # as Excel writes it
        (images.parent / "classes.txt").write_text(classes)
        return open_sources(config(images.parent, *overrides, *(["DATA.CLASSES", "classes.txt"] if classes else [])))

    return open_these


def targets(source) -> list:
    return [np.asarray(target).tolist() for _, target in pickle.loads(pickle.dumps(source)).samples]


def test_labels(opened):
    train, val = opened("image,labels", {0: "dog", 1: " cat "}, {2: "cat"})
    assert train.class_names == val.class_names == ["cat", "dog"]
    assert (targets(train), targets(val), val.note) == ([1, 0], [0], "")
    assert train.filename(1) == "photos/a/1.png" and train[1][0].read(4) == b"\x89PNG"
    several = opened("image,labels,place", {0: "dog|cat,x", 1: ",y", 2: "owl,z"}, {3: "owl | dog,x"}, "MODEL.TASK", "multi")
    assert several[0].class_names == ["cat", "dog", "owl"]
    assert [targets(source) for source in several] == [[[1, 1, 0], [0, 0, 0], [0, 0, 1]], [[0, 1, 1]]]
    _, val = opened("image,labels", {0: "dog"}, {3: "owl"}, classes="owl\ndog\ncat\n")
    assert val.class_names == ["owl", "dog", "cat"] and targets(val) == [0]


def test_a_column_per_class(opened):
    shares = {0: "0.25,0.75", 1: "1,0"}
    train, val = opened("image,dog,cat", shares, shares)
    assert train.class_names == ["cat", "dog"] and targets(train) == [[0.75, 0.25], [0, 1]]
    assert targets(val) == [0, 1] and "the class with the largest one as the true one" in val.note
    train, val = opened("image,dog,cat", {0: "0.9,0.8"}, {1: "1,0"}, "MODEL.TASK", "multi", classes="dog\ncat")
    assert np.allclose(targets(train), [[0.9, 0.8]]) and targets(val) == [[1, 0]] and val.note == ""


def test_batches(opened, images):
    opened("image,dog,cat", dict.fromkeys(range(4), "0.5,0.5"), {4: "1,0"})
    loaders = build_loaders(config(images.parent))
    batch, evaluated = next(iter(loaders.train)), next(iter(loaders.val))
    assert loaders.vectors and batch.targets.dtype == torch.float32 and batch.targets.tolist() == [[0.5, 0.5]] * 3
    assert evaluated.targets.dtype == torch.int64 and evaluated.targets.tolist() == [1] and loaders.note
    for setting in (("DATA.SAMPLING", "balanced"), ("TRAIN.CLASS_WEIGHTS", "inverse")):
        with pytest.raises(UserError, match="need one class per image"):
            build_loaders(config(images.parent, *setting))


MULTI = ("MODEL.TASK", "multi")


@pytest.mark.parametrize(
    "header, train, val, overrides, words",
    [
        ("image,labels", {0: "a|b"}, {1: "a"}, (), r"train.csv, line 2: expected one class in 'labels', got 'a\|b'; .* MODEL.TASK multi"),
        ("image,labels", {0: "a", 1: ""}, {1: "a"}, (), "train.csv, line 3: expected one class in 'labels', got ''"),
        ("image,labels", {0: "a"}, {1: "a", 2: "c"}, (), "val.csv has 1 classes that are missing from training or DATA.CLASSES: c"),
        ("image,labels", {0: "a||b"}, {1: "a"}, MULTI, "line 2: expected names of classes separated by '|', each once, got 'a||b'"),
        ("image,labels", {0: "a|a"}, {1: "a"}, MULTI, "each once, got 'a|a'"),
        ("image,labels", {0: ""}, {1: "a"}, MULTI, "train.csv: no image has a class"),
        ("image,labels", {0: "a"}, {1: ""}, MULTI, "val.csv: no image has a class"),
        ("image,a,b", {0: "0.5,0.4"}, {1: "1,0"}, (), "line 2: the numbers of the classes must sum to 1, got 0.9"),
        ("image,a,b", {0: "1.5,0"}, {1: "1,0"}, MULTI, r"line 2: expected a number in \[0, 1\] for 'a', got '1.5'"),
        ("image,a,b", {0: "nan,0"}, {1: "1,0"}, MULTI, "got 'nan'"),
        ("image,a,b", {0: "yes,0"}, {1: "1,0"}, MULTI, "got 'yes'"),
        ("image,a,b", {0: "0.5,0"}, {1: "1,0.5"}, MULTI, "val.csv, line 2: an evaluation needs 0 or 1, got 0.5 for 'b'"),
        ("image,a,b", {0: "1"}, {1: "1,0"}, MULTI, "line 2: expected 3 cells as in line 1, got 2"),
        ("file,labels", {0: "a"}, {1: "a"}, (), "line 1: expected the columns image, and labels or one per class, got file, labels"),
        ("image;labels", {}, {}, (), "line 1: expected the columns image, .*, got image;labels"),
        ("image,a,a", {0: "1,0"}, {1: "1,0"}, (), "line 1: the columns must have names, each once, got image, a, a"),
        ("", {}, {}, (), "train.csv is empty"),
        ("image,labels", {}, {1: "a"}, (), "train.csv lists no images"),
        ("image,labels", {0: "a", 77: "a"}, {1: "a"}, (), r"train.csv: 1 of 2 images are not in .*: photos/a/77.png"),
        ("image,labels", {0: 'a\nphotos//a/0.png,"b"'}, {1: "a"}, (), "photos/a/0.png is in lines 2 and 3; an image has"),
        ("image,labels", {0: '"a'}, {1: "a"}, (), "is not a table of comma-separated values in UTF-8"),
    ],
)  # fmt: skip
def test_wrong_tables(opened, header, train, val, overrides, words):
    with pytest.raises(UserError, match=words):
        opened(header, train, val, *overrides)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "photos/../../secret.png", "C:\\secret.png", "..\\secret.png"])
def test_no_path_leaves_the_folder(tmp_path, path):
    root = write_images(tmp_path / "data", {"a": 1})
    (tmp_path / "secret.png").write_bytes((root / "a/0.png").read_bytes())
    (root / "train.csv").write_text(f"image,labels\n{path},a\n")
    with pytest.raises(UserError, match="line 2: the path of an image must lead into the folder of the table"):
        read_table(root / "train.csv")


def test_missing_files(opened, images):
    with pytest.raises(UserError, match="there is no file .*nowhere/train.csv; DATA.DATASET csv reads a table for each split"):
        open_sources(config("nowhere"))
    opened("image,labels", {0: "a"}, {1: "a"})
    for name, words in (("none.txt", "there is no file .*none.txt, which DATA.CLASSES names"), ("twice.txt", "each once, got a, a")):
        (images.parent / "twice.txt").write_text("a\na\n")
        with pytest.raises(UserError, match=words):
            open_sources(config(images.parent, "DATA.CLASSES", name))


def test_names_that_a_table_of_predictions_would_confuse(opened):
    with pytest.raises(UserError, match="the class 'image' must be renamed"):
        opened("image,labels", {0: "a|image"}, {1: "a"}, "MODEL.TASK", "multi")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("MODEL.TASK", "multi", "DATA.DATASET", "tar"), "MODEL.TASK multi needs DATA.DATASET csv or folder"),
        (("MODEL.TASK", "multi", "DATA.DATASET", "folder", "DATA.ZIP_MODE", True), "MODEL.TASK multi needs DATA.DATASET csv or folder"),
        (("MODEL.TASK", "multi", "DATA.DATASET", "folder", "DATA.CLASS_MAP", "imagenet", "EVAL_MODE", True), "DATA.CLASS_MAP is for MODEL"),
        (("DATA.CLASSES", "classes.txt", "DATA.DATASET", "digits"), "DATA.CLASSES='classes.txt' needs DATA.DATASET csv"),
        (("MODEL.TASK", "multi", "TEST.CORRUPTIONS", "fog"), "are for MODEL.TASK single only"),
        (("MODEL.TASK", "several"), "MODEL.TASK must be one of single, multi"),
        (("TRAIN.MULTI_LABEL_LOSS", "focal"), "TRAIN.MULTI_LABEL_LOSS must be one of bce, asymmetric"),
    ],
)  # fmt: skip
def test_wrong_settings(overrides, words):
    with pytest.raises(UserError, match=words):
        config(".", *overrides)
