# SPDX-License-Identifier: Apache-2.0
"""``hilo_attention`` for inference by a Triton kernel: both branches in one launch, each writing into its channels of the result."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype

from ..pooled import triton as pooled
from ..windows import triton as windows


def why_not(
    qkv: Tensor, pad: Tensor, q: Tensor, kv: Tensor, window_size: int, h_heads: int, l_heads: int, scale: float
) -> str | None:  # fmt: skip
    # One launch has the programs of both: where all heads are within the limit of windows, so is their sum.
    reason = windows.why_not_heads(qkv, qkv.shape[-1] // 3 // h_heads, window_size, h_heads + l_heads)
    return reason or pooled.why_not_gradients(qkv, pad) or pooled.why_not(q, kv, l_heads, scale)


def why_rather_not(
    qkv: Tensor, pad: Tensor, q: Tensor, kv: Tensor, window_size: int, h_heads: int, l_heads: int, scale: float
) -> str | None:  # fmt: skip
    return pooled.why_rather_not(q, kv, l_heads, scale)  # which includes what window_attention says


def hilo_attention(
    qkv: Tensor, pad: Tensor, q: Tensor, kv: Tensor, window_size: int, h_heads: int, l_heads: int, scale: float
) -> Tensor:  # fmt: skip
    dtype = compute_dtype(q)
    return _forward(*(tensor.to(dtype) for tensor in (qkv, pad, q, kv)), window_size, h_heads, l_heads, scale)


ARGUMENTS = "Tensor qkv, Tensor pad, Tensor q, Tensor kv, int window_size, int h_heads, int l_heads, float scale"


@torch.library.custom_op("litv2::triton_hilo_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def _forward(qkv, pad, q, kv, window_size, h_heads, l_heads, scale):
    from ..triton import hilo_attention

    return hilo_attention.hilo_attention(qkv, pad, q, kv, window_size, h_heads, l_heads, scale)


@_forward.register_fake
def _(qkv, pad, q, kv, window_size, h_heads, l_heads, scale):
    return q.new_empty(*q.shape[:3], qkv.shape[-1] // 3 + q.shape[-1])


BACKEND = Backend("triton", hilo_attention, why_not, why_rather_not)
