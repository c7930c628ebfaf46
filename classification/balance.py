# SPDX-License-Identifier: Apache-2.0
"""Class weights: how much an image counts in the loss, by its class."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from data.loader import Loaders
from litv2.errors import UserError, listed

WEIGHTINGS = ("none", "inverse", "effective", "auto")  # anything else is a file


def build_weighted_loss(config: CfgNode, loaders: Loaders, log: Callable[[str], object]) -> WeightedCrossEntropy:
    """Builds the loss that TRAIN.CLASS_WEIGHTS asks for. Raises UserError as ``class_weights`` does."""
    weighting, names = config.TRAIN.CLASS_WEIGHTS, loaders.class_names
    weights = class_weights(weighting, config.TRAIN.CLASS_WEIGHTS_BETA, names, loaders.class_counts)
    low, high = int(weights.argmin()), int(weights.argmax())
    log(f"class weights ({weighting}): from {weights[low]:.3g} ({names[low]}) to {weights[high]:.3g} ({names[high]})")
    return WeightedCrossEntropy(weights, config.MODEL.LABEL_SMOOTHING)


def class_weights(weighting: str, beta: float, class_names: Sequence[str], counts: Sequence[int] | None) -> Tensor:
    """Returns the weight of each class (classes,), scaled so that the mean weight over the training images is 1.

    "inverse" is 1 / n for a class of n images. "effective" is 1 / (1 - beta ** n), the inverse of its effective number of images (arXiv
    1901.05555, equation 2, times a constant): beta = 0 weights all classes alike, and towards 1 it becomes "inverse". "auto" is
    "effective" with beta = 1 - 1 / N for N images per class in the mean, so that beta need not be chosen. Anything else is a CSV file
    with the columns class and weight.

    Args:
        counts: training images of each class in the whole data set; None if unknown, as of a streaming reader.

    Raises:
        UserError: the counts are unknown, or the file is missing or does not give each class one positive weight.
    """
    if counts is None:
        raise UserError(f"TRAIN.CLASS_WEIGHTS={weighting} needs the number of images of each class, which a streaming reader does not know")
    images = torch.tensor(counts, dtype=torch.float64)
    present = images.clamp(min=1)  # a class without training images has no part in the loss
    if weighting == "inverse":
        weights = 1 / present
    elif weighting in ("effective", "auto"):
        beta = 1 - 1 / images[images > 0].mean().item() if weighting == "auto" else beta
        weights = 1 / (1 - beta**present)
    else:
        weights = torch.tensor(_read(Path(weighting), class_names), dtype=torch.float64)
    return (weights * images.sum() / (weights * images).sum()).float()


def _read(path: Path, class_names: Sequence[str]) -> list[float]:
    if not path.is_file():
        raise UserError(f"TRAIN.CLASS_WEIGHTS={path} is neither {', '.join(WEIGHTINGS)} nor a file")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8: {error}") from error
    if missing := [column for column in ("class", "weight") if column not in columns]:
        raise UserError(f"{path} has no column {' and '.join(missing)}; it needs class and weight, got {listed(columns)}")
    known, listings = set(class_names), Counter(row["class"] for row in rows)
    for what, found in (
        ("does not know the classes", [name for name in class_names if name not in listings]),
        ("has classes that the training data has not", [name for name in listings if name not in known]),
        ("has more than one row for", [name for name, count in listings.items() if count > 1]),
    ):
        if found:
            raise UserError(f"{path} {what}: {listed(found)}")
    weights = {row["class"]: _number(row["weight"]) for row in rows}
    if wrong := [row for row in rows if not 0 < weights[row["class"]] < math.inf]:
        raise UserError(f"{path}: the weight of {wrong[0]['class']} must be a positive number, got {wrong[0]['weight']!r}")
    return [weights[name] for name in class_names]


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return math.nan


class WeightedCrossEntropy(nn.Module):
    """Cross-entropy in which an image counts with the weight of its class: the sum of weight times loss, divided by the batch size.

    Since it is not divided by the sum of the batch's weights, the mean over batches, processes or accumulated steps of one size is that
    over all their images. Without smoothing it is torch's ``CrossEntropyLoss(weights, reduction="sum")`` divided by the batch size. Torch
    weights the smoothed part of the target, too, which would favour rare classes for every image; here each image's whole loss is
    weighted. The loss of a mixed image is the mix of the weighted losses of its two classes.

    Args:
        weights: of the classes (C,).
        smoothing: label smoothing, which soft targets already contain.

    Shape:
        logits (B, C), and class numbers (B,) or timm's soft targets (B, C) -> a scalar.
    """

    weights: Tensor

    def __init__(self, weights: Tensor, smoothing: float = 0.0):
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        classes = logits.shape[1]
        if targets.dim() == 1:
            shares = F.one_hot(targets, classes).to(logits.dtype)
        else:  # as they were before smoothing
            shares = (targets - self.smoothing / classes) / (1 - self.smoothing)
        weighted = shares * self.weights  # (B, C)
        smoothed = (1 - self.smoothing) * weighted + self.smoothing / classes * weighted.sum(dim=1, keepdim=True)
        return -(smoothed * logits.log_softmax(dim=1)).sum(dim=1).mean()
