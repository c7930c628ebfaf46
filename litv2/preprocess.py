# SPDX-License-Identifier: Apache-2.0
"""Evaluation preprocessing: the trainer's, shared by every program."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from .errors import MissingPackage, UserError
from .files import is_shortage

if TYPE_CHECKING:
    from PIL import Image

    from .weights.releases import Release

__all__ = [
    "decode",
    "evaluation_box",
    "evaluation_size",
    "evaluation_transform",
    "normalisation",
    "read_image",
    "resized_side",
]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for RGB in [0, 1]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # that are decoded; for some others Pillow starts programs
PIXELS = 89_478_485  # of an image at most, where Pillow only warns: a file of 1 KiB may take 12 bytes for each
LARGEST_SIDE = 2048  # of images that a checkpoint may ask for: a file must not choose how much memory a prediction takes
MOST_ELONGATED = 100  # width by height or height by width: a transform enlarges the short side to that of its crop
CROP = 224 / 256  # side of the crop relative to the short side of the resized image


def decode(file: BinaryIO | Image.Image, mode: str) -> Image.Image:
    """Decodes a file (or converts a PIL image) of any mode to a PIL image of ``mode``, RGB or L, with 8 bits per channel.

    Raises:
        UserError: the image has floating-point pixels, more than ``PIXELS``, or is more elongated than ``MOST_ELONGATED``.
        Exception: the file is damaged; the type varies: OSError, SyntaxError, struct.error ...
    """
    import numpy as np
    from PIL import Image

    image = file if isinstance(file, Image.Image) else _opened(file)
    if max(image.size) > MOST_ELONGATED * min(image.size):
        raise UserError(f"{image.width} x {image.height} pixels are too elongated: one side may be {MOST_ELONGATED} times the other")
    image.load()
    if image.mode.startswith("I"):  # 16 bits per pixel: PIL's own conversion would clip at 255 and leave a white picture
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("floating-point images have no defined range; save the image with 8 or 16 bits per channel")
    elif image.mode == "P":
        image = image.convert("RGBA")  # resolves the palette and its transparency
    return image.convert(mode)


def _opened(file: BinaryIO) -> Image.Image:
    """Opens an image of one of the FORMATS and of up to PIXELS, and closes the file."""
    from PIL import Image, UnidentifiedImageError

    with file:  # read at once: from a file itself, Pillow's read of a length in a damaged one would allocate up to 4 GiB
        file.seek(0)
        try:
            image = Image.open(io.BytesIO(file.read()), formats=FORMATS)
        except UnidentifiedImageError as error:  # its message has an address, which differs each time
            raise UserError("cannot identify image file") from error
    if image.width * image.height > PIXELS:
        raise UserError(f"{image.width} x {image.height} pixels are too many: an image may have {PIXELS // 10**6} million")
    return image


def read_image(path: Path, mode: str = "RGB", upright: bool = False) -> Image.Image:
    """Reads and decodes an image file; ``upright`` turns it as its EXIF data say, as browsers do, and training does not.

    Raises:
        UserError: it is missing, or damaged, or no image.
        MemoryError, OSError: the machine lacks memory or file handles.
    """
    try:
        with open(path, "rb") as file:
            if not upright:
                return decode(file, mode)
            from PIL import ImageOps

            return decode(ImageOps.exif_transpose(_opened(file)), mode)
    except Exception as error:  # for damaged files, decoders raise all kinds of exceptions
        if is_shortage(error):
            raise
        reason = getattr(error, "strerror", None) or re.sub(r" <.*>", "", str(error))  # PIL names the object that it read from
        raise UserError(f"{path} cannot be read as an image: {reason}") from error


def evaluation_size(config: dict | None, release: Release | None = None) -> tuple[int, bool] | None:
    """Returns the side of a classifier's evaluation images in pixels and whether they are crops of larger ones.

    Taken from the published model, if it is one, else from the trainer's configuration in the checkpoint; None if that does not say.

    Raises:
        UserError: the side is implausibly large.
    """
    if release is not None:
        return release.image_size[0], release.image_size[0] < 384
    if config is None:
        return None
    try:
        test = config.get("TEST") or {}
        side, crop = int(test.get("IMG_SIZE") or config["DATA"]["IMG_SIZE"]), bool(test.get("CROP", True))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # a checkpoint may hold anything
        return None
    if side > LARGEST_SIDE:
        raise UserError(f"the checkpoint's configuration has images of more than {LARGEST_SIDE} pixels on a side")
    return (side, crop) if side > 0 else None


def normalisation(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns ImageNet's mean and standard deviation per channel; for grey images their average."""
    if in_chans == 3:
        return MEAN, STD
    return (sum(MEAN) / 3,), (sum(STD) / 3,)


def evaluation_transform(size: int, crop: bool = True, in_chans: int = 3, interpolation: str = "bicubic") -> Callable:
    """Returns a function: PIL image -> normalised tensor (in_chans, size, size).

    Args:
        crop: resize the short side to 256/224 of ``size``, then crop the centre; False resizes to a square (the recipe at 384).

    Raises:
        MissingPackage: timm or torchvision is not installed.
    """
    try:
        from timm.data import create_transform
    except ImportError as error:
        raise MissingPackage(f"{error}; preparing images needs timm and torchvision: pip install 'litv2[train]'") from error
    mean, std = normalisation(in_chans)
    how = dict(crop_pct=CROP) if crop else dict(crop_pct=1.0, crop_mode="squash")
    return create_transform(size, mean=mean, std=std, interpolation=interpolation, **how)


def resized_side(size: int) -> int:
    """Returns the short side in pixels that ``evaluation_transform`` resizes images to, before it crops the centre of this size."""
    return int(size / CROP)


def evaluation_box(width: int, height: int, size: int, crop: bool = True) -> tuple[float, float, float, float]:
    """Returns left, top, right, bottom, in pixels of an image of this width and height, of what ``evaluation_transform`` keeps of it."""
    if not crop:
        return 0.0, 0.0, float(width), float(height)
    short = resized_side(size)
    resized = [int(short * side / min(width, height)) for side in (width, height)]
    edges = [(round((side - size) / 2), side) for side in resized]
    (left, right), (top, bottom) = (
        (first * side / scaled, (first + size) * side / scaled) for (first, scaled), side in zip(edges, (width, height))
    )
    return left, top, right, bottom
