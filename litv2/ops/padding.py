# SPDX-License-Identifier: Apache-2.0
"""Padding to whole patches and windows, in eager mode and in traced graphs."""

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


def whole_windows(H: int, W: int, s: int) -> tuple[int, int, bool]:
    """Returns the windows per column and per row, and whether the map must be padded: always if its size is symbolic."""
    nh, nw = (H + s - 1) // s, (W + s - 1) // s
    symbolic = isinstance(H, torch.SymInt) or isinstance(W, torch.SymInt)
    return nh, nw, s > 1 and (symbolic or (nh * s, nw * s) != (H, W))
