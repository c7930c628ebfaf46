# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``pooled_attention``: interpreted, against torch; compiled, within its ceilings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gpu_helpers import on_gpu
from helpers import normal
from litv2.ops.pooled import reference, triton
from litv2.ops.triton import pooled
from triton_helpers import CAPABILITIES, compile_for

D = 16
SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14)]
POOLED = [(1, 1), (3, 4), (8, 8), (5, 13), (9, 15)]  # 1, 12 and 64 keys, which are one block; 65 and 135


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def case(H: int, W: int, h: int, w: int, dtype: torch.dtype = torch.float32, heads: int = 2, d: int = D) -> tuple[Tensor, Tensor]:
    """Queries, keys and values, each as a part of a wider product's columns; logits of several units."""
    q, kv = normal(1, 2, H, W, heads * d + 24), normal(2, 2, h, w, 2 * heads * d + 8)
    return q.to(dtype)[..., 8 : heads * d + 8], kv.to(dtype)[..., 8:]


def written_out(q: Tensor, kv: Tensor, heads: int, scale: float) -> Tensor:
    """Head by head, without fused attention."""
    width, d, results = q.shape[-1], q.shape[-1] // heads, []
    for first in range(0, width, d):
        x = q[..., first : first + d].flatten(1, 2)
        k, v = (kv[..., start : start + d].flatten(1, 2) for start in (first, width + first))
        results.append((x @ k.mT * scale).softmax(-1) @ v)
    return torch.cat(results, dim=-1).view(q.shape)


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape
    return (ours.double() - exact).norm() / exact.norm()


def assert_as_precise(tensors: tuple[Tensor, Tensor], heads: int = 2) -> None:
    ours, plain = (run(*tensors, heads, 0.9) for run in (triton.pooled_attention, reference.pooled_attention))
    exact = written_out(*(tensor.double() for tensor in tensors), heads, 0.9)
    assert ours.dtype == plain.dtype and ours.is_contiguous()
    factor = 4 if plain.dtype == torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it truncates
    assert error(ours, exact) <= max(factor * error(plain, exact), 1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("h, w", POOLED)
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, h, w, dtype):
    """Maps that fill a block of queries and that do not, keys of one block and of several."""
    assert_as_precise(case(H, W, h, w, dtype))


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("heads, d", [(1, 32), (3, 64)])
def test_other_heads(heads, d):
    for h, w in ((3, 4), (5, 13)):
        assert_as_precise(case(5, 7, h, w, heads=heads, d=d), heads)


@pytest.mark.usefixtures("interpreter")
def test_memory_formats():
    """Channels that do not lie side by side are copied; a batch may be a part of a larger one."""
    q, kv = case(5, 7, 3, 4)
    expected = triton.pooled_attention(q, kv, 2, 0.3)
    by_channels = [tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for tensor in (q, kv)]
    assert torch.equal(triton.pooled_attention(*by_channels, 2, 0.3), expected)
    assert torch.equal(triton.pooled_attention(q[1:], kv[1:], 2, 0.3), expected[1:])
    assert triton.pooled_attention(q[:0], kv[:0], 2, 0.3).shape == (0, 5, 7, 2 * D)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("h, w", [(5, 7), (9, 15)])
def test_large_logits(h, w):
    """Of thousands, where the largest comes first, in the middle, and last."""
    q, kv = case(5, 7, h, w)
    q[:] = q.sign()
    for m in (0, h * w // 2, h * w - 1):
        kv[:, m // w, m % w, : 2 * D] = 200 * q[0, 0, 0]
        exact = written_out(q.double(), kv.double(), 2, 1.0)
        assert error(triton.pooled_attention(q, kv, 2, 1.0), exact) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("h, w", [(3, 4), (9, 15)])
def test_what_is_not_finite(h, w, value):
    """It reaches its query's row, or as a key or value all rows, of its image and head: as where attention is written out."""
    kinds = ("query", "first key", "last key", "first value", "last value")
    for kind in kinds:
        q, kv = case(5, 7, h, w)
        before = triton.pooled_attention(q, kv, 2, 0.3)
        if kind == "query":
            q[1, 2, 3, D] = value
        else:
            row, column = (0, 0) if "first" in kind else (-1, -1)
            kv[1, row, column, D + (2 * D if "value" in kind else 0)] = value
        changed, expected = (run(q, kv, 2, 0.3) for run in (triton.pooled_attention, written_out))
        assert torch.allclose(changed, expected, atol=1e-5, equal_nan=True), kind
        assert torch.equal(changed[0], before[0]) and torch.equal(changed[1, ..., :D], before[1, ..., :D])
        assert changed.isnan().any() or value == value, kind


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("interpreter")
def test_blocks_of_infinite_logits():
    """A first block of keys that no query attends to, and rows that attend to nothing else: the others decide, and those are NaN."""
    q, kv = case(5, 7, 9, 15)
    q[..., 0] = 1.0
    q[0, 0, 0, 0] = -1.0
    kv[:, :5, :, 0] = -float("inf")  # 75 keys
    ours, expected = (run(q, kv, 2, 0.3) for run in (triton.pooled_attention, written_out))
    assert torch.allclose(ours, expected, atol=1e-5, equal_nan=True)
    assert ours.isnan().sum() == D  # the first head of one query, whose logits are +inf


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("h, w", [(3, 4), (9, 15)])
def test_opcheck(h, w):
    """Shapes, strides and dtypes of fake tensors."""
    torch.library.opcheck(torch.ops.litv2.triton_pooled_attention, (*case(1, 3, h, w), 2, 0.3))


@pytest.mark.usefixtures("interpreter")
def test_under_autocast():
    """Keys that a sum with float32 has left in float32 are rounded like the queries."""
    q, kv = case(5, 7, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = triton.pooled_attention(q.bfloat16(), kv, 2, 0.3)
    assert torch.equal(ours, triton.pooled_attention(q.bfloat16(), kv.bfloat16(), 2, 0.3))


@pytest.mark.parametrize(
    "q, kv, heads, reason",
    [
        ((2, 5, 7, 48), (2, 3, 4, 96), 2, "it supports heads of 16, 32, 64 channels, got 24"),
        ((2**16, 2**8, 2**6, 32), (2**16, 2, 2, 64), 2, "it supports maps of up to 2147483584 cells times heads, got (65536, 256, 64) and"),
        ((1, 2, 2, 32), (1, 2**15, 2**15, 64), 2, "cells times heads"),
        ((65536, 2, 2, 32), (65536, 1, 1, 64), 2, None),
    ],
)
def test_reasons(monkeypatch, q, kv, heads, reason):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    said = triton.why_not(torch.empty(1).expand(q), torch.empty(1).expand(kv), heads, 1.0)
    assert said is None if reason is None else reason in said


def test_gradients_and_float32(monkeypatch):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)
    q, kv = case(5, 7, 3, 4)
    assert "in float32" in triton.why_rather_not(q, kv, 2, 1.0) and triton.why_rather_not(q.half(), kv.half(), 2, 1.0) is None
    kv.requires_grad_()
    assert triton.why_not(q, kv, 2, 1.0) is None
    with torch.enable_grad():
        assert triton.why_not(q, kv.detach(), 2, 1.0) is None
        assert triton.why_not(q, kv, 2, 1.0).startswith("gradients are enabled")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """At the sizes of LITv2-S, of a detector and with other heads, as it is and in generated code."""
    sizes = [(14, 14, 7, 7, 10, 32), (7, 7, 7, 7, 24, 32), (50, 84, 25, 42, 10, 32), (5, 7, 9, 15, 1, 64), (14, 14, 7, 7, 3, 16)]
    for H, W, h, w, heads, d in sizes:
        q, kv = (tensor.cuda() for tensor in case(H, W, h, w, dtype, heads, d))
        scale = 1 / math.sqrt(d)
        ours, plain = (run(q, kv, heads, scale) for run in (triton.pooled_attention, reference.pooled_attention))
        exact = written_out(q.double(), kv.double(), heads, scale)
        assert error(ours, exact) <= 2 * error(plain, exact)
        assert torch.equal(torch.compile(triton.pooled_attention)(q, kv, heads, scale), ours)


@pytest.mark.extra
@pytest.mark.parametrize("d, one_block, capability", [*((32, block, c) for block in (True, False) for c in CAPABILITIES), (64, False, 120)])
def test_machine_code(d, one_block, capability):
    """float16: 8 values at once to and from memory, in the loop past the registers; products by the tensor cores, nothing spilled."""
    types = dict(q="float16", kv="float16", y="float16", N="i32", M="i32", heads="i32", scale="fp32")
    sizes = dict(pooled.TILE, D=d, ONE_BLOCK=one_block)
    found = compile_for(pooled.forward_kernel, types, sizes, capability, num_warps=sizes.pop("num_warps"))
    assert found.stack == 0 and found.registers <= (168 if d == 64 else 96 if one_block else 128)
    assert found.count("LDG.E.128") and found.count("STG.E.128") and not found.count("(LDG|STG).E.U16")
    assert found.count(r"LDGSTS[.\w]*") == found.count(r"LDGSTS[.\w]*128[.\w]*") and bool(found.count(r"LDGSTS[.\w]*")) != one_block
    assert found.count(r"(H|HG|UTCH)MMA[.\w]*")
