# SPDX-License-Identifier: Apache-2.0
"""Evaluation of an ImageNet classifier on data sets with some of its 1000 classes, such as ImageNet-A, -R and -V2."""

from __future__ import annotations

from collections.abc import Sequence

from data.sources import DataError
from litv2 import LITv2
from litv2.classes import imagenet_classes
from litv2.errors import listed

__all__ = ["imagenet_outputs", "keep_outputs"]


def imagenet_outputs(folders: Sequence[str]) -> list[int]:
    """Returns the outputs of an ImageNet classifier for folders that are named by WordNet IDs or, as in ImageNet-V2, 0 to 999.

    Raises:
        DataError: there are other names.
    """
    wordnet_ids = {name: i for i, name in enumerate(imagenet_classes())}
    numbers = {str(i): i for i in range(len(wordnet_ids))}
    names = numbers if folders and folders[0] in numbers else wordnet_ids
    if unknown := [folder for folder in folders if folder not in names]:
        expected = "numbers from 0 to 999" if names is numbers else "WordNet IDs of ImageNet's 1000 classes"
        raise DataError(f"DATA.CLASS_MAP=imagenet: {len(unknown)} folders are no {expected}: {listed(unknown)}")
    return [names[folder] for folder in folders]


def keep_outputs(model: LITv2, outputs: Sequence[int]) -> None:
    """Reduces the classifier to these outputs, in this order: their logits are as before, and the softmax is over them alone."""
    weights = model.state_dict()
    model.reset_classifier(len(outputs))
    model.load_state_dict(weights | {name: weights[name][list(outputs)] for name in ("head.weight", "head.bias")})
