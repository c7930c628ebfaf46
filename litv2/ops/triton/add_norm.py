# SPDX-License-Identifier: Apache-2.0
"""The sum of two maps, and LayerNorm without scale and shift of it, in one pass.

A program holds ROWS rows whole. Statistics are in float32; the norm is that of the sum as it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import cells_as_rows

VALUES = 4096  # of a program, 32 of a thread; a row at least
TILE = dict(num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, residual, y, normed, rows, stride, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    kept, of_row = (row < rows)[:, None] & (n < N)[None, :], row.to(tl.int64)[:, None]
    at = of_row * N + n[None, :]
    total = tl.load(x + of_row * stride + n[None, :], mask=kept, other=0.0).to(tl.float32)
    total += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
    rounded = total.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=kept)
    values = rounded.to(tl.float32)
    mean = (tl.sum(values, 1) / N)[:, None]
    values = tl.where(kept, values - mean, 0.0)
    scale = tl.rsqrt(tl.sum(values * values, 1) / N + eps)[:, None]
    tl.store(normed + at, values * scale, mask=kept)


def tile(channels: int) -> dict[str, int]:
    """The compile-time arguments for a number of channels."""
    block = triton.next_power_of_2(channels)
    return dict(TILE, N=channels, BLOCK=block, ROWS=max(1, VALUES // block))


def add_norm(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(B, H, W, N), (B, H, W, N) -> the sum and it normalised, both (B, H, W, N)."""
    y, normed = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    if y.numel():
        rows, sizes = cells_as_rows(x), tile(x.shape[-1])
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(len(rows), sizes["ROWS"]),)](
                rows, residual.contiguous(), y, normed, len(rows), rows.stride(0), eps, **sizes
            )
    return y, normed
