# SPDX-License-Identifier: Apache-2.0
"""The linear layer of an average-pooled map: cells are averaged on their way into its product, so that their means never lie in memory.

A program computes OUTPUTS columns of CELLS pooled cells; those that share cells follow each other, and find them in the L2 cache. Means and
sums are in float32; means are rounded to the dtype of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import cells_as_rows

# 245 programs for a batch of 64 in LITv2-S's third stage (3136 cells, 640 columns): two at once on almost each of 132 multiprocessors.
TILE = dict(CELLS=64, OUTPUTS=128, num_warps=8)
STEPS = ((32, 3), (32, 2), (16, 2))  # INPUTS and num_stages, the first of them whose loads under way fit in SHARED
SHARED = 96 * 1024  # bytes: 8.6 has 99 KiB for a program, 9.0 has room for two


@triton.jit(do_not_specialize=("cells", "H", "W", "rows", "columns"))
def forward_kernel(
    x, weight, bias, shift, y, cells, H, W, rows, columns, x_stride, K, N,
    S: tl.constexpr, PADDED: tl.constexpr, CELLS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Cells of S x S rows of x. What they lack of rows and columns is 0, and so is that part of ``shift``."""
    blocks = tl.cdiv(N, OUTPUTS)
    cell, n = tl.program_id(0) // blocks * CELLS + tl.arange(0, CELLS), tl.program_id(0) % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    live, known = cell < cells, n < N
    top, left = cell // columns % rows * S, cell % columns * S
    corner = ((cell // (rows * columns)).to(tl.int64) * H + top) * W + left
    total = tl.zeros((CELLS, OUTPUTS), tl.float32)
    for start in range(0, K, INPUTS):
        k = start + tl.arange(0, INPUTS)
        mean = tl.zeros((CELLS, INPUTS), tl.float32)
        for tap in tl.static_range(S * S):
            inside = live
            if PADDED:
                inside = inside & (top + tap // S < H) & (left + tap % S < W)
            at = x + (corner + (tap // S * W + tap % S))[:, None] * x_stride + k[None, :]
            mean += tl.load(at, mask=inside[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
        mean = (mean * (1.0 / (S * S))).to(weight.dtype.element_ty)
        factors = tl.load(weight + n.to(tl.int64)[None, :] * K + k[:, None], mask=known[None, :] & (k < K)[:, None], other=0.0)
        total = tl.dot(mean, factors, total, input_precision="tf32x3")
    total += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    if PADDED:
        missing = S * S - tl.minimum(H - top, S) * tl.minimum(W - left, S)
        outside = missing.to(tl.float32) * (1.0 / (S * S))
        total -= outside[:, None] * tl.load(shift + n, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(y + cell.to(tl.int64)[:, None] * N + n[None, :], total, mask=live[:, None] & known[None, :])


def tile(s: int, of_x: int, of_weight: int) -> dict[str, int]:
    """The compile-time arguments for the side of a cell and the bytes of a value of x and of the weights."""
    for inputs, stages in STEPS:
        cells, factors = inputs * s * s * TILE["CELLS"] * of_x, inputs * TILE["OUTPUTS"] * of_weight
        if cells * (stages - 1) + factors * stages <= SHARED:
            break
    return dict(TILE, S=s, INPUTS=inputs, num_stages=stages)


def pooled_linear(x: Tensor, s: int, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """(B, H, W, K), (N, K), (N,), (N,) -> (B, ceil(H / s), ceil(W / s), N) in the dtype of the weights."""
    (B, H, W, K), N = x.shape, len(weight)
    rows, columns = triton.cdiv(H, s), triton.cdiv(W, s)
    y = x.new_empty(B, rows, columns, N, dtype=weight.dtype)
    if y.numel():
        x, weight, bias, shift = cells_as_rows(x), weight.contiguous(), bias.contiguous(), shift.contiguous()
        cells, sizes = B * rows * columns, tile(s, x.element_size(), weight.element_size())
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(cells, sizes["CELLS"]) * triton.cdiv(N, sizes["OUTPUTS"]),)](
                x, weight, bias, shift, y, cells, H, W, rows, columns, x.stride(0), K, N, PADDED=(rows * s, columns * s) != (H, W), **sizes
            )
    return y
