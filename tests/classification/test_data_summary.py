# SPDX-License-Identifier: Apache-2.0
"""What the log says of the data, without reading them."""

from __future__ import annotations

from config import load_config
from data import build_loaders
from data.sources import ListSource
from data_summary import summarise
from helpers import ROOT, write_images

DIGITS = ROOT / "classification/configs/litv2-digits.yaml"


def loaders_of(*overrides):
    config = load_config(DIGITS, ["DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 4, *overrides])
    return build_loaders(config), config


def test_five_lines_of_unequal_classes(tmp_path, monkeypatch):
    write_images(tmp_path / "train", {"ant": 3, "bee": 6, "cat": 1, "dog": 2, "eel": 4, "fox": 5, "gnu": 2}, size=8)
    write_images(tmp_path / "val", {"ant": 2, "bee": 1, "fox": 1}, size=8)
    loaders, config = loaders_of("DATA.DATASET", "folder", "DATA.DATA_PATH", str(tmp_path))
    monkeypatch.setattr(ListSource, "__getitem__", None)  # no image is read
    assert summarise(loaders, config) == [
        "training data: 23 images of 7 classes, 6 in the largest and 1 in the smallest",
        "validation data: 4 images of 3 classes, 2 in the largest and 0 in the smallest",
        "the smallest classes: cat 1, dog 2, gnu 2, ant 3, eel 4",
        "classes without validation images: cat, dog, eel, gnu",
        f"python -m litv2 check-data {tmp_path} finds unreadable images, duplicates and leaks",
    ]


def test_other_sources():
    first, second, third = summarise(*loaders_of())
    assert first.startswith("training data: 1437 images of 10 classes") and second.startswith("validation data: 360 images of 10 classes")
    assert third.startswith("the smallest classes: ")
