# SPDX-License-Identifier: Apache-2.0
"""Entry points for torch.hub, from a checkout (``source="local"``) or from GitHub:

    torch.hub.load(FOLDER, "litv2_small", source="local", pretrained=True)
    torch.hub.load(FOLDER, "litv2", "alpha_0.2", source="local", num_classes=10)

``pretrained`` is True for the published weights, or a path, a URL or another name; other arguments are passed to ``litv2.LITv2``.
"""

from litv2 import LITv2 as _LITv2
from litv2.factory import create_model as _create_model
from litv2.weights.releases import ZOO as _ZOO

dependencies = ["torch"]


def litv2_small(pretrained: bool | str = False, **kwargs) -> _LITv2:
    """LITv2-S: 28 M parameters, 82.0 % top-1 at 224 x 224."""
    return _create_model("litv2_small", pretrained, **kwargs)


def litv2_medium(pretrained: bool | str = False, **kwargs) -> _LITv2:
    """LITv2-M: 49 M parameters, 83.3 % top-1 at 224 x 224."""
    return _create_model("litv2_medium", pretrained, **kwargs)


def litv2_base(pretrained: bool | str = False, **kwargs) -> _LITv2:
    """LITv2-B: 87 M parameters, 83.6 % top-1 at 224 x 224."""
    return _create_model("litv2_base", pretrained, **kwargs)


def litv2_base_384(pretrained: bool | str = False, **kwargs) -> _LITv2:
    """LITv2-B for 384 x 384 images: 84.7 % top-1."""
    return _create_model("litv2_base_384", pretrained, **kwargs)


# Aliases: the names of the release's files.
litv2_s, litv2_m, litv2_b, litv2_b_384 = litv2_small, litv2_medium, litv2_base, litv2_base_384


def litv2(name: str, pretrained: bool | str = False, **kwargs) -> _LITv2:
    """Creates any classifier by its name in ``python -m litv2 list`` or by the name of its release file: litv2_s, alpha_0.2, ..."""
    files = {entry.file.removesuffix(".pth"): entry.name for entry in _ZOO.values() if entry.task == "classification"}
    return _create_model(files.get(name, name), pretrained, **kwargs)
