# SPDX-License-Identifier: Apache-2.0
"""What the training data are, in a few lines of the log: from the list of images alone, none of which is read."""

from __future__ import annotations

from typing import Any

import numpy as np
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.loader import Loaders
from data.sources import FOLDERS
from litv2.errors import listed

__all__ = ["summarise"]

SMALLEST = 5  # classes that are named


def summarise(loaders: Loaders, config: CfgNode) -> list[str]:
    """Returns at most five lines; none for a streaming reader, which does not know its images."""
    data = [loader.dataset for loader in (loaders.train, loaders.val) if isinstance(loader.dataset, ImageDataset)]
    if len(data) < 2:
        return []
    names = loaders.class_names
    train, val = (_counts(images, len(names)) for images in data)
    lines = [
        f"{what}: {len(images)} images of {(counts > 0).sum()} classes, {counts.max()} in the largest and {counts.min()} in the smallest"
        for what, images, counts in zip(("training data", "validation data"), data, (train, val))
    ]
    if train.max() > train.min():
        smallest = np.argsort(train, kind="stable")[:SMALLEST]
        lines.append(f"the smallest classes: {', '.join(f'{names[i]} {train[i]}' for i in smallest)}")
    if (absent := np.flatnonzero(val == 0)).size:
        lines.append(f"classes without validation images: {listed(names[i] for i in absent)}")
    if config.DATA.DATASET in FOLDERS and not config.DATA.ZIP_MODE:
        lines.append(f"python -m litv2 check-data {config.DATA.DATA_PATH} finds unreadable images, duplicates and leaks")
    return lines


def _counts(images: ImageDataset, classes: int) -> np.ndarray:
    """The images of each class; one of several classes, or with shares of them, counts for each."""
    targets: list[Any] = [target for _, target in images.source.samples]
    if isinstance(targets[0], np.ndarray):
        return (np.stack(targets) > 0).sum(axis=0)
    return np.bincount(targets, minlength=classes)
