# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``hilo_attention``: interpreted, against torch and the kernels of its branches; compiled, within its ceilings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_helpers import on_gpu
from helpers import normal
from litv2.ops import use
from litv2.ops.hilo_attention import reference, triton
from litv2.ops.pooled import triton as pooled
from litv2.ops.triton import hilo_attention
from litv2.ops.windows import triton as windows
from triton_helpers import CAPABILITIES, compile_for

D = 16
SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14)]
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def case(H: int, W: int, h: int, w: int, dtype: torch.dtype = torch.float32, h_heads: int = 2, l_heads: int = 3, d: int = D) -> Tensors:
    """Hi-Fi's q, k, v and Lo-Fi's q, each as a part of one product's columns; padding; the pooled map's k, v, also a part."""
    product = normal(1, 2, H, W, (3 * h_heads + l_heads) * d + 8).to(dtype)
    qkv, q, _ = product.split((3 * h_heads * d, l_heads * d, 8), dim=-1)
    return qkv, normal(2, 3 * h_heads * d).to(dtype), q, normal(3, 2, h, w, 2 * l_heads * d + 8).to(dtype)[..., 8:]


def apart(tensors: Tensors, s: int, h_heads: int = 2, l_heads: int = 3) -> Tensor:
    """The same by the kernels of the branches, which do the same operations in the same order."""
    qkv, pad, q, kv = tensors
    hifi = windows.window_attention(qkv, pad, s, h_heads, 0.9)
    return torch.cat((hifi, pooled.pooled_attention(q, kv, l_heads, 0.9)), dim=-1)


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape
    return (ours.double() - exact).norm() / exact.norm()


def assert_as_precise(tensors: Tensors, s: int, h_heads: int = 2, l_heads: int = 3) -> Tensor:
    options = s, h_heads, l_heads, 0.9
    ours, plain = (run(*tensors, *options) for run in (triton.hilo_attention, reference.hilo_attention))
    exact = reference.hilo_attention(*(tensor.double() for tensor in tensors), *options)
    assert ours.dtype == plain.dtype and ours.is_contiguous()
    factor = 4 if plain.dtype == torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it truncates
    assert error(ours, exact) <= max(factor * error(plain, exact), 1e-6)
    return ours


@pytest.fixture
def torch_alone():
    """The reference, which is made of operators, on tensors that their kernels would take."""
    with use(window_attention="torch", pooled_attention="torch"):
        yield


@pytest.mark.usefixtures("interpreter", "torch_alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s", [2, 4])
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, s, dtype):
    """Maps of whole windows and padded ones, with keys of one block and of two (65); where nothing is written, there is NaN."""
    for h, w in ((-(-H // s), -(-W // s)), (5, 13))[: 1 if H == 14 else 2]:
        tensors = case(H, W, h, w, dtype)
        assert torch.equal(assert_as_precise(tensors, s), apart(tensors, s))


@pytest.mark.usefixtures("interpreter", "torch_alone")
@pytest.mark.parametrize("h_heads, l_heads, d", [(1, 1, 32), (3, 1, 16), (1, 2, 64)])
def test_other_heads(h_heads, l_heads, d):
    """More programs of one branch, or of the other."""
    for h, w in ((3, 4), (5, 13)):
        tensors = case(7, 5, h, w, h_heads=h_heads, l_heads=l_heads, d=d)
        assert torch.equal(assert_as_precise(tensors, 2, h_heads, l_heads), apart(tensors, 2, h_heads, l_heads))


@pytest.mark.usefixtures("interpreter")
def test_memory_formats():
    """Channels that do not lie side by side are copied; a batch may be a part of a larger one, or empty."""
    qkv, pad, q, kv = case(5, 7, 3, 4)
    options = 2, 2, 3, 0.9
    expected = triton.hilo_attention(qkv, pad, q, kv, *options)
    x, y, z = (tensor.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for tensor in (qkv, q, kv))
    assert torch.equal(triton.hilo_attention(x, torch.stack((pad, pad), 1)[:, 0], y, z, *options), expected)
    assert torch.equal(triton.hilo_attention(qkv[1:], pad, q[1:], kv[1:], *options), expected[1:])
    assert triton.hilo_attention(qkv[:0], pad, q[:0], kv[:0], *options).shape == (0, 5, 7, 5 * D)


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors."""
    torch.library.opcheck(torch.ops.litv2.triton_hilo_attention, (*case(1, 3, 1, 2), 2, 2, 3, 0.9))


@pytest.mark.usefixtures("interpreter")
def test_under_autocast():
    """What has been left in float32 is rounded to the dtype of the others."""
    qkv, pad, q, kv = case(5, 7, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours = triton.hilo_attention(qkv.bfloat16(), pad, q.bfloat16(), kv, 2, 2, 3, 0.9)
    assert torch.equal(ours, triton.hilo_attention(*(x.bfloat16() for x in (qkv, pad, q, kv)), 2, 2, 3, 0.9))


@pytest.mark.parametrize(
    "cells, pooled, d, s, reason",
    [
        ((2, 5, 7), (1, 1), 24, 2, "it supports heads of 16, 32, 64 channels in torch.float16, got 24"),
        ((2, 5, 7), (1, 1), D, 7, "it supports windows of up to 4 x 4 tokens, got 7 x 7"),
        ((2**15, 2**7, 2**7), (1, 1), D, 2, "cells times heads, got (32768, 128, 128)"),  # of five heads; of three they would be few enough
        ((1, 5, 7), (2**15, 2**15), D, 2, "cells times heads, got (1, 5, 7) and (1, 32768, 32768)"),
        ((65536, 2, 2), (1, 1), D, 2, None),
    ],
)
def test_reasons(monkeypatch, cells, pooled, d, s, reason):
    monkeypatch.setattr(triton.windows.triton, "why_not", lambda x: None)  # as on a GPU
    empty = torch.empty(1, dtype=torch.float16).expand
    arguments = empty(*cells, 6 * d), empty(6 * d), empty(*cells, 3 * d), empty(cells[0], *pooled, 6 * d)
    said = triton.why_not(*arguments, s, 2, 3, 1.0)
    assert said is None if reason is None else reason in said


def test_gradients_and_float32(monkeypatch):
    monkeypatch.setattr(triton.windows.triton, "why_not", lambda x: None)
    tensors, options = case(5, 7, 3, 4), (2, 2, 3, 0.9)
    assert "in float32" in triton.why_rather_not(*tensors, *options)
    assert triton.why_rather_not(*(tensor.half() for tensor in tensors), *options) is None
    for tensor in tensors:
        tensor.requires_grad_()
        assert triton.why_not(*tensors, *options) is None
        with torch.enable_grad():
            assert triton.why_not(*tensors, *options).startswith("gradients are enabled")
        tensor.requires_grad_(False)
    with torch.enable_grad():
        assert triton.why_not(*tensors, *options) is None


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """At the sizes of LITv2-S, of a detector and with other heads, as it is and in generated code."""
    sizes = [(14, 14, 7, 7, 2, 10, 32), (50, 83, 25, 42, 2, 10, 32), (5, 7, 9, 15, 1, 1, 64), (14, 14, 7, 7, 5, 3, 16)]
    for H, W, h, w, *heads, d in sizes:
        tensors = tuple(tensor.cuda() for tensor in case(H, W, h, w, dtype, *heads, d))
        ours = assert_as_precise(tensors, 2, *heads)
        assert error(ours, apart(tensors, 2, *heads).double()) <= torch.finfo(dtype).eps
        assert torch.equal(torch.compile(triton.hilo_attention)(*tensors, 2, *heads, 0.9), ours)


TYPES = dict.fromkeys(("qkv", "pad", "q", "kv", "y"), "float16") | dict(scale="fp32")
TYPES |= dict.fromkeys(("lofi_programs", "windows", "H", "W", "rows", "columns", "M", "h_heads", "l_heads"), "i32")


COMPILED = [(32, one_block, capability) for one_block in (True, False) for capability in CAPABILITIES]


@pytest.mark.extra
@pytest.mark.parametrize("d, one_block, capability", [*COMPILED, (64, False, 120)])  # the last has the most registers
def test_machine_code(d, one_block, capability):
    """Windows of 2 x 2, float16, padded: 8 values at once to and from memory, in the loop past the registers; products by the tensor
    cores, nothing spilled."""
    sizes = dict(hilo_attention.TILE, S=2, D=d, PADDED=True, ONE_BLOCK=one_block)
    found = compile_for(hilo_attention.forward_kernel, TYPES, sizes, capability, num_warps=sizes.pop("num_warps"))
    assert found.stack == 0 and found.registers <= (168 if d == 64 else 80 if one_block else 128)
    assert found.count("LDG.E.128") and found.count("STG.E.128") and not found.count("(LDG|STG).E.U16")
    assert found.count(r"LDGSTS[.\w]*") == found.count(r"LDGSTS[.\w]*128[.\w]*") and bool(found.count(r"LDGSTS[.\w]*")) != one_block
    assert found.count(r"(H|HG|UTCH)MMA[.\w]*")


@pytest.mark.extra
@pytest.mark.parametrize("s", [1, 4])
def test_one_head_in_each_branch(s):
    """Numbers of heads of 1 are constants of the compiled code."""
    sizes = dict(hilo_attention.TILE, S=s, D=32, PADDED=s > 1, ONE_BLOCK=True, h_heads=1, l_heads=1)
    found = compile_for(hilo_attention.forward_kernel, TYPES, sizes, 90, num_warps=sizes.pop("num_warps"))
    assert found.stack == 0 and found.registers <= 80 and found.count("LDG.E.128")
