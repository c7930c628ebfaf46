# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution in plain PyTorch: one bilinear gather into columns and one matrix product.

It is exact and differentiable, works for every dtype and device, and can be compiled and exported.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Backend
from ..torch_state import in_transform


def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """See ``mm_modules.DCN.deform_conv2d``, which has checked the arguments; ``offset`` and ``mask`` are float32 or better."""
    B, C, H, W = input.shape
    O, C_per_group, kh, kw = weight.shape
    Ho, Wo = offset.shape[-2:]
    taps, groups, offset_groups = kh * kw, C // C_per_group, offset.shape[1] // (2 * kh * kw)

    y, x = _sample_positions(offset, kh, kw, stride, padding, dilation)  # (B, Ho, Wo, taps, offset_groups) each
    index, factor = _corners(y, x, H, W)  # (..., 4) each
    if mask is not None:
        mask = mask.reshape(B, offset_groups, taps, Ho, Wo).permute(0, 3, 4, 2, 1)
        factor = factor * mask.unsqueeze(-1)

    # One row per (image, pixel, offset group). The last axis is contiguous for channels-last input: nothing is copied.
    rows = input.permute(0, 2, 3, 1).reshape(B * H * W * offset_groups, C // offset_groups)
    image = torch.arange(B, device=input.device).view(B, 1, 1, 1, 1, 1) * (H * W)
    group = torch.arange(offset_groups, device=input.device).view(offset_groups, 1)
    index = (index + image) * offset_groups + group
    columns = _weighted_gather(rows, index.reshape(-1, 4), factor.reshape(-1, 4))

    if groups == 1:
        columns = columns.reshape(B, Ho, Wo, taps * C)
        out = F.linear(columns, weight.permute(0, 2, 3, 1).reshape(O, taps * C), bias)
    else:
        columns = columns.reshape(B * Ho * Wo, taps, groups, C_per_group)
        kernel = weight.reshape(groups, O // groups, C_per_group, taps)
        out = torch.einsum("nkgc,gock->ngo", columns, kernel).reshape(B, Ho, Wo, O)
        out = out if bias is None else out + bias
    return out.permute(0, 3, 1, 2)


def _sample_positions(offset: Tensor, kh: int, kw: int, stride, padding, dilation) -> tuple[Tensor, Tensor]:
    """Returns the sampling positions of the taps in pixels of the input: y and x, each (B, Ho, Wo, kh * kw, offset_groups)."""
    B, channels, Ho, Wo = offset.shape
    offset = offset.reshape(B, channels // (2 * kh * kw), kh * kw, 2, Ho, Wo).permute(3, 0, 4, 5, 2, 1)  # (2, B, Ho, Wo, taps, groups)

    def axis(size: int, step: int) -> Tensor:
        return torch.arange(size, device=offset.device, dtype=offset.dtype) * step

    tap_y = axis(kh, dilation[0]).repeat_interleave(kw).view(-1, 1)
    tap_x = axis(kw, dilation[1]).repeat(kh).view(-1, 1)
    y = offset[0] + (axis(Ho, stride[0]).view(Ho, 1, 1, 1) - padding[0] + tap_y)
    x = offset[1] + (axis(Wo, stride[1]).view(Wo, 1, 1) - padding[1] + tap_x)
    return y, x


def _corners(y: Tensor, x: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Returns the four pixels around each position: their index in the H x W image (always inside it) and their bilinear factor.

    The factor is 0 for a corner outside the image and for all corners of a position outside ``(-1, H) x (-1, W)``; it is NaN
    for a NaN position. At exactly -1 the offset's gradient is 0, as in the original operator (torchvision's is not zero).
    """
    nan = (y.isnan() | x.isnan()).unsqueeze(-1)
    inside = (y > -1) & (x > -1) & (y < H) & (x < W)  # false for NaN
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    top, left = y.floor(), x.floor()
    dy, dx = y - top, x - left
    factor = torch.stack(((1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx), dim=-1)

    top, left = top.long(), left.long()
    rows = torch.stack((top, top, top + 1, top + 1), dim=-1)
    cols = torch.stack((left, left + 1, left, left + 1), dim=-1)
    readable = inside.unsqueeze(-1) & (rows >= 0) & (cols >= 0) & (rows < H) & (cols < W)
    factor = torch.where(readable, factor, 0.0)
    factor = torch.where(nan, float("nan"), factor)
    return rows.clamp(0, H - 1) * W + cols.clamp(0, W - 1), factor


def _weighted_gather(rows: Tensor, index: Tensor, factor: Tensor) -> Tensor:
    """``sum_j factor[n, j] * rows[index[n, j]]``: rows (R, C), index and factor (N, 4) -> (N, C) in the dtype of rows."""
    if rows.device.type == "cpu" and rows.dtype == factor.dtype and not (torch.compiler.is_compiling() or in_transform()):
        # One pass without temporaries, which is faster. Not for low precision: it would round the factors.
        return F.embedding_bag(index, rows, per_sample_weights=factor, mode="sum")
    total = rows.index_select(0, index[:, 0]) * factor[:, :1]
    for j in range(1, index.shape[1]):
        total = total + rows.index_select(0, index[:, j]) * factor[:, j : j + 1]
    return total.to(rows.dtype)


BACKEND = Backend("torch", deform_conv2d)
