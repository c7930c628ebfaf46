# SPDX-License-Identifier: Apache-2.0
"""Creates models by name, with their weights, and loads the model of a checkpoint.

    model = create_model("litv2_small", pretrained=True)           # the published weights, downloaded once
    model = create_model("litv2_base", pretrained="best.pth", num_classes=37)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .model import LITv2, litv2_base, litv2_medium, litv2_small
from .preprocess import evaluation_size
from .weights.architecture import infer_arguments
from .weights.download import fetch
from .weights.reading import read_checkpoint
from .weights.releases import lookup, release_of
from .weights.state_dict import find_weights, load_weights

__all__ = ["VARIANTS", "LoadedModel", "create_model", "load_model"]

VARIANTS = {"small": litv2_small, "medium": litv2_medium, "base": litv2_base}


def create_model(name: str, pretrained: bool | str | Path | None = None, **kwargs) -> LITv2:
    """Creates a classifier by its name in the zoo.

    Args:
        pretrained: None or False for random weights, True for the published ones, or the source of others: another name, a path or
            a URL, in any format that :func:`litv2.weights.state_dict.find_weights` supports.
        kwargs: arguments of :class:`litv2.LITv2` that override the published model's. If ``num_classes`` differs from the file's,
            the head keeps its initialisation, with a warning; with 0 the file's head is dropped.

    Raises:
        UserError: the name is unknown, or the weights do not fit.
        OSError: the weights cannot be found or downloaded.
    """
    entry = lookup(name, task="classification")
    model = VARIANTS[entry.variant](**{"alpha": entry.alpha, "local_ws": entry.window, **kwargs})
    if pretrained is None or pretrained is False:
        return model
    source = entry.name if pretrained is True else pretrained
    weights = find_weights(read_checkpoint(fetch(source)))
    unused = {"head.weight", "head.bias"} if model.num_classes == 0 else ()
    try:
        notes = load_weights(model, weights, new_heads=("head",), may_have=unused)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    for note in notes:
        if "newly" in note:
            warnings.warn(f"{source}: {note}", stacklevel=2)
    return model


@dataclass(frozen=True)
class LoadedModel:
    """A classifier loaded from a file.

    Attributes:
        model: the model with the file's weights.
        content: content of the checkpoint.
        image_size: side of the evaluation images in pixels.
        crop: whether the evaluation images are crops of larger ones.
        notes: what the file does not state and was therefore assumed, one line each.
    """

    model: LITv2
    content: dict
    image_size: int
    crop: bool
    notes: list[str]


def load_model(source: str | Path, name: str | None = None) -> LoadedModel:
    """Loads the classifier in a file, with the architecture and the classes of the file.

    Args:
        source: a path, a URL or a zoo name.
        name: the model's name in the zoo; None to infer the model from the shapes of the weights and the checkpoint's configuration.

    Raises:
        UserError: the file holds no classifier, or the weights of another model.
        OSError: the weights cannot be found or downloaded.
    """
    release = lookup(name, task="classification") if name else release_of(source)
    content = read_checkpoint(fetch(source))
    weights, config = find_weights(content), content.get("config")
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    if not classes:
        raise UserError(f"{source} holds no classifier; use detectors and segmenters through their configurations")
    notes = []
    try:
        if name:
            model = create_model(name, num_classes=classes)
        else:
            arguments, guessed = infer_arguments(weights, config)
            model = LITv2(**arguments)
            if guessed and (release is None or arguments["local_ws"] != release.window):
                heads, windows = (" ".join(map(str, arguments[key])) for key in ("num_heads", "local_ws"))
                notes.append(f"{source} does not state its heads and windows; assuming {heads} and {windows}, as published")
        load_weights(model, weights)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    known = evaluation_size(config, release)
    if known is None:
        notes.append(f"{source} does not state its image size; assuming 224 x 224")
    image_size, crop = known or (224, True)
    return LoadedModel(model, content, image_size, crop, notes)
