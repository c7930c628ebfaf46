# SPDX-License-Identifier: Apache-2.0
"""The patch embedding: patches of an image as the rows of one product, and LayerNorm of its result before that is written.

A program computes all channels of TOKENS tokens. The image is read where it is, channels first or last; sums and statistics are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, INPUTS = 64, 64  # at most
REGISTERS = 64  # of a thread for its part of the result: more would be spilled
OPTIONS = dict(num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=("tokens", "H", "W", "rows", "columns", "of_image", "of_channel", "of_row", "of_column"))
def forward_kernel(
    x, weight, bias, scale, shift, y, tokens, H, W, rows, columns, of_image, of_channel, of_row, of_column, eps, N,
    PADDED: tl.constexpr, P: tl.constexpr, C: tl.constexpr, TOKENS: tl.constexpr, INPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Patches of P x P pixels with C channels. ``of_*`` are the strides of x. Rows and columns that x lacks are 0."""
    token, n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    live, known = (token < tokens)[:, None], (n < N)[None, :]
    top, left = token // columns % rows * P, token % columns * P
    corner = (token // (rows * columns)).to(tl.int64) * of_image + top.to(tl.int64) * of_row + left.to(tl.int64) * of_column
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for start in range(0, P * P * C, INPUTS):
        k = start + tl.arange(0, INPUTS)
        i, j, c = k // (P * C), k // C % P, k % C
        pixel = i.to(tl.int64) * of_row + j.to(tl.int64) * of_column + c.to(tl.int64) * of_channel
        inside = live & (k < P * P * C)[None, :]
        if PADDED:
            inside = inside & (top[:, None] + i[None, :] < H) & (left[:, None] + j[None, :] < W)
        values = tl.load(x + corner[:, None] + pixel[None, :], mask=inside, other=0.0).to(weight.dtype.element_ty)
        inputs = weight + n[None, :] * (P * P * C) + k[:, None]
        factors = tl.load(inputs, mask=known & (k < P * P * C)[:, None], other=0.0)
        total = tl.dot(values, factors, total, input_precision="tf32x3")
    total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(tl.where(known, total, 0.0), 1) / N
    centred = tl.where(known, total - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / N + eps)
    centred = centred / deviation[:, None] * tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    centred += tl.load(shift + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * N + n[None, :], centred, mask=live & known)


def tile(inputs: int, channels: int) -> dict[str, int]:
    """The compile-time arguments for a number of values of a patch and of channels of the result."""
    width = max(16, triton.next_power_of_2(channels))
    tokens = min(TOKENS, REGISTERS * 32 * OPTIONS["num_warps"] // width)
    return dict(OPTIONS, TOKENS=tokens, INPUTS=min(INPUTS, max(16, triton.next_power_of_2(inputs))), CHANNELS=width)


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, patch: int, eps: float, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """(B, C, H, W) in any memory format, (N, patch * patch * C) ordered (row, column, channel), scale and shift (N,) of LayerNorm
    -> (B, ceil(H / patch), ceil(W / patch), N)."""
    (B, C, H, W), N = x.shape, len(weight)
    rows, columns = triton.cdiv(H, patch), triton.cdiv(W, patch)
    y = x.new_empty(B, rows, columns, N, dtype=dtype)
    if y.numel():
        weight, bias, scale, shift = weight.contiguous(), bias.contiguous(), scale.contiguous(), shift.contiguous()
        tokens, sizes, padded = B * rows * columns, tile(patch * patch * C, N), (rows * patch, columns * patch) != (H, W)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(tokens, sizes["TOKENS"]),)](
                x, weight, bias, scale, shift, y, tokens, H, W, rows, columns, *x.stride(), eps, N, PADDED=padded, P=patch, C=C, **sizes
            )
    return y
