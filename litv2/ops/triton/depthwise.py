# SPDX-License-Identifier: Apache-2.0
"""3 x 3 depthwise convolution with zero padding, bias and GELU over (B, H, W, C), and its gradients without atomic additions.

A program walks down a strip of COLUMNS columns and CHANNELS channels. It reads each row three times, shifted by a column, of which the
cache serves two, and adds the products to the three rows of the result that the row belongs to. The next row is read before this one is
used. Sums are in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gelu import gelu, gelu_slope

FORWARD = dict(COLUMNS=2, CHANNELS=128, num_warps=1)
BACKWARD = dict(COLUMNS=2, CHANNELS=128, num_warps=4)
ROWS = 28  # of a program, or fewer where there would be less than PROGRAMS
PROGRAMS = 2048  # enough for every GPU; in the backward pass each writes sums of its own, whose order must not depend on the GPU


@triton.jit
def _tap(weight, c, C, TAP: tl.constexpr, TURNED: tl.constexpr):
    """The weights (C, 3, 3) of a tap, (1, CHANNELS)."""
    tap: tl.constexpr = 8 - TAP if TURNED else TAP
    return tl.load(weight + c * 9 + tap, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _shifted(row, is_row, column, c, W, C):
    """A row of an image shifted by a column to the right, not at all, and to the left: zero outside. (COLUMNS, CHANNELS) each."""
    at = row + column[:, None] * C + c[None, :]
    inside = is_row & (c < C)[None, :]
    left = tl.load(at - C, mask=inside & ((column >= 1) & (column <= W))[:, None], other=0.0)
    middle = tl.load(at, mask=inside & (column < W)[:, None], other=0.0)
    right = tl.load(at + C, mask=inside & (column + 1 < W)[:, None], other=0.0)
    return left, middle, right


@triton.jit(do_not_specialize=("H", "W", "ROWS"))
def forward_kernel(x, weight, bias, y, H, W, C, ROWS, FINISH: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program is for ROWS rows of an image. Without FINISH there is no bias and no GELU, and the taps are turned around."""
    strips, chunks = tl.cdiv(W, COLUMNS), tl.cdiv(H, ROWS)
    chunk = tl.program_id(0) // strips
    column = tl.program_id(0) % strips * COLUMNS + tl.arange(0, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pitch = W.to(tl.int64) * C
    x += chunk // chunks * H * pitch
    y += chunk // chunks * H * pitch
    first = chunk % chunks * ROWS
    end = tl.minimum(first + ROWS, H)
    w00, w01, w02 = _tap(weight, c, C, 0, not FINISH), _tap(weight, c, C, 1, not FINISH), _tap(weight, c, C, 2, not FINISH)
    w10, w11, w12 = _tap(weight, c, C, 3, not FINISH), _tap(weight, c, C, 4, not FINISH), _tap(weight, c, C, 5, not FINISH)
    w20, w21, w22 = _tap(weight, c, C, 6, not FINISH), _tap(weight, c, C, 7, not FINISH), _tap(weight, c, C, 8, not FINISH)
    b = tl.zeros((1, CHANNELS), tl.float32)
    if FINISH:
        b += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    above = tl.zeros((COLUMNS, CHANNELS), tl.float32) + b  # what row r - 1 of the result has so far
    here = tl.zeros((COLUMNS, CHANNELS), tl.float32) + b  # row r
    next0, next1, next2 = _shifted(x + (first - 1) * pitch, first > 0, column, c, W, C)
    for pair in range(first - 1, end + 1, 2):
        for odd in tl.static_range(2):  # two rows in a turn: the next row becomes this one without being moved
            r = pair + odd
            left, middle, right = next0.to(tl.float32), next1.to(tl.float32), next2.to(tl.float32)
            next0, next1, next2 = _shifted(x + (r + 1) * pitch, r + 1 < H, column, c, W, C)
            z = above + left * w20 + middle * w21 + right * w22
            if FINISH:
                z = gelu(z)
            inside = (r > first) & (r <= end) & (column < W)[:, None] & (c < C)[None, :]
            tl.store(y + (r - 1) * pitch + (column[:, None] * C + c[None, :]), z, mask=inside)
            above = here + left * w10 + middle * w11 + right * w12
            here = b + left * w00 + middle * w01 + right * w02


@triton.jit(do_not_specialize=("items", "H", "W"))
def backward_kernel(
    gradient, x, weight, bias, before_gelu, sums, items, H, W, C, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The gradient before GELU, and of the weights and the bias this program's part: ``sums`` is (programs, 10, C), the bias last.

    An item is a strip of an image, over its whole height; a program takes every so manieth.
    """
    strips = tl.cdiv(W, COLUMNS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pitch = W.to(tl.int64) * C
    w00, w01, w02 = _tap(weight, c, C, 0, False), _tap(weight, c, C, 1, False), _tap(weight, c, C, 2, False)
    w10, w11, w12 = _tap(weight, c, C, 3, False), _tap(weight, c, C, 4, False), _tap(weight, c, C, 5, False)
    w20, w21, w22 = _tap(weight, c, C, 6, False), _tap(weight, c, C, 7, False), _tap(weight, c, C, 8, False)
    b = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    none = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    s00, s01, s02 = none, none, none
    s10, s11, s12 = none, none, none
    s20, s21, s22 = none, none, none
    s = none
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        column = item % strips * COLUMNS + tl.arange(0, COLUMNS)
        image = item // strips * H * pitch
        here = none + b
        above = here
        # Rows r - 2 and r - 1 of x, shifted. They are two tensors: a name that in a loop gets the tensor which it has before the loop
        # is not carried to the next turn, and rows are handed on from name to name.
        x00 = tl.zeros((COLUMNS, CHANNELS), x.dtype.element_ty)
        x10 = tl.zeros((COLUMNS, CHANNELS), x.dtype.element_ty)
        x01, x02, x11, x12 = x00, x00, x10, x10
        next0, next1, next2 = _shifted(x + image, H > 0, column, c, W, C)
        cell, inside = image + column[:, None] * C + c[None, :], (column < W)[:, None] & (c < C)[None, :]
        next_gradient = tl.zeros((COLUMNS, CHANNELS), gradient.dtype.element_ty)  # of row r - 1
        for r in range(0, H + 1):
            x20, x21, x22, dy = next0, next1, next2, next_gradient
            next0, next1, next2 = _shifted(x + image + (r + 1) * pitch, r + 1 < H, column, c, W, C)
            next_gradient = tl.load(gradient + cell + r * pitch, mask=inside & (r < H), other=0.0)
            left, middle, right = x20.to(tl.float32), x21.to(tl.float32), x22.to(tl.float32)
            z = above + left * w20 + middle * w21 + right * w22
            d = dy.to(tl.float32) * gelu_slope(z)
            tl.store(before_gelu + cell + (r - 1) * pitch, d, mask=inside & (r > 0))
            s00, s01, s02 = s00 + d * x00.to(tl.float32), s01 + d * x01.to(tl.float32), s02 + d * x02.to(tl.float32)
            s10, s11, s12 = s10 + d * x10.to(tl.float32), s11 + d * x11.to(tl.float32), s12 + d * x12.to(tl.float32)
            s20, s21, s22 = s20 + d * left, s21 + d * middle, s22 + d * right
            s += d
            above = here + left * w10 + middle * w11 + right * w12
            here = b + left * w00 + middle * w01 + right * w02
            x00, x01, x02 = x10, x11, x12
            x10, x11, x12 = x20, x21, x22
    to = sums + tl.program_id(0) * 10 * C + c
    known = c < C
    tl.store(to, tl.sum(s00, 0), mask=known)
    tl.store(to + C, tl.sum(s01, 0), mask=known)
    tl.store(to + 2 * C, tl.sum(s02, 0), mask=known)
    tl.store(to + 3 * C, tl.sum(s10, 0), mask=known)
    tl.store(to + 4 * C, tl.sum(s11, 0), mask=known)
    tl.store(to + 5 * C, tl.sum(s12, 0), mask=known)
    tl.store(to + 6 * C, tl.sum(s20, 0), mask=known)
    tl.store(to + 7 * C, tl.sum(s21, 0), mask=known)
    tl.store(to + 8 * C, tl.sum(s22, 0), mask=known)
    tl.store(to + 9 * C, tl.sum(s, 0), mask=known)


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(conv(x)): (B, H, W, C), (C, 1, 3, 3), (C,) -> (B, H, W, C) in the dtype of x."""
    return _convolved(x.contiguous(), weight.contiguous(), bias.contiguous(), finish=True)


def depthwise_gelu_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, weight and bias, in their dtypes."""
    gradient, x, weight, bias = gradient.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    B, H, W, C = x.shape
    items, blocks = B * triton.cdiv(W, BACKWARD["COLUMNS"]), triton.cdiv(C, BACKWARD["CHANNELS"])
    programs = min(items, triton.cdiv(PROGRAMS, blocks))
    before_gelu = torch.empty_like(x)
    sums = x.new_empty(programs, 10, C, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            backward_kernel[programs, blocks](gradient, x, weight, bias, before_gelu, sums, items, H, W, C, **BACKWARD)
    total = sums.sum(0)
    of_weight = torch.empty_like(weight)
    of_weight.view(C, 9).copy_(total[:9].t())
    return _convolved(before_gelu, weight, bias, finish=False), of_weight, total[9].to(bias.dtype)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor, finish: bool) -> Tensor:
    y = torch.empty_like(x)
    B, H, W, C = x.shape
    if x.numel():
        strips, blocks, rows = B * triton.cdiv(W, FORWARD["COLUMNS"]), triton.cdiv(C, FORWARD["CHANNELS"]), ROWS
        while rows > 1 and strips * blocks * triton.cdiv(H, rows) < PROGRAMS:
            rows //= 2
        with torch.cuda.device_of(x):
            forward_kernel[strips * triton.cdiv(H, rows), blocks](x, weight, bias, y, H, W, C, rows, FINISH=finish, **FORWARD)
    return y
