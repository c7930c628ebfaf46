# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation where an image has any number of classes. Classes that no image has are left out of means over classes."""

from __future__ import annotations

import numpy as np

from litv2 import mean_precision
from litv2.errors import UserError


def figures(targets: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Mean average precision and F1 in percent, and the binary cross-entropy, mean over images and classes.

    Args:
        targets: (N, classes), 0 or 1.
        logits: (N, classes).

    Raises:
        UserError: no image has a class, or a logit is not finite.
    """
    from sklearn.metrics import average_precision_score

    present = targets.any(axis=0)
    if not present.any():
        raise UserError("no validation image that can be read has a class: there is nothing to measure")
    if not np.isfinite(logits).all():
        raise UserError("the outputs of the model for validation images are not finite numbers")
    f1 = f1_scores(targets, logits >= 0)
    return dict(
        map=100 * float(average_precision_score(targets[:, present], logits[:, present], average="macro")),
        f1_macro=100 * f1["macro"],
        f1_micro=100 * f1["micro"],
        loss=float((np.logaddexp(0, logits, dtype=np.float64) - targets * logits).mean()),
    )


def by_class(targets: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns precision, recall, F1 and support of each class (4, classes); 0 where there is nothing to divide by.

    Counted here, since scikit-learn takes a single column for a choice between two classes.

    Args:
        targets, predicted: (N, classes), 0 or 1.
    """
    hits, found, true = _counts(targets, predicted)
    return np.array([hits / np.maximum(found, 1), hits / np.maximum(true, 1), 2 * hits / np.maximum(found + true, 1), true])


def f1_scores(targets: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Returns the mean F1 of the classes that an image has ("macro"), and F1 of all decisions together ("micro")."""
    hits, found, true = (part.sum() for part in _counts(targets, predicted))
    macro = by_class(targets, predicted)[2, targets.any(axis=0)].mean()
    return dict(macro=float(macro), micro=float(2 * hits / max(found + true, 1)))


def _counts(targets: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each class (classes,): images that have it and are found, that are found, and that have it."""
    targets, predicted = targets.astype(bool), predicted.astype(bool)
    return tuple(part.sum(axis=0) for part in (targets & predicted, predicted, targets))


def best_thresholds(targets: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Returns the threshold (classes,) that gives each class the largest F1 on these images; 1/2 for a class that no image has.

    It lies half-way between the lowest score that it accepts and the next one below, so that rounding does not matter. Of several that
    are equally good it is the highest.

    Args:
        targets: (N, classes), 0 or 1.
        scores: (N, classes), in [0, 1].
    """
    found = np.full(targets.shape[1], 0.5)
    for i in np.flatnonzero(targets.any(axis=0)):
        order, ends = mean_precision.ranking(scores[:, i])
        hits = np.cumsum(targets[order, i])[ends]
        f1 = 2 * hits / (ends + 1 + hits[-1])  # 2 TP / (predicted + true)
        levels = np.append(scores[order, i][ends].astype(np.float64), 0)
        best = int(f1.argmax())
        found[i] = (levels[best] + levels[best + 1]) / 2
    return found


def map_interval(targets: np.ndarray, logits: np.ndarray) -> list[float]:
    """Returns the ends of the 95 % interval of the mean average precision in percent, of a bootstrap over images."""
    return mean_precision.interval(mean_precision.resampled(targets, logits)[1])


def chance_interval(targets: np.ndarray, logits: np.ndarray) -> list[float]:
    """Returns between which values in percent the mean average precision of 95 % of the random orders of the images lies.

    The scores of an image stay together, as the classes of an image do.
    """
    count = len(targets)
    rng, all_of_them = np.random.default_rng(0), np.ones((1, count))
    samples = []
    for part in np.array_split(np.arange(mean_precision.SAMPLES), mean_precision.PARTS):
        orders = rng.permuted(np.tile(np.arange(count), (len(part), 1)), axis=1)
        precisions = [mean_precision.average_precision(target[orders], score, all_of_them) for target, score in zip(targets.T, logits.T)]
        samples.append(mean_precision.mean_over_classes(precisions))
    return mean_precision.interval(np.concatenate(samples))


def chance(targets: np.ndarray) -> np.ndarray:
    """Returns the average precision (classes,) that images in random order have in the mean (Bestgen, PBML 103, 2015).

    It is above the share of images that have the class, and far above it for a class of few images.
    """
    count, positives = len(targets), targets.sum(axis=0, dtype=np.float64)
    first = (1 / np.arange(1, count + 1)).mean()  # the average precision of one image that has the class, alone
    return first + (positives - 1) / max(count - 1, 1) * (1 - first)


def probabilities(logits: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    return expit(logits.astype(np.float64))
