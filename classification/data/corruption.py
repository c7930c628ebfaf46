# SPDX-License-Identifier: Apache-2.0
"""The corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), 15 kinds of 5 severities, by the package imagecorruptions."""

from __future__ import annotations

import difflib
import zlib
from typing import Any

import numpy as np
from PIL import Image

from litv2.errors import MissingPackage, UserError, listed

from .dataset import seeded

__all__ = ["GROUPS", "KINDS", "SEVERITIES", "Corruption", "corruption_kinds"]

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
KINDS = tuple(kind for kinds in GROUPS.values() for kind in kinds)
SEVERITIES = (1, 2, 3, 4, 5)
_OWN_GENERATOR = ("impulse_noise", "glass_blur")  # they take a seed; the others draw from numpy's global state


def corruption_kinds(names: str) -> list[str]:
    """"fog,frost" -> these two, "all" -> the 15, "" -> none.

    Raises:
        UserError: a kind is unknown or named twice.
        MissingPackage: there are some, and imagecorruptions is not installed.
    """
    kinds = list(KINDS) if names == "all" else [name.strip() for name in names.split(",")] if names else []
    for kind in kinds:
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS) or KINDS
            raise UserError(f"TEST.CORRUPTIONS: {kind!r} is none of the kinds {listed(near, len(KINDS))}, or all; commas separate them")
    if len(set(kinds)) < len(kinds):
        raise UserError(f"TEST.CORRUPTIONS names a kind twice: {names}")
    if kinds:
        _imagecorruptions()
    return kinds


class Corruption:
    """Transform: PIL image of mode RGB or L, 32 pixels or more on each side -> the corrupted image.

    What is random depends on the seed, the kind, the severity and the pixels alone: any process makes the same of an image. Of a grey
    image, which is corrupted as a coloured one, the first channel is taken.
    """

    def __init__(self, kind: str, severity: int, seed: int):
        self.kind, self.severity, self.seed = kind, severity, seed

    def __call__(self, image: Image.Image) -> Image.Image:
        pixels = np.asarray(image)
        number = zlib.crc32(pixels.tobytes(), zlib.crc32(f"{self.seed} {self.kind} {self.severity}".encode()))
        own = dict(seed=number) if self.kind in _OWN_GENERATOR else {}
        with seeded(number):
            corrupted = _imagecorruptions().corrupt(pixels, self.severity, self.kind, **own)
        return Image.fromarray(corrupted if image.mode == "RGB" else np.ascontiguousarray(corrupted[..., 0]))


def _imagecorruptions() -> Any:
    try:
        import imagecorruptions
    except ImportError as error:
        raise MissingPackage(f"{error}; corruptions need imagecorruptions: pip install 'litv2[robustness]'") from error
    return imagecorruptions
