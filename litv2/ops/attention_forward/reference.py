# SPDX-License-Identifier: Apache-2.0
"""``attention`` as the module computes it, over tokens (B, H * W, dim)."""

from __future__ import annotations

from torch import Tensor, nn

from mm_modules.dispatch import Backend


def attention(x: Tensor, attn: nn.Module) -> Tensor:
    B, H, W, C = x.shape
    return attn(x.reshape(B, H * W, C), H, W).reshape(B, H, W, C)


BACKEND = Backend("torch", attention)
