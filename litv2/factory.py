"""Models by name, with their weights, and the model that a file of weights holds.

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
    """A classifier of the zoo by its name.

    Args:
        pretrained: None or False for random weights, True for the published ones, or where to take them from: another name, a path or
            a URL, of any format that :func:`litv2.weights.state_dict.find_weights` knows.
        kwargs: arguments of :class:`litv2.LITv2` that differ from the published model's. With another ``num_classes`` than the
            file's the head keeps its initialisation, which is warned about; with 0 the file's head is left out.

    Raises:
        UserError: an unknown name, or weights that do not fit.
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
    """A classifier from a file.

    Attributes:
        model: with the file's weights.
        content: of the checkpoint.
        image_size: side of its evaluation images in pixels.
        crop: whether these are crops of larger images.
        notes: lines that say what the file does not tell and was assumed.
    """

    model: LITv2
    content: dict
    image_size: int
    crop: bool
    notes: list[str]


def load_model(source: str | Path, name: str | None = None) -> LoadedModel:
    """The classifier in a file, of the architecture and the classes that the file has.

    Args:
        source: a path, a URL or a name of the zoo.
        name: the model's name in the zoo; None for what the weights' shapes and the checkpoint's configuration say.

    Raises:
        UserError: no weights of a classifier, or weights of another model.
        OSError: the weights cannot be found or downloaded.
    """
    release = lookup(name, task="classification") if name else release_of(source)
    content = read_checkpoint(fetch(source))
    weights, config = find_weights(content), content.get("config")
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    if not classes:
        raise UserError(f"{source} has no classifier: detectors and segmenters are used through their configurations")
    notes = []
    try:
        if name:
            model = create_model(name, num_classes=classes)
        else:
            arguments, guessed = infer_arguments(weights, config)
            model = LITv2(**arguments)
            if guessed and (release is None or arguments["local_ws"] != release.window):
                heads, windows = (" ".join(map(str, arguments[key])) for key in ("num_heads", "local_ws"))
                notes.append(f"{source} does not say its heads and windows: they are taken to be {heads} and {windows}, as published")
        load_weights(model, weights)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    known = evaluation_size(config, release)
    if known is None:
        notes.append(f"{source} does not say the size of its images; the default is 224 x 224")
    image_size, crop = known or (224, True)
    return LoadedModel(model, content, image_size, crop, notes)
