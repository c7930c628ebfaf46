# SPDX-License-Identifier: Apache-2.0
"""A linear layer of normalised rows: LayerNorm without scale and shift as the beginning of the product.

A program reads ROWS rows of x once, normalises them, and multiplies them by the weights of all outputs, OUTPUTS at a time. The inputs lie
in one or two blocks, whose sizes are powers of two. Sums and statistics are in float32; what is normalised is rounded to the dtype of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import blocks, cells_as_rows

INPUTS = 256  # at most: a program keeps its rows
TILE = dict(OUTPUTS=64, num_warps=8, num_stages=2)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, weight, bias, y, rows, stride, eps, K: tl.constexpr, N: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live, start = (row < rows)[:, None], row.to(tl.int64)[:, None]
    k = tl.arange(0, FIRST)
    kept = live & (k < K)[None, :]
    values = tl.load(x + start * stride + k[None, :], mask=kept, other=0.0).to(tl.float32)
    total = tl.sum(values, 1)
    if SECOND:
        k2 = FIRST + tl.arange(0, SECOND)
        kept2 = live & (k2 < K)[None, :]
        values2 = tl.load(x + start * stride + k2[None, :], mask=kept2, other=0.0).to(tl.float32)
        total += tl.sum(values2, 1)
    mean = (total / K)[:, None]
    values = tl.where(kept, values - mean, 0.0)
    squares = tl.sum(values * values, 1)
    if SECOND:
        values2 = tl.where(kept2, values2 - mean, 0.0)
        squares += tl.sum(values2 * values2, 1)
    scale = tl.rsqrt(squares / K + eps)[:, None]
    values = (values * scale).to(weight.dtype.element_ty)
    if SECOND:
        values2 = (values2 * scale).to(weight.dtype.element_ty)
    for first in range(0, N, OUTPUTS):
        n = first + tl.arange(0, OUTPUTS)
        of_output, known = weight + n[None, :] * K, (n < N)[None, :]
        factors = tl.load(of_output + k[:, None], mask=known & (k < K)[:, None], other=0.0)
        product = tl.dot(values, factors, input_precision="ieee")
        if SECOND:
            factors2 = tl.load(of_output + k2[:, None], mask=known & (k2 < K)[:, None], other=0.0)
            product = tl.dot(values2, factors2, product, input_precision="ieee")
        product += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        tl.store(y + start * N + n[None, :], product, mask=live & known)


def tile(inputs: int) -> dict[str, int]:
    """The compile-time arguments for a number of inputs."""
    first, second = blocks(inputs)
    return dict(TILE, K=inputs, FIRST=first, SECOND=second, ROWS=128 if first + second <= 192 else 64)


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(B, H, W, K), (N, K), (N,) -> (B, H, W, N)."""
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel():
        rows, sizes = cells_as_rows(x), tile(K)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(len(rows), sizes["ROWS"]),)](
                rows, weight.contiguous(), bias.contiguous(), y, len(rows), rows.stride(0), eps, N=N, **sizes
            )
    return y
