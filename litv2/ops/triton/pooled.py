# SPDX-License-Identifier: Apache-2.0
"""Attention from every cell of a map to those of a pooled one, Lo-Fi's.

A program computes one head of QUERIES cells. Where the pooled map has at most KEYS cells, as in LITv2 at 224 x 224, their softmax is taken
at once; else KEYS by KEYS, with what has been summed scaled down whenever a larger logit comes (arXiv 1805.02867). Queries, keys and values
are read where the products of the projections have left them: nothing is permuted in memory. Sums and weights are in float32; weights are
rounded to the dtype of the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import cells_as_rows

TILE = dict(QUERIES=64, KEYS=64, num_warps=4)


@triton.jit
def _keys(queries, at, m, M, width, kv_stride, scale):
    """Of the cells m of the pooled map: their logits, in units of log 2 and -inf beyond the last cell, and their values."""
    at += m.to(tl.int64)[:, None] * kv_stride
    k = tl.load(at, mask=(m < M)[:, None], other=0.0)
    v = tl.load(at + width, mask=(m < M)[:, None], other=0.0)
    logits = tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * 1.4426950408889634)
    return tl.where((m < M)[None, :], logits, float("-inf")), v


@triton.jit
def attend_to_pooled(
    program, q, kv, y, N, M, heads, scale, q_stride, kv_stride, y_stride,
    D: tl.constexpr, ONE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What a program computes: one head of its cells, into the first heads * D channels of ``y``."""
    blocks, width = tl.cdiv(N, QUERIES), heads * D
    head, image = program // blocks % heads, (program // blocks // heads).to(tl.int64)
    n = program % blocks * QUERIES + tl.arange(0, QUERIES)
    m = tl.arange(0, KEYS)
    of_head = head * D + tl.arange(0, D)[None, :]
    cell, live = (image * N + n)[:, None], (n < N)[:, None]
    queries = tl.load(q + cell * q_stride + of_head, mask=live, other=0.0)
    keys = kv + image * M * kv_stride + of_head
    if ONE_BLOCK:
        logits, v = _keys(queries, keys, m, M, width, kv_stride, scale)
        weights = tl.exp2(logits - tl.max(logits, 1)[:, None])
        total = tl.sum(weights, 1)
        result = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    else:
        largest = tl.full((QUERIES,), -3.4028234663852886e38, tl.float32)  # finite: a block may have no other logits than -inf
        total = tl.zeros((QUERIES,), tl.float32)
        result = tl.zeros((QUERIES, D), tl.float32)
        for start in range(0, M, KEYS):
            logits, v = _keys(queries, keys, start + m, M, width, kv_stride, scale)
            larger = tl.maximum(largest, tl.max(logits, 1))
            weights = tl.exp2(logits - larger[:, None])
            shrink = tl.exp2(largest - larger)
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            largest = larger
    tl.store(y + cell * y_stride + of_head, result / total[:, None], mask=live)


@triton.jit(do_not_specialize=["N", "M"])
def forward_kernel(
    q, kv, y, N, M, heads, scale, q_stride, kv_stride, y_stride,
    D: tl.constexpr, ONE_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    attend_to_pooled(tl.program_id(0), q, kv, y, N, M, heads, scale, q_stride, kv_stride, y_stride, D, ONE_BLOCK, QUERIES, KEYS)


def pooled_attention(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    """(B, H, W, heads * D), (B, h, w, 2 * heads * D) -> (B, H, W, heads * D)."""
    B, H, W, C = q.shape
    N, M = H * W, kv.shape[1] * kv.shape[2]
    y = q.new_empty(q.shape)
    if y.numel():
        rows, keys = cells_as_rows(q), cells_as_rows(kv)
        with torch.cuda.device_of(q):
            forward_kernel[(triton.cdiv(N, TILE["QUERIES"]) * heads * B,)](
                rows, keys, y, N, M, heads, scale, rows.stride(0), keys.stride(0), C, D=C // heads, ONE_BLOCK=TILE["KEYS"] >= M, **TILE
            )
    return y
