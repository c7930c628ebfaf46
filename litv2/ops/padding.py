"""Padding to whole patches, for eager calls and traced graphs alike."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) -> the same with zeros on the right and at the bottom, until ``multiple`` divides both sides."""
    H, W = images.shape[2:]
    right, bottom = -W % multiple, -H % multiple
    # A traced graph always pads, if by nothing: no branch on H and W, so that one graph serves every size.
    if torch.compiler.is_compiling() or right or bottom:
        images = F.pad(images, (0, right, 0, bottom))
    return images
