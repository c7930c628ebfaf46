# SPDX-License-Identifier: Apache-2.0
"""A linear layer and the residual, added before anything is written, and LayerNorm without scale and shift of the sum.

A program computes all outputs of ROWS rows, so that it has what the norm needs. They lie in one or two blocks, whose sizes are powers of
two. Sums and statistics are in float32; the norm is that of the sum as it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import blocks, cells_as_rows

OUTPUTS = 384  # at most: for more a program's threads would not have enough registers
STAGES = 3


@triton.jit
def _sum(product, bias, residual, y, at, n, N, live):
    """Adds bias and residual to a block of the product, and stores it. Returns it as it is stored, and which values exist."""
    kept = live & (n < N)[None, :]
    product += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    product += tl.load(residual + at, mask=kept, other=0.0).to(tl.float32)
    rounded = product.to(y.dtype.element_ty)
    tl.store(y + at, rounded, mask=kept)
    return tl.where(kept, rounded.to(tl.float32), 0.0), kept


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, weight, bias, residual, y, normed, rows, stride, eps, K: tl.constexpr, N: tl.constexpr, NORM: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, n, n2 = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, FIRST), FIRST + tl.arange(0, SECOND or 1)
    live, of_row = (row < rows)[:, None], row.to(tl.int64)[:, None]
    product = tl.zeros((ROWS, FIRST), tl.float32)
    product2 = tl.zeros((ROWS, SECOND or 1), tl.float32)
    for start in range(0, K, INPUTS):
        k = start + tl.arange(0, INPUTS)
        values = tl.load(x + of_row * stride + k[None, :], mask=live & (k < K)[None, :], other=0.0)
        factors = tl.load(weight + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
        product = tl.dot(values, factors, product, input_precision="ieee")
        if SECOND:
            factors2 = tl.load(weight + n2[None, :] * K + k[:, None], mask=(n2 < N)[None, :] & (k < K)[:, None], other=0.0)
            product2 = tl.dot(values, factors2, product2, input_precision="ieee")
    at = of_row * N + n[None, :]
    result, kept = _sum(product, bias, residual, y, at, n, N, live)
    total = tl.sum(result, 1)
    if SECOND:
        at2 = of_row * N + n2[None, :]
        result2, kept2 = _sum(product2, bias, residual, y, at2, n2, N, live)
        total += tl.sum(result2, 1)
    if NORM:
        mean = (total / N)[:, None]
        result = tl.where(kept, result - mean, 0.0)
        squares = tl.sum(result * result, 1)
        if SECOND:
            result2 = tl.where(kept2, result2 - mean, 0.0)
            squares += tl.sum(result2 * result2, 1)
        scale = tl.rsqrt(squares / N + eps)[:, None]
        tl.store(normed + at, result * scale, mask=kept)
        if SECOND:
            tl.store(normed + at2, result2 * scale, mask=kept2)


def tile(outputs: int) -> dict[str, int]:
    """The compile-time arguments for a number of outputs: a thread holds at most 96 results."""
    first, second = blocks(outputs)
    width = first + second
    sizes = dict(N=outputs, FIRST=first, SECOND=second, INPUTS=64 if width <= 128 else 32)
    return dict(sizes, ROWS=128 if width <= 192 else 64, num_warps=8 if width <= 256 else 16, num_stages=STAGES)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """(B, H, W, K), (N, K), (N,), (B, H, W, N) -> (B, H, W, N)."""
    y = residual.new_empty(residual.shape)
    _launch(x, weight, bias, residual, y, None, 0.0)
    return y


def linear_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(B, H, W, K), (N, K), (N,), (B, H, W, N) -> the sum and it normalised, both (B, H, W, N)."""
    y, normed = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    _launch(x, weight, bias, residual, y, normed, eps)
    return y, normed


def _launch(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, y: Tensor, normed: Tensor | None, eps: float) -> None:
    if y.numel():
        (N, K), rows = weight.shape, cells_as_rows(x)
        sizes = dict(tile(N), K=K, NORM=normed is not None)
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(len(rows), sizes["ROWS"]),)](
                rows, weight.contiguous(), bias.contiguous(), residual.contiguous(), y, normed, len(rows), rows.stride(0), eps, **sizes
            )
