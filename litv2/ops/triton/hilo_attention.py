# SPDX-License-Identifier: Apache-2.0
"""Both branches of HiLo's attention in one launch, Hi-Fi's channels before Lo-Fi's.

A program does what one of ``attend_in_windows`` or of ``attend_to_pooled`` does, each writing into its channels of the result: nothing is
joined in memory, and the programs of one branch fill what the last ones of the other leave idle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pooled import TILE as OF_POOLED
from .pooled import attend_to_pooled
from .rows import cells_as_rows
from .windows import TILE as OF_WINDOWS
from .windows import attend_in_windows, geometry

TILE = OF_WINDOWS | OF_POOLED  # the warps of a program are the same in both


@triton.jit(do_not_specialize=["lofi_programs", "windows", "H", "W", "rows", "columns", "M"])
def forward_kernel(
    qkv, pad, q, kv, y, lofi_programs, windows, H, W, rows, columns, M, h_heads, l_heads, scale, qkv_stride, q_stride, kv_stride, y_stride,
    PADDED: tl.constexpr, S: tl.constexpr, T: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr,
    ONE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < lofi_programs:  # they have more to do: the shorter ones of Hi-Fi are left for the end
        lofi = y + h_heads * D
        attend_to_pooled(program, q, kv, lofi, H * W, M, l_heads, scale, q_stride, kv_stride, y_stride, D, ONE_BLOCK, QUERIES, KEYS)
    else:
        attend_in_windows(
            program - lofi_programs, qkv, pad, y, windows, H, W, rows, columns, h_heads, scale, qkv_stride, y_stride, PADDED, S, T, D, TILES
        )


def hilo_attention(
    qkv: Tensor, pad: Tensor, q: Tensor, kv: Tensor, window_size: int, h_heads: int, l_heads: int, scale: float
) -> Tensor:  # fmt: skip
    """(B, H, W, 3 * h_heads * D), (3 * h_heads * D,), (B, H, W, l_heads * D), (B, h, w, 2 * l_heads * D)
    -> (B, H, W, (h_heads + l_heads) * D)."""
    B, H, W, C = q.shape
    width, M = C // l_heads * (h_heads + l_heads), kv.shape[1] * kv.shape[2]
    y = q.new_empty(B, H, W, width)
    if y.numel():
        map, sizes, programs = geometry(qkv, window_size, h_heads)
        lofi_programs = triton.cdiv(H * W, TILE["QUERIES"]) * l_heads * B
        tokens, queries, keys = cells_as_rows(qkv), cells_as_rows(q), cells_as_rows(kv)
        strides = tokens.stride(0), queries.stride(0), keys.stride(0), width
        with torch.cuda.device_of(q):
            forward_kernel[(lofi_programs + programs * h_heads,)](
                tokens, pad.contiguous(), queries, keys, y, lofi_programs, *map, M, h_heads, l_heads, scale, *strides,
                ONE_BLOCK=TILE["KEYS"] >= M, **(sizes | TILE),
            )  # fmt: skip
    return y
