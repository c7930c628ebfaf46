# SPDX-License-Identifier: Apache-2.0
"""``window_attention`` by a Triton kernel, also in training: q, k and v are read once where they are, and nothing is copied around them.

For the gradients only q, k and v are kept: the weights of the attention are computed again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_modules.dispatch import Backend, without_second_derivatives
from mm_modules.torch_state import compute_dtype

from .. import triton

CHANNELS = {torch.float32: (16, 32), torch.bfloat16: (16, 32, 64), torch.float16: (16, 32, 64)}  # of a head; more would spill registers
LARGEST_WINDOW = 4  # whose tokens fill a tile of the kernel
PROGRAMS = 2**31 - 1  # that CUDA can launch


def why_not(qkv: Tensor, pad: Tensor, window_size: int, heads: int, scale: float) -> str | None:
    return why_not_heads(qkv, qkv.shape[-1] // 3 // heads, window_size, heads)


def why_not_heads(x: Tensor, d: int, window_size: int, heads: int) -> str | None:
    """Returns the reason why the kernel does not support the heads of a map x (B, H, W, any), d channels each, or None."""
    if (reason := triton.why_not(x)) is not None:
        return reason
    if d not in (supported := CHANNELS[compute_dtype(x)]):
        return f"it supports heads of {', '.join(map(str, supported))} channels in {compute_dtype(x)}, got {d}"
    if window_size > LARGEST_WINDOW:
        return f"it supports windows of up to {LARGEST_WINDOW} x {LARGEST_WINDOW} tokens, got {window_size} x {window_size}"
    if x[..., 0].numel() * heads > PROGRAMS:
        return f"it supports maps of up to {PROGRAMS} cells times heads, got {tuple(x.shape[:3])}"
    return None


def why_rather_not(*_) -> str | None:
    return triton.why_rather_not()


def window_attention(qkv: Tensor, pad: Tensor, window_size: int, heads: int, scale: float) -> Tensor:
    return _forward(qkv, pad.to(qkv.dtype), window_size, heads, scale)


ARGUMENTS = "Tensor qkv, Tensor pad, int window_size, int heads, float scale"


@torch.library.custom_op("litv2::triton_window_attention", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def _forward(qkv, pad, window_size, heads, scale):
    from ..triton import windows

    return windows.window_attention(qkv, pad, window_size, heads, scale)


@torch.library.custom_op(
    "litv2::triton_window_attention_backward", mutates_args=(), schema=f"(Tensor gradient, {ARGUMENTS}) -> (Tensor, Tensor)"
)
def _backward(gradient, qkv, pad, window_size, heads, scale):
    from ..triton import windows

    return windows.window_attention_backward(gradient, qkv, pad, window_size, heads, scale)


@_forward.register_fake
def _(qkv, pad, window_size, heads, scale):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] // 3)


@_backward.register_fake
def _(gradient, qkv, pad, window_size, heads, scale):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(pad)


def _keep(ctx, inputs, output):
    qkv, pad, *ctx.options = inputs
    ctx.save_for_backward(qkv, pad)


def _differentiate(ctx, gradient):
    of_qkv, of_pad = _backward(gradient, *ctx.saved_tensors, *ctx.options)
    return of_qkv, of_pad, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
without_second_derivatives("litv2::triton_window_attention_backward", "window_attention", "triton")

BACKEND = Backend("triton", window_attention, why_not, why_rather_not)
