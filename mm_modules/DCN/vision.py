"""Deformable convolution by torchvision's operator, made safe against NaN and infinite offsets."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

problem = None if importlib.util.find_spec("torchvision") else "needs torchvision, which is not installed"
OUTSIDE = 1e6  # an offset that leads out of any image


def supports(input: Tensor) -> bool:
    return problem is None and input.device.type in ("cpu", "cuda")


def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """See ``mm_modules.DCN.deform_conv2d``, which has checked the arguments; ``offset`` and ``mask`` are float32 or better."""
    from torchvision.ops import deform_conv2d as operator  # imported late: slow to import and not always installed

    # The operator indexes memory with a NaN position and kills the process: it gets a position outside instead,
    # which reads nothing, and the NaN is added to the outputs it belongs to.
    nan = offset.isnan()
    offset = torch.where(nan, OUTSIDE, offset).clamp(-OUTSIDE, OUTSIDE)
    dtype = offset.dtype  # it wants one dtype for all; low precision has no kernel everywhere, and float32 positions are ours
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
    """Outputs that read a NaN position: nan (B, 2 * offset_groups * taps, Ho, Wo) -> bool (B, O, Ho, Wo)."""
    O, C_per_group, kh, kw = weight.shape
    B, channels, Ho, Wo = nan.shape
    offset_groups = channels // (2 * kh * kw)
    by_offset_group = nan.reshape(B, offset_groups, 2 * kh * kw, Ho, Wo).any(dim=2)
    by_channel = by_offset_group.repeat_interleave(C // offset_groups, dim=1)
    by_group = by_channel.view(B, C // C_per_group, C_per_group, Ho, Wo).any(dim=2)
    return by_group.repeat_interleave(O // by_group.shape[1], dim=1)
