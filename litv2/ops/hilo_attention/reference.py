# SPDX-License-Identifier: Apache-2.0
"""``hilo_attention`` by the operators of its branches."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_modules.dispatch import Backend

from ..pooled import pooled_attention
from ..windows import window_attention


def hilo_attention(
    qkv: Tensor, pad: Tensor, q: Tensor, kv: Tensor, window_size: int, h_heads: int, l_heads: int, scale: float
) -> Tensor:  # fmt: skip
    hifi = window_attention(qkv, pad, window_size, h_heads, scale)
    return torch.cat((hifi, pooled_attention(q, kv, l_heads, scale)), dim=-1)


BACKEND = Backend("torch", hilo_attention)
