# SPDX-License-Identifier: Apache-2.0
"""The classes of a classifier: their names, and whether an image has one of them or any number."""

from __future__ import annotations

import re

from .errors import MissingPackage, UserError

__all__ = ["class_names", "imagenet_classes", "task_in", "thresholds"]


def class_names(content: dict, classes: int) -> list[str]:
    """Returns the checkpoint's class names, else ImageNet's if there are 1000, else numbers. WordNet IDs are replaced by words."""
    names = content.get("class_names")
    if names is not None and (not isinstance(names, list) or len(names) != classes):
        raise UserError(
            f"the checkpoint lists {len(names) if isinstance(names, list) else 'no valid'} class names, but its classifier has {classes}"
        )
    if names is None and classes != 1000:
        return [f"class {i}" for i in range(classes)]
    names = names and [str(name) for name in names]
    if names and not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    descriptions = imagenet_classes()
    return [descriptions.get(name, name) for name in map(str, names)] if names else list(descriptions.values())


def imagenet_classes() -> dict[str, str]:
    """Returns the WordNet IDs of ImageNet's 1000 classes, in the order of the classifiers' outputs, and what they mean in words."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:
        raise MissingPackage(f"{error}; ImageNet's class names need timm: pip install timm") from error

    imagenet = ImageNetInfo()
    return {str(imagenet.index_to_label_name(i)): str(imagenet.index_to_description(i)) for i in range(1000)}


def task_in(content: dict) -> str:
    """Returns MODEL.TASK of the trainer's checkpoint: "single", an image has one class, or "multi", it has any number of them.

    Raises:
        UserError: it is neither.
    """
    config = content.get("config")
    model = config.get("MODEL") if isinstance(config, dict) else None
    task = model.get("TASK", "single") if isinstance(model, dict) else "single"
    if task not in ("single", "multi"):
        raise UserError(f"the checkpoint's MODEL.TASK must be single or multi, got {task!r}")
    return task


def thresholds(content: dict, classes: int) -> list[float] | None:
    """Returns from which score on a class counts as found, if an image may have several: the checkpoint's, else 1/2. Otherwise None.

    Raises:
        UserError: the checkpoint's are not ``classes`` numbers in [0, 1].
    """
    if task_in(content) == "single":
        return None
    found = content.get("thresholds")
    if found is None:
        return [0.5] * classes
    if not isinstance(found, list) or len(found) != classes or not all(type(value) is float and 0 <= value <= 1 for value in found):
        raise UserError(f"the checkpoint's thresholds must be {classes} numbers in [0, 1], got {found!r}")
    return found
