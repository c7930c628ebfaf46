# SPDX-License-Identifier: Apache-2.0
"""Attention in windows, Hi-Fi's, and its gradients without atomic additions.

A window has 4 to 16 tokens, much less than the tiles of fused attention in libraries. Here a tile has the T = 16 tokens that tensor cores
take, as many whole windows as fit, and the softmax leaves out what is of another window. Tokens are read where the product of the
projections has left them and written where they belong: nothing is permuted, padded or cropped in memory.

A program computes one head of TILES tiles. Sums and weights are in float32; weights are rounded to the dtype of the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import cells_as_rows

TILE = dict(T=16, TILES=4, num_warps=4)  # a tile for each warp


@triton.jit
def _cells(program, windows, H, W, rows, columns, S: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr):
    """The tokens of a program, each (TILES, T): the number of their cell in the batch, whether the map has it, whether it is padding."""
    area: tl.constexpr = S * S
    t = tl.arange(0, T)
    window = (program * TILES + tl.arange(0, TILES))[:, None] * (T // area) + (t // area)[None, :]
    row = window // columns % rows * S + (t % area // S)[None, :]
    column = window % columns * S + (t % S)[None, :]
    used = (window < windows) & (t < T // area * area)[None, :]
    inside = used & (row < H) & (column < W)
    return ((window // (rows * columns)).to(tl.int64) * H + row) * W + column, inside, used & ~inside


@triton.jit
def _read(x, pad, inside, PADDED: tl.constexpr):
    """Tokens (TILES, T, D); those that the map lacks are ``pad``."""
    tokens = tl.load(x, mask=inside[:, :, None], other=0.0)
    if PADDED:
        tokens = tl.where(inside[:, :, None], tokens, tl.load(pad))
    return tokens


@triton.jit
def _same_window(S: tl.constexpr, T: tl.constexpr):
    """(1, T, T)."""
    window = tl.arange(0, T) // (S * S)
    return (window[:, None] == window[None, :])[None]


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _weights(q, k, scale, S: tl.constexpr, T: tl.constexpr):
    """The attention of each tile, (TILES, T, T): 0 between windows."""
    logits = _product(q, tl.permute(k, (0, 2, 1))) * (scale * 1.4426950408889634)
    logits = tl.where(_same_window(S, T), logits, float("-inf"))
    weights = tl.exp2(logits - tl.max(logits, 2)[:, :, None])
    return weights / tl.sum(weights, 2)[:, :, None]


@triton.jit
def attend_in_windows(
    program, qkv, pad, y, windows, H, W, rows, columns, heads, scale, qkv_stride, y_stride,
    PADDED: tl.constexpr, S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What a program computes: one head of its tiles, into the first heads * D channels of ``y``."""
    head = program % heads
    cell, inside, _ = _cells(program // heads, windows, H, W, rows, columns, S, T, TILES)
    cell, d = cell[:, :, None], tl.arange(0, D)[None, None, :]
    q_at, q_pad, width = qkv + cell * qkv_stride + head * D + d, pad + head * D + d, heads * D
    q = _read(q_at, q_pad, inside, PADDED)
    k = _read(q_at + width, q_pad + width, inside, PADDED)
    v = _read(q_at + 2 * width, q_pad + 2 * width, inside, PADDED)
    weights = _weights(q, k, scale, S, T).to(v.dtype)
    if T >= 2 * S * S:  # of several windows: 0 times a value that is not finite would make the others NaN
        wild = (v - v) != 0
        same = tl.zeros((TILES, T, T), tl.float32) + tl.where(_same_window(S, T), 1.0, 0.0)
        reached = _product(same.to(v.dtype), tl.where(wild, 1.0, 0.0).to(v.dtype)) > 0
        result = tl.where(reached, float("nan"), _product(weights, tl.where(wild, 0.0, v)))
    else:
        result = _product(weights, v)
    tl.store(y + cell * y_stride + head * D + d, result, mask=inside[:, :, None])


@triton.jit(do_not_specialize=["windows", "H", "W", "rows", "columns"])
def forward_kernel(
    qkv, pad, y, windows, H, W, rows, columns, heads, scale, qkv_stride, y_stride,
    PADDED: tl.constexpr, S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    attend_in_windows(
        tl.program_id(0), qkv, pad, y, windows, H, W, rows, columns, heads, scale, qkv_stride, y_stride, PADDED, S, T, D, TILES
    )


@triton.jit(do_not_specialize=["windows", "H", "W", "rows", "columns"])
def backward_kernel(
    gradient, qkv, pad, of_qkv, of_padding, windows, H, W, rows, columns, heads, scale, gradient_stride, qkv_stride,
    PADDED: tl.constexpr, S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``of_padding`` (programs of a head, 2 * heads * D) gets the sums of each program's padding, of keys and of values."""
    program, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    cell, inside, outside = _cells(program, windows, H, W, rows, columns, S, T, TILES)
    cell, d = cell[:, :, None], tl.arange(0, D)[None, None, :]
    q_at, q_pad, width = qkv + cell * qkv_stride + head * D + d, pad + head * D + d, heads * D
    q = _read(q_at, q_pad, inside, PADDED)
    k = _read(q_at + width, q_pad + width, inside, PADDED)
    v = _read(q_at + 2 * width, q_pad + 2 * width, inside, PADDED)
    dy = tl.load(gradient + cell * gradient_stride + head * D + d, mask=inside[:, :, None], other=0.0).to(v.dtype)
    weights = _weights(q, k, scale, S, T)
    dweights = _product(dy, tl.permute(v, (0, 2, 1)))
    dlogits = weights * (dweights - tl.sum(weights * dweights, 2)[:, :, None]) * scale
    dv = _product(tl.permute(weights, (0, 2, 1)).to(v.dtype), dy)
    dk = _product(tl.permute(dlogits, (0, 2, 1)).to(q.dtype), q)
    to = of_qkv + cell * (3 * width) + head * D + d
    tl.store(to, _product(dlogits.to(k.dtype), k), mask=inside[:, :, None])
    tl.store(to + width, dk, mask=inside[:, :, None])
    tl.store(to + 2 * width, dv, mask=inside[:, :, None])
    if PADDED:  # queries there have no gradient
        row = of_padding + program.to(tl.int64) * (2 * width) + head * D + tl.arange(0, D)
        tl.store(row, tl.sum(tl.sum(tl.where(outside[:, :, None], dk, 0.0), 1), 0))
        tl.store(row + width, tl.sum(tl.sum(tl.where(outside[:, :, None], dv, 0.0), 1), 0))


def geometry(qkv: Tensor, window_size: int, heads: int) -> tuple[tuple[int, ...], dict[str, int], int]:
    """Returns the kernels' (windows, H, W, rows, columns), compile-time arguments, and programs of a head."""
    B, H, W, C = qkv.shape
    rows, columns = triton.cdiv(H, window_size), triton.cdiv(W, window_size)
    sizes = dict(TILE, S=window_size, D=C // 3 // heads, PADDED=(rows * window_size, columns * window_size) != (H, W))
    windows = B * rows * columns
    return (windows, H, W, rows, columns), sizes, triton.cdiv(windows, TILE["T"] // window_size**2 * TILE["TILES"])


def window_attention(qkv: Tensor, pad: Tensor, window_size: int, heads: int, scale: float) -> Tensor:
    """(B, H, W, 3 * heads * D), (3 * heads * D,) -> (B, H, W, heads * D)."""
    C = qkv.shape[-1] // 3
    y = qkv.new_empty(*qkv.shape[:3], C)
    if y.numel():
        map, sizes, programs = geometry(qkv, window_size, heads)
        x = cells_as_rows(qkv)
        with torch.cuda.device_of(x):
            forward_kernel[(programs * heads,)](x, pad.contiguous(), y, *map, heads, scale, x.stride(0), C, **sizes)
    return y


def window_attention_backward(
    gradient: Tensor, qkv: Tensor, pad: Tensor, window_size: int, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of qkv and pad."""
    C = qkv.shape[-1]
    of_qkv, of_pad = torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.zeros_like(pad)
    if of_qkv.numel():
        map, sizes, programs = geometry(qkv, window_size, heads)
        of_padding = torch.empty(programs if sizes["PADDED"] else 0, C // 3 * 2, device=qkv.device)
        x, dy = cells_as_rows(qkv), cells_as_rows(gradient)
        with torch.cuda.device_of(x):
            backward_kernel[(programs * heads,)](
                dy, x, pad.contiguous(), of_qkv, of_padding, *map, heads, scale, dy.stride(0), x.stride(0), **sizes
            )
        of_pad[C // 3 :] = of_padding.sum(0)
    return of_qkv, of_pad
