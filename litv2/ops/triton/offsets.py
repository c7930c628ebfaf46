# SPDX-License-Identifier: Apache-2.0
"""The offsets of token merging: a plain 2 x 2 convolution with stride 2, as precise as in float32, of x and weights in any precision.

A program computes all outputs of PIXELS pixels. Factors of the products are split into what TF32 holds and the rest, so that tensor cores
lose nothing that float32 has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = dict(PIXELS=64, INPUTS=32, num_warps=2, num_stages=3)


@triton.jit(do_not_specialize=("pixels", "H", "W", "rows", "columns"))
def forward_kernel(
    x, weight, bias, y, pixels, H, W, rows, columns, C, N: tl.constexpr, PIXELS: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    pixel, n = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS), tl.arange(0, 16)  # as many as tensor cores take
    live = (pixel < pixels)[:, None]
    cell = ((pixel // (rows * columns)).to(tl.int64) * H + pixel // columns % rows * 2) * W + pixel % columns * 2
    total = tl.zeros((PIXELS, 16), tl.float32)
    for start in range(0, 4 * C, INPUTS):  # the two upper taps lie side by side, and so do the two below them
        k = start + tl.arange(0, INPUTS)
        to_row = start // (2 * C) * (W.to(tl.int64) - 2) * C
        values = tl.load(x + cell[:, None] * C + to_row + k[None, :], mask=live, other=0.0).to(tl.float32)
        factors = tl.load(weight + n[None, :] * (4 * C) + k[:, None], mask=(n < N)[None, :], other=0.0).to(tl.float32)
        total = tl.dot(values, factors, total, input_precision="tf32x3")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + pixel.to(tl.int64)[:, None] * N + n[None, :], total, mask=live & (n < N)[None, :])


def predict_offset(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, H, W, C), (8, 4 * C) ordered (tap, channel), (8,) -> (B, H // 2, W // 2, 8) in float32."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    (B, H, W, C), N = x.shape, len(weight)
    rows, columns = H // 2, W // 2
    y = x.new_empty(B, rows, columns, N, dtype=torch.float32)
    if y.numel():
        with torch.cuda.device_of(x):
            pixels = B * rows * columns
            forward_kernel[(triton.cdiv(pixels, TILE["PIXELS"]),)](x, weight, bias, y, pixels, H, W, rows, columns, C, N=N, **TILE)
    return y
