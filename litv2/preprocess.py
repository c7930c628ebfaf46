"""What an image goes through before the model sees it in evaluation: the trainer's preprocessing, for every program."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from .errors import MissingPackage, UserError

if TYPE_CHECKING:
    from PIL import Image

    from .weights.releases import Release

__all__ = ["decode", "evaluation_size", "evaluation_transform", "normalisation"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of red, green and blue in [0, 1]
CROP = 224 / 256  # side of the crop over the short side of the resized image


def decode(file: BinaryIO | Image.Image, mode: str) -> Image.Image:
    """An encoded image (or a PIL image) of any mode -> PIL image of ``mode``, RGB or L, with 8 bits per channel.

    Raises:
        Exception: of nearly any type, for a damaged file: OSError, SyntaxError, struct.error ...
    """
    import numpy as np
    from PIL import Image

    image = file if isinstance(file, Image.Image) else Image.open(file)
    image.load()
    if image.mode.startswith("I"):  # 16 bits per pixel: PIL's own conversion would clip at 255 and leave a white picture
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise UserError("images of floating-point pixels have no defined range; save it with 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # resolves the palette and its transparency
    if not isinstance(file, Image.Image):
        file.close()
    return image.convert(mode)


def evaluation_size(config: dict | None, release: Release | None = None) -> tuple[int, bool] | None:
    """Side of a classifier's evaluation images in pixels, and whether they are crops of larger ones.

    Those of the published model, if it is one, else those of the trainer's configuration in its checkpoint; None if that says nothing.
    """
    if release is not None:
        return release.image_size[0], release.image_size[0] < 384
    try:
        test = config.get("TEST") or {}
        side = int(test.get("IMG_SIZE") or config["DATA"]["IMG_SIZE"])
        return (side, bool(test.get("CROP", True))) if side > 0 else None
    except (KeyError, TypeError, ValueError, AttributeError):  # a checkpoint holds whatever its maker put there
        return None


def normalisation(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, ImageNet's; for grey images their average."""
    if in_chans == 3:
        return MEAN, STD
    return (sum(MEAN) / 3,), (sum(STD) / 3,)


def evaluation_transform(size: int, crop: bool = True, in_chans: int = 3, interpolation: str = "bicubic") -> Callable:
    """PIL image -> normalised tensor (in_chans, size, size).

    Args:
        crop: resize the short side to 256/224 of the size, then crop the centre; False resizes to the square (the recipe at 384).

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
