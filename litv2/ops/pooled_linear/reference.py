# SPDX-License-Identifier: Apache-2.0
"""``pooled_linear`` by torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_modules.dispatch import Backend

from ..padding import whole_windows


def pooled_linear(x: Tensor, window_size: int, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    s, (H, W) = window_size, x.shape[1:3]
    nh, nw, padded = whole_windows(H, W, s)
    if not padded:
        return F.linear(_pool(x, s), weight, bias)
    x = F.pad(x, (0, 0, 0, nw * s - W, 0, nh * s - H))
    rows = (H - s * torch.arange(nh, device=x.device)).clamp(max=s) / s
    cols = (W - s * torch.arange(nw, device=x.device)).clamp(max=s) / s
    outside = (1 - rows.view(nh, 1, 1) * cols.view(nw, 1)).to(x.dtype)
    return F.linear(_pool(x, s), weight, bias) - shift * outside


def _pool(x: Tensor, s: int) -> Tensor:
    """(B, s * h, s * w, C) -> (B, h, w, C)."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), s).permute(0, 2, 3, 1)


BACKEND = Backend("torch", pooled_linear)
