# SPDX-License-Identifier: Apache-2.0
"""Average precision of a class, and its mean over classes in samples of the images, for intervals."""

from __future__ import annotations

import numpy as np

__all__ = ["average_precision", "interval", "mean_over_classes", "ranking", "resampled"]

SAMPLES = 1000  # from which an interval is computed,
PARTS = 20  # one part after the other, to save memory


def average_precision(target: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the average precision (B,) of a class, as scikit-learn defines it, for B targets or B weightings of the images.

    Args:
        target: (N,) or (B, N), 0 or 1.
        score: (N,).
        weights: (B, N) or (1, N), how often each image counts.

    Returns:
        NaN where no image with a weight has the class.
    """
    order, ends = ranking(score)
    seen = np.cumsum(weights[:, order], axis=1)[:, ends]
    hits = np.cumsum(weights[:, order] * target[..., order], axis=1)[:, ends]
    with np.errstate(invalid="ignore"):
        return (np.diff(hits, axis=1, prepend=0) * hits / np.maximum(seen, 1)).sum(axis=1) / hits[:, -1]


def mean_over_classes(precisions: list[np.ndarray]) -> np.ndarray:
    """Returns the mean (B,) of the average precisions of the classes, without those that are NaN."""
    values = np.stack(precisions)
    known = ~np.isnan(values)
    return np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def resampled(targets: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Returns the mean average precision, and that of ``SAMPLES`` drawings of as many images with replacement: the same drawings for the
    same number of images, so that two classifiers can be compared on each.

    An image that is drawn twice raises the precision of its classes, so the samples are too good in the mean, for few images by far
    more than the interval's width. They are shifted so that their mean is the measured value. A class that a sample does not have is
    left out of its mean.

    Args:
        targets: (N, classes), 0 or 1.
        scores: (N, classes).
    """
    count, rng = len(targets), np.random.default_rng(0)

    def weighted(weights: np.ndarray) -> np.ndarray:
        return mean_over_classes([average_precision(target, score, weights) for target, score in zip(targets.T, scores.T)])

    measured = float(weighted(np.ones((1, count)))[0])
    parts = [len(part) for part in np.array_split(np.arange(SAMPLES), PARTS)]
    means = np.concatenate([weighted(rng.multinomial(count, np.full(count, 1 / count), size=size)) for size in parts])
    return measured, means - means.mean() + measured


def interval(values: np.ndarray, least: float = 0.0) -> list[float]:
    """Returns the middle 95 % of the values in percent, within ``least`` and 1, beyond which shifted samples may reach."""
    return [round(100 * float(value), 3) for value in np.percentile(values, [2.5, 97.5]).clip(least, 1)]


def ranking(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of the images, the highest score first, and the last place of each score in it."""
    order = np.argsort(-score, kind="stable")
    return order, np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
