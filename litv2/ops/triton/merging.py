# SPDX-License-Identifier: Apache-2.0
"""The deformable 2 x 2 convolution with stride 2 of token merging, its bias and GELU, as one product.

The samples of a tap are interpolated on their way into the product, so that they never lie in memory. A program computes PIXELS pixels and
CHANNELS channels of the result. Positions, interpolation and sums are in float32; samples are rounded to the dtype of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu

TILE = dict(PIXELS=64, INPUTS=32, num_warps=8, num_stages=1)
LARGEST_TILE = 256  # channels


@triton.jit(do_not_specialize=["pixels", "H", "W", "rows", "columns"])
def forward_kernel(
    x, offset, weight, bias, y, pixels, H, W, rows, columns, C, N, PIXELS: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = pixel < pixels
    image = (pixel // (rows * columns)).to(tl.int64) * H * W
    row, column = pixel // columns % rows, pixel % columns
    total = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for tap in tl.static_range(4):
        shift = offset + pixel.to(tl.int64) * 8 + 2 * tap
        top = (row * 2 + tap // 2).to(tl.float32) + tl.load(shift, mask=live, other=0.0)
        left = (column * 2 + tap % 2).to(tl.float32) + tl.load(shift + 1, mask=live, other=0.0)
        nan = (top != top) | (left != left)
        inside = live & (top > -1) & (left > -1) & (top < H) & (left < W)  # false for NaN; only now are they converted to integers
        top, left = tl.where(inside, top, 0.0), tl.where(inside, left, 0.0)
        first, before = tl.floor(top).to(tl.int32), tl.floor(left).to(tl.int32)
        down, right = top - first.to(tl.float32), left - before.to(tl.float32)
        corner = x + ((image + first * W + before) * C)[:, None]
        above, below = inside & (first >= 0), inside & (first + 1 < H)
        at_left, at_right = before >= 0, before + 1 < W
        for start in range(0, C, INPUTS):
            c = start + tl.arange(0, INPUTS)[None, :]
            sample = ((1 - down) * (1 - right))[:, None] * tl.load(corner + c, mask=(above & at_left)[:, None], other=0.0).to(tl.float32)
            sample += ((1 - down) * right)[:, None] * tl.load(corner + C + c, mask=(above & at_right)[:, None], other=0.0).to(tl.float32)
            sample += (down * (1 - right))[:, None] * tl.load(corner + W * C + c, mask=(below & at_left)[:, None], other=0.0).to(tl.float32)
            sample += (down * right)[:, None] * tl.load(corner + W * C + C + c, mask=(below & at_right)[:, None], other=0.0).to(tl.float32)
            sample = tl.where(nan[:, None], float("nan"), sample).to(weight.dtype.element_ty)
            inputs = weight + n[None, :] * (4 * C) + tap * C + start + tl.arange(0, INPUTS)[:, None]
            total += tl.dot(sample, tl.load(inputs, mask=(n < N)[None, :], other=0.0), input_precision="ieee")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + pixel.to(tl.int64)[:, None] * N + n[None, :], gelu(total), mask=live[:, None] & (n < N)[None, :])


def tile(out_channels: int) -> dict[str, int]:
    """The compile-time arguments for a number of channels of the result."""
    return dict(TILE, CHANNELS=min(LARGEST_TILE, max(16, triton.next_power_of_2(out_channels))))


def token_merging(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C), (B, H // 2, W // 2, 8) in float32, (N, 4 * C) ordered (tap, channel), (N,) -> (B, H // 2, W // 2, N)."""
    (_, H, W, C), (B, rows, columns, _), N = x.shape, offset.shape, len(weight)
    x, offset, weight, bias = x.contiguous(), offset.contiguous(), weight.contiguous(), bias.contiguous()
    y = x.new_empty(B, rows, columns, N)
    pixels, sizes = B * rows * columns, tile(N)
    if y.numel():
        with torch.cuda.device_of(x):
            grid = triton.cdiv(pixels, sizes["PIXELS"]), triton.cdiv(N, sizes["CHANNELS"])
            forward_kernel[grid](x, offset, weight, bias, y, pixels, H, W, rows, columns, C, N, **sizes)
    return y
