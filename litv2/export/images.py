# SPDX-License-Identifier: Apache-2.0
"""Real images, prepared as in the paper's evaluation, for calibration and for the comparison of exports."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackage
from ..image_list import image_list
from ..preprocess import MEAN, STD, read_image


def photographs() -> Path | None:
    """Returns the folder of scikit-learn's two sample photographs, or None if it is not installed."""
    try:
        from sklearn.datasets import _base
    except ImportError:
        return None
    return Path(_base.__file__).parent / "images"


def read_images(folder: str | Path, size: tuple[int, int], count: int, shift: float = 0.0) -> Tensor:
    """Reads up to ``count`` images, evenly spread over a folder and its subfolders, as a normalised tensor (N, 3, H, W).

    Each is resized to cover ``size`` (H, W) and cropped at the centre. ``shift``, in [0, 1), offsets the selection by that
    fraction of its spacing, which selects other images if the folder has at least twice as many.

    Raises:
        UserError: the folder contains no images, or one of them cannot be read.
        MissingPackage: Pillow is not installed.
    """
    try:
        import numpy as np
        from PIL import Image, ImageOps
    except ImportError as error:
        raise MissingPackage(f"{error}; reading images needs Pillow: pip install pillow") from error
    paths = image_list([Path(folder)])
    H, W = size
    images = []
    step = -(-len(paths) // count)
    for path in paths[int(shift * step) :: step]:
        image = ImageOps.fit(read_image(path), (W, H), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    return (torch.stack(images) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
