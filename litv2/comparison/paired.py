# SPDX-License-Identifier: Apache-2.0
"""Two classifiers on the same images: their difference, its interval, and for one class per image an exact test of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..mean_precision import interval, resampled

__all__ = ["Paired", "compare_mean_precision", "compare_paired", "holm"]

NORMAL_95 = 1.959963984540054  # standard deviations


@dataclass(frozen=True)
class Paired:
    """Attributes:
    only_first, only_second: how many images only one of the two classifies correctly.
    difference, low, high: accuracy of the second minus that of the first in per cent, and its 95 % interval.
    p: of McNemar's test.
    """

    only_first: int
    only_second: int
    difference: float
    low: float
    high: float
    p: float


def compare_paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares which images two classifiers get right.

    McNemar's exact test: if both were equally good, each image that only one gets right would be a throw of a fair coin. The interval is
    Wald's with half an image added to each of the four counts (Agresti and Min, Statistics in Medicine 24, 2005).

    Args:
        first, second: (N,) bool, of the same images.
    """
    from scipy.stats import binomtest

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    discordant = only_first + only_second
    p = float(binomtest(only_second, discordant).pvalue) if discordant else 1.0
    n, change = len(first) + 2, only_second - only_first
    middle, error = change / n, math.sqrt(discordant + 1 - change**2 / n) / n
    low, high = 100 * (middle - NORMAL_95 * error), 100 * (middle + NORMAL_95 * error)
    return Paired(only_first, only_second, 100 * change / len(first), low, high, p)


def compare_mean_precision(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Returns the mean average precision of the second minus that of the first in per cent, and the ends of its 95 % interval.

    The interval is a bootstrap over images: each sample has the same images for both.

    Args:
        targets: (N, classes), 0 or 1.
        first, second: (N, classes), scores of the same images.
    """
    (before, samples_before), (after, samples_after) = (resampled(targets, scores) for scores in (first, second))
    low, high = interval(samples_after - samples_before, least=-1.0)
    return 100 * (after - before), low, high


def holm(p: Sequence[float]) -> list[float]:
    """Returns p values that are adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted
