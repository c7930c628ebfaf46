# SPDX-License-Identifier: Apache-2.0
"""``pooled_linear`` for inference by a Triton kernel: padding, pooling, product and what belongs to the norm's shift in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype

from .. import triton

LARGEST_WINDOW = 4  # all of whose cells are loaded at once
CELLS = 2**31 - 64  # of the map: blocks of 64 are counted in 32 bits


def why_not(x: Tensor, window_size: int, weight: Tensor, bias: Tensor, shift: Tensor) -> str | None:
    if (reason := triton.why_not(x)) is not None:
        return reason
    tensors = (x, weight, bias, shift)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are enabled; use torch.no_grad or torch.inference_mode"
    if window_size > LARGEST_WINDOW:
        return f"it supports windows of up to {LARGEST_WINDOW} x {LARGEST_WINDOW} cells, got {window_size} x {window_size}"
    if x.ndim != 4 or min(x.shape[1:3]) < 1 or weight.shape != (len(bias), x.shape[-1]) or bias.shape != shift.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        return f"x, weight, bias and shift must be (B, H, W, K), (N, K), (N,) and (N,), got {shapes}"
    if x[..., 0].numel() > CELLS:
        return f"it supports maps of up to {CELLS} cells, got {tuple(x.shape[:3])}"
    allowed = triton.DTYPES if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    if any(tensor.dtype not in allowed for tensor in tensors):
        return f"it supports {' or '.join(map(str, allowed))} here, got {', '.join(str(tensor.dtype) for tensor in tensors)}"
    return None


def why_rather_not(x: Tensor, window_size: int, weight: Tensor, bias: Tensor, shift: Tensor) -> str | None:
    if compute_dtype(x) == torch.float32:
        return "in float32 it splits its factors, and its registers spill"
    return triton.why_rather_not()


def pooled_linear(x: Tensor, window_size: int, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    dtype = compute_dtype(x)  # of the product; under autocast x is pooled in its own
    return _forward(x, window_size, weight.to(dtype), bias.to(dtype), shift.to(dtype))


@torch.library.custom_op(
    "litv2::triton_pooled_linear",
    mutates_args=(),
    schema="(Tensor x, int window_size, Tensor weight, Tensor bias, Tensor shift) -> Tensor",
)
def _forward(x, window_size, weight, bias, shift):
    from ..triton import pooled_linear

    return pooled_linear.pooled_linear(x, window_size, weight, bias, shift)


@_forward.register_fake
def _(x, window_size, weight, bias, shift):
    (B, H, W, _), s = x.shape, window_size
    return x.new_empty(B, (H + s - 1) // s, (W + s - 1) // s, len(weight), dtype=weight.dtype)


BACKEND = Backend("triton", pooled_linear, why_not, why_rather_not)
