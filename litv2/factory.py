"""Models by name, with their weights, and the model that a file of weights holds.

    model = create_model("litv2_small", pretrained=True)           # the published weights, downloaded once
    model = create_model("litv2_base", pretrained="best.pth", num_classes=37)
"""

from __future__ import annotations

import warnings
from pathlib import Path

from .errors import UserError
from .model import LITv2, litv2_base, litv2_medium, litv2_small
from .weights.architecture import infer_arguments
from .weights.download import fetch
from .weights.reading import read_checkpoint
from .weights.releases import lookup
from .weights.state_dict import find_weights, load_weights

__all__ = ["VARIANTS", "create_model", "load_model"]

VARIANTS = {"small": litv2_small, "medium": litv2_medium, "base": litv2_base}


def create_model(name: str, pretrained: bool | str | Path | None = None, **kwargs) -> LITv2:
    """A classifier of the zoo by its name.

    Args:
        pretrained: None or False for random weights, True for the published ones, or where to take them from: another name, a path or
            a URL, of any format that :func:`litv2.weights.state_dict.find_weights` knows.
        kwargs: arguments of :class:`litv2.LITv2` that differ from the published model's. With another ``num_classes`` than the
            file's the head keeps its initialisation, which is warned about; with 0 the file's head is left out.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
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


def load_model(source: str | Path, name: str | None = None) -> tuple[LITv2, dict]:
    """The classifier in a file, of the architecture and the classes that the file has, and the content of the checkpoint.

    Args:
        source: a path, a URL or a name of the zoo.
        name: the model's name in the zoo; None for what the weights' shapes and the checkpoint's configuration say.

    Raises:
        ValueError: no weights of a classifier, or weights of another model.
        OSError: the weights cannot be found or downloaded.
    """
    content = read_checkpoint(fetch(source))
    weights = find_weights(content)
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    if not classes:
        raise UserError(f"{source} has no classifier: detectors and segmenters are used through their configurations")
    model = create_model(name, num_classes=classes) if name else LITv2(**infer_arguments(weights, content.get("config")))
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    return model, content
