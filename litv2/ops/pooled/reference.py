# SPDX-License-Identifier: Apache-2.0
"""``pooled_attention`` by torch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mm_modules.dispatch import Backend


def pooled_attention(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    d = q.shape[-1] // heads
    k, v = kv.flatten(1, 2).unflatten(-1, (2, heads, d)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, M, d)
    y = F.scaled_dot_product_attention(q.flatten(1, 2).unflatten(-1, (heads, d)).transpose(1, 2), k, v, scale=scale)
    return y.transpose(1, 2).reshape(q.shape)


BACKEND = Backend("torch", pooled_attention)
