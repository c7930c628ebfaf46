# SPDX-License-Identifier: Apache-2.0
"""The picture of what a network is trained on: a few images as evaluation sees them, and as the augmentation changes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from yacs.config import CfgNode

from data.dataset import ImageDataset
from data.transforms import build_transform, denormalise
from litv2.errors import listed
from litv2.files import atomic_write

__all__ = ["SAMPLES", "draw_samples"]

SAMPLES = "samples.png"
ROWS, COLUMNS = 5, 6


def draw_samples(images: ImageDataset, class_names: list[str], config: CfgNode, path: Path) -> None:
    """Draws images of classes far apart, a row each: first as evaluation prepares it, then augmented, each time with another seed.

    Mixup and CutMix, which combine the images of a batch, are not shown.
    """
    from matplotlib.figure import Figure

    targets = [int(np.argmax(target)) if isinstance(target, np.ndarray) else target for _, target in images.source.samples]
    order = np.argsort(targets, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, ROWS).astype(int))].tolist()
    plain = ImageDataset(images.source, build_transform(config, training=False), images.mode)
    figure = Figure(figsize=(1.8 * COLUMNS, 2 * len(chosen)), layout="constrained")
    figure.suptitle("Each row: an image as evaluation sees it, then five times as training does", fontsize=9)
    for number, (row, index) in enumerate(zip(figure.subplots(len(chosen), COLUMNS, squeeze=False), chosen)):
        samples = [plain[index], *(images[index, number * COLUMNS + column] for column in range(1, COLUMNS))]
        for axis, sample in zip(row, samples):
            axis.set_axis_off()
            if sample.image is not None:
                picture = denormalise(sample.image[None], config)[0].permute(1, 2, 0).squeeze(-1)
                axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
        target = images.source.samples[index][1]
        names = [class_names[i] for i in np.flatnonzero(target)] if isinstance(target, np.ndarray) else [class_names[target]]
        row[0].set_title(listed(names, 3), fontsize=8, loc="left")
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=80)
