# SPDX-License-Identifier: Apache-2.0
"""``pooled_attention`` for inference by a Triton kernel: q, k and v are read where they are, and nothing is copied around it."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype

from .. import triton

CHANNELS = (16, 32, 64)  # of a head; more would spill registers
CELLS = 2**31 - 64  # of either map, times heads: blocks of 64 are counted in 32 bits


def why_not(q: Tensor, kv: Tensor, heads: int, scale: float) -> str | None:
    if (reason := triton.why_not(q)) is not None:
        return reason
    if (reason := why_not_gradients(q, kv)) is not None:
        return reason
    if (d := q.shape[-1] // heads) not in CHANNELS:
        return f"it supports heads of {', '.join(map(str, CHANNELS))} channels, got {d}"
    if any(x[..., 0].numel() * heads > CELLS for x in (q, kv)):
        return f"it supports maps of up to {CELLS} cells times heads, got {tuple(q.shape[:3])} and {tuple(kv.shape[:3])}"
    return None


def why_not_gradients(*tensors: Tensor) -> str | None:
    """Returns the reason why a kernel without gradients does not take the tensors, or None."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are enabled; use torch.no_grad or torch.inference_mode"
    return None


def why_rather_not(q: Tensor, kv: Tensor, heads: int, scale: float) -> str | None:
    if compute_dtype(q) == torch.float32:
        return "in float32 its products do not run on tensor cores, and its registers spill"
    return triton.why_rather_not()


def pooled_attention(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    dtype = compute_dtype(q)
    return _forward(q.to(dtype), kv.to(dtype), heads, scale)


@torch.library.custom_op(
    "litv2::triton_pooled_attention", mutates_args=(), schema="(Tensor q, Tensor kv, int heads, float scale) -> Tensor"
)
def _forward(q, kv, heads, scale):
    from ..triton import pooled

    return pooled.pooled_attention(q, kv, heads, scale)


@_forward.register_fake
def _(q, kv, heads, scale):
    return q.new_empty(q.shape)


BACKEND = Backend("triton", pooled_attention, why_not, why_rather_not)
