# SPDX-License-Identifier: Apache-2.0
"""Labels that a model's features contradict: the images nearest to an image are of another class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import MissingPackage

__all__ = ["NEIGHBOURS", "Suspicion", "suspicious_labels", "votes"]

NEIGHBOURS = 20


@dataclass(frozen=True)
class Suspicion:
    """The label of image number ``image`` may be wrong: of its neighbours, ``share`` are ``suggested`` and ``own_share`` of its class."""

    image: int
    suggested: str
    share: float
    own_share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} of the images like it are {self.suggested}, {self.own_share:.0%} of its class"


def votes(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns of each image the share of each class among its nearest neighbours in cosine distance, itself left out: (N, classes).

    Args:
        features: (N, D).
        labels: (N,) numbers of classes.
    """
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    count = min(NEIGHBOURS, len(labels) - 1)
    nearest = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(normalize(features)).kneighbors(return_distance=False)
    return np.stack([np.bincount(row, minlength=labels.max() + 1) for row in labels[nearest]]) / count


def suspicious_labels(features: np.ndarray, labels: Sequence[str]) -> list[Suspicion]:
    """Returns the labels that are probably wrong, the least supported first.

    Confident learning (Northcutt, Jiang and Chuang, arXiv 1911.00068), by the authors' package cleanlab, on the votes of each image's
    neighbours: that method needs predictions that do not depend on the image's own label.

    Args:
        features: (N, D).
        labels: N names of classes.

    Raises:
        MissingPackage: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise MissingPackage(f"{error}; suspicious labels need: pip install 'litv2[check]'") from error
    names, own = np.unique(np.array(labels), return_inverse=True)
    if len(names) < 2:
        return []
    shares = votes(features, own)
    # The confident joint says how many labels are wrong; those with the least support are reported. Of cleanlab's rules this one finds
    # most of the labels that were changed on purpose, among as many reports.
    wrong = np.flatnonzero(find_label_issues(own, shares, filter_by="low_self_confidence", n_jobs=1)).tolist()
    best = shares.argmax(axis=1)
    found = [Suspicion(i, str(names[best[i]]), float(shares[i, best[i]]), float(shares[i, own[i]])) for i in wrong if best[i] != own[i]]
    return sorted(found, key=lambda suspicion: (suspicion.own_share, -suspicion.share))
