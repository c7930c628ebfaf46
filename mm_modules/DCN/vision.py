# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution with torchvision's operator, made safe against NaN and infinite offsets."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ..dispatch import Backend

OUTSIDE = 1e6  # an offset that leads outside any image
INSTALLED = find_spec("torchvision") is not None


def why_not(input: Tensor, *_) -> str | None:
    if not INSTALLED:
        return "torchvision is not installed"
    if input.device.type not in ("cpu", "cuda"):
        return f"torchvision's operator has no kernel for {input.device.type}"
    return None


def why_rather_not(input: Tensor, *_) -> str | None:
    if input.device.type != "cuda":
        return "on the CPU plain PyTorch is faster at every shape of LITv2 (benchmarks/deform_conv.py)"
    if torch.compiler.is_compiling():
        return "torch.compile fuses plain PyTorch with its neighbours, and exports of it have no dependencies"
    if torch.jit.is_tracing():
        return "traced programs use plain tensor operations only"
    return None


def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """See ``mm_modules.DCN.deform_conv2d``, which has checked the arguments; ``offset`` and ``mask`` are float32 or better."""
    from torchvision.ops import deform_conv2d as operator  # imported late: slow to import and not always installed

    # The operator would index memory with a NaN position and crash the process. It gets a position outside the image instead,
    # which reads nothing, and the NaN is added to the outputs that depend on it.
    nan = offset.isnan()
    offset = torch.where(nan, OUTSIDE, offset).clamp(-OUTSIDE, OUTSIDE)
    dtype = offset.dtype  # it requires a single dtype, lacks some low-precision kernels, and our positions are float32
    with torch.autocast(input.device.type, enabled=False):
        out = operator(
            input.to(dtype),
            offset,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            stride,
            padding,
            dilation,
            mask,
        )
    out = out + torch.where(_touched(nan, input.shape[1], weight), float("nan"), 0.0)
    return out.to(input.dtype)


def _touched(nan: Tensor, C: int, weight: Tensor) -> Tensor:
    """Finds the outputs that read a NaN position: nan (B, 2 * offset_groups * taps, Ho, Wo) -> bool (B, O, Ho, Wo)."""
    O, C_per_group, kh, kw = weight.shape
    B, channels, Ho, Wo = nan.shape
    offset_groups = channels // (2 * kh * kw)
    by_offset_group = nan.reshape(B, offset_groups, 2 * kh * kw, Ho, Wo).any(dim=2)
    by_channel = by_offset_group.repeat_interleave(C // offset_groups, dim=1)
    by_group = by_channel.view(B, C // C_per_group, C_per_group, Ho, Wo).any(dim=2)
    return by_group.repeat_interleave(O // by_group.shape[1], dim=1)


BACKEND = Backend("torchvision", deform_conv2d, why_not, why_rather_not)
