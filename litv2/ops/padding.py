# SPDX-License-Identifier: Apache-2.0
"""Padding to whole patches, in eager mode and in traced graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Zero-pads (B, C, H, W) on the right and at the bottom until ``multiple`` divides both sides."""
    H, W = images.shape[2:]
    # Not -W % multiple: torch.export's symbols cannot simplify that, and guards against a batch of 1.
    right, bottom = ((side + multiple - 1) // multiple * multiple - side for side in (W, H))
    # A traced graph always pads, even by 0: without a branch on H and W, one graph serves every size.
    if torch.compiler.is_compiling() or right or bottom:
        images = F.pad(images, (0, right, 0, bottom))
    return images
