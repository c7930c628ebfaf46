# SPDX-License-Identifier: Apache-2.0
"""``window_attention`` by torch's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_modules.dispatch import Backend
from mm_modules.torch_state import is_exporting

from ..padding import whole_windows


def window_attention(qkv: Tensor, pad: Tensor, window_size: int, heads: int, scale: float) -> Tensor:
    s, d, (H, W) = window_size, qkv.shape[-1] // 3 // heads, qkv.shape[1:3]
    rows, columns, padded = whole_windows(H, W, s)
    if padded:
        qkv = F.pad(qkv - pad, (0, 0, 0, columns * s - W, 0, rows * s - H)) + pad
    attention = _on_cuda if qkv.device.type == "cuda" else _by_fused_attention
    y = attention(qkv, s, heads, d, scale)
    if padded:
        y = F.pad(y, (0, 0, 0, W - columns * s, 0, H - rows * s))  # a negative pad crops, and leaves no strides for tracing to fix
    return y


def _by_fused_attention(qkv: Tensor, s: int, heads: int, d: int, scale: float) -> Tensor:
    """(B, H, W, 3 * heads * d) of whole windows -> (B, H, W, heads * d)."""
    B, H, W, _ = qkv.shape
    nh, nw = H // s, W // s
    # Split into windows and merged back with at most five dimensions, the limit of mobile runtimes.
    qkv = qkv.reshape(B * nh, s, nw, s * 3 * heads * d).transpose(1, 2).reshape(B * nh * nw, s * s, 3, heads, d)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, scale=scale)  # (B * nh * nw, heads, s * s, d)
    return y.transpose(1, 2).reshape(B * nh, nw, s, s * heads * d).transpose(1, 2).reshape(B, H, W, heads * d)


def _on_cuda(qkv: Tensor, s: int, heads: int, d: int, scale: float) -> Tensor:
    """The same written out, as in HiLo and for the same reasons.

    In generated code the products are sums, of which Inductor makes two kernels that read q, k and v where they are. A library's products
    would read copies.
    """
    B, H, W, _ = qkv.shape
    windows = B, H // s, W // s, heads
    qkv = qkv.reshape(B, H // s, s, W // s, s, 3, heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)  # (3, *windows, s, s, d)
    if _is_generated():
        q, k, v = qkv.unbind(0)
        logits = (q[..., None, None, :].float() * k[..., None, None, :, :, :]).sum(-1) * scale  # (*windows, s, s, s, s)
        weights = logits.flatten(-2).softmax(-1).unflatten(-1, (s, s))
        y = (weights.unsqueeze(-1) * v[..., None, None, :, :, :]).sum((-3, -2)).to(v.dtype)
    else:
        q, k, v = qkv.reshape(3, -1, s * s, d).unbind(0)
        logits = q @ k.mT
        y = ((logits if scale == 1 else logits * scale).softmax(-1) @ v).reshape(*windows, s, s, d)
    return y.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, heads * d)


def _is_generated() -> bool:
    return torch.compiler.is_compiling() and not is_exporting()


BACKEND = Backend("torch", window_attention)
