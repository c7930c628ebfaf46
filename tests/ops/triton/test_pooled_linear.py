# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``pooled_linear``: interpreted, against torch; compiled, within its ceilings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_helpers import on_gpu
from helpers import assert_as_precise, normal
from litv2.ops.pooled_linear import reference, triton
from litv2.ops.triton import pooled_linear
from triton_helpers import CAPABILITIES, compile_for

SIZES = [(1, 1), (1, 6), (6, 1), (5, 7), (7, 5), (14, 14)]
K, N = 40, 136  # two steps of a product and two blocks of columns, the second of each partly filled


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def case(H: int, W: int, dtype: torch.dtype = torch.float32, k: int = K, n: int = N) -> tuple[Tensor, ...]:
    """x, weight, bias, shift, on the CPU."""
    tensors = normal(1, 2, H, W, k), normal(2, n, k), normal(3, n), normal(4, n)
    return tuple(tensor.to(dtype) for tensor in tensors)


def written_out(x: Tensor, s: int, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """Cell by cell in float64, as the layer does: the mean of what is normalised, shifted and, beyond the map, 0."""
    x, weight, bias, shift = (tensor.double() for tensor in (x, weight, bias, shift))
    tokens = x @ weight.T + shift  # the bias without the shift is added once
    rows = []
    for top in range(0, x.shape[1], s):
        cells = [tokens[:, top : top + s, left : left + s].sum((1, 2)) / s**2 for left in range(0, x.shape[2], s)]
        rows.append(torch.stack(cells, 1))
    return torch.stack(rows, 1) + bias - shift


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape and ours.is_contiguous()
    return (ours.double() - exact).norm() / exact.norm()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("s", [2, 3, 4])
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, s):
    """Maps of whole cells and others, smaller than a cell, and of more cells than a program computes; in two dtypes."""
    x, *others = case(H, W)
    exact = written_out(x, s, *others)
    assert error(triton.pooled_linear(x, s, *others), exact) < 1e-6
    x, *others = case(H, W, torch.bfloat16)
    exact, plain, ours = (run(x, s, *others) for run in (written_out, reference.pooled_linear, triton.pooled_linear))
    assert ours.dtype == plain.dtype == torch.bfloat16 and ours.is_contiguous()
    assert_as_precise(ours, plain, exact, factor=4)  # the interpreter truncates to bfloat16


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("k, n", [(1, 1), (7, 3), (32, 128), (33, 130), (96, 5)])
def test_other_widths(k, n):
    """Of whole steps and blocks, and of others."""
    for s in (1, 2):
        x, *others = case(5, 7, k=k, n=n)
        assert error(triton.pooled_linear(x, s, *others), written_out(x, s, *others)) < 1e-6


@pytest.mark.usefixtures("interpreter")
def test_memory_formats():
    """A part of a wider map's channels or of a batch is read where it is; other parts of a map are copied."""
    x, *others = case(5, 7)
    expected = triton.pooled_linear(x, 2, *others)
    wide = torch.full((2, 7, 9, K + 24), float("nan"))
    wide[:, :5, :7, 8 : K + 8] = x
    channels = wide[:, :5, :7].contiguous()[..., 8 : K + 8]
    assert pooled_linear.cells_as_rows(channels).data_ptr() == channels.data_ptr()
    for view in (channels, wide[:, :5, :7, 8 : K + 8], x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        assert not view.is_contiguous() and torch.equal(triton.pooled_linear(view, 2, *others), expected)
    assert torch.equal(triton.pooled_linear(x[1:], 2, *others), expected[1:])
    assert torch.equal(triton.pooled_linear(x[:1].expand(2, -1, -1, -1), 2, *others), expected[:1].expand(2, -1, -1, -1))
    strided = (tensor.repeat_interleave(2, -1)[..., ::2] for tensor in others)
    assert torch.equal(triton.pooled_linear(x, 2, *strided), expected)
    assert triton.pooled_linear(x[:0], 2, *others).shape == (0, 3, 4, N)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_cell(value):
    x, *others = case(9, 16)  # 80 pooled cells
    before = triton.pooled_linear(x, 2, *others)
    x[0, 3, 4, 5] = x[1, 8, 15, K - 1] = value  # the second in a cell that lies partly outside
    ours = triton.pooled_linear(x, 2, *others)
    assert torch.allclose(ours, reference.pooled_linear(x, 2, *others), atol=1e-4, equal_nan=True)
    spoilt = ~ours.isfinite().all(-1)
    assert spoilt.nonzero().tolist() == [[0, 1, 2], [1, 4, 7]] and not ours[spoilt].isfinite().any()
    assert torch.equal(ours[~spoilt], before[~spoilt])


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("H, W", [(4, 6), (5, 7)])
def test_autocast(H, W):
    """A map in float32, as autocast's norm returns it, is pooled in float32; what is returned is of the product."""
    x, *others = case(H, W)
    with torch.autocast("cpu", torch.bfloat16):
        ours = triton.pooled_linear(x, 2, *others)
    low = [tensor.bfloat16() for tensor in others]
    assert ours.dtype == torch.bfloat16
    plain = reference.pooled_linear(x.bfloat16(), 2, *low)
    assert_as_precise(ours, plain, written_out(x, 2, *low), factor=4)


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors; also of an empty batch, and of a map in another dtype."""
    for batch, dtype in ((2, torch.float32), (0, torch.float32), (1, torch.bfloat16)):
        x, *others = case(3, 5)
        others = [tensor.to(dtype) for tensor in others]
        torch.library.opcheck(torch.ops.litv2.triton_pooled_linear, (x[:batch], 2, *others))


def test_reasons(monkeypatch):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    x, weight, bias, shift = case(5, 7)
    assert triton.why_not(x, 2, weight, bias, shift) is None and "in float32" in triton.why_rather_not(x, 2, weight, bias, shift)
    assert triton.why_rather_not(x.half(), 2, weight, bias, shift) is None
    assert triton.why_not(x, 5, weight, bias, shift) == "it supports windows of up to 4 x 4 cells, got 5 x 5"
    shapes = "x, weight, bias and shift must be (B, H, W, K), (N, K), (N,) and (N,), got"
    assert triton.why_not(x[0], 2, weight, bias, shift) == f"{shapes} (5, 7, 40), (136, 40), (136,), (136,)"
    for others in ((weight[:, 1:], bias, shift), (weight[1:], bias, shift), (weight, bias, shift[1:])):
        assert triton.why_not(x, 2, *others).startswith(shapes)
    assert triton.why_not(x[:, :0], 2, weight, bias, shift).startswith(shapes)
    large = x[:1, :1, :1].expand(2**15, 2**8, 2**8, K)
    assert triton.why_not(large, 2, weight, bias, shift) == "it supports maps of up to 2147483584 cells, got (32768, 256, 256)"
    dtypes = "got torch.float16, torch.float32, torch.float32, torch.float32"
    assert triton.why_not(x.half(), 2, weight, bias, shift) == f"it supports torch.float16 here, {dtypes}"
    with torch.autocast("cpu", torch.bfloat16):
        assert triton.why_not(x.half(), 2, weight, bias, shift) is None
        assert "got torch.float64, torch.float32" in triton.why_not(x.double(), 2, weight, bias, shift)
    with torch.enable_grad():
        assert triton.why_not(x, 2, weight, bias, shift) is None
        assert triton.why_not(x, 2, weight, bias.requires_grad_(), shift).startswith("gradients are enabled")


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    """At the sizes of LITv2-S, of a detector and others, as it is and in generated code; under autocast; values 2**31 apart."""
    sizes = [(14, 14, 2, 384, 640), (50, 84, 2, 384, 640), (25, 42, 4, 512, 896), (5, 7, 3, 40, 136), (7, 5, 2, 33, 130)]
    for H, W, s, k, n in sizes:
        x, *others = (tensor.cuda() for tensor in case(H, W, dtype, k, n))
        ours, plain = (run(x, s, *others) for run in (triton.pooled_linear, reference.pooled_linear))
        exact = written_out(x, s, *others)
        assert error(ours, exact) <= 2 * error(plain.contiguous(), exact)
        assert torch.equal(torch.compile(triton.pooled_linear)(x, s, *others), ours)
        with torch.autocast("cuda", dtype):
            assert error(triton.pooled_linear(x.float(), s, *others), exact) <= 2 * error(plain.contiguous(), exact)
    if dtype == torch.float16:
        x = torch.empty(2**31 + 40, device="cuda", dtype=dtype).as_strided((1, 1, 3, K), (0, 0, 2**30, 1))
        x.copy_(normal(6, *x.shape))
        others = [tensor.cuda() for tensor in case(1, 3, dtype)[1:]]
        assert torch.equal(triton.pooled_linear(x, 2, *others), triton.pooled_linear(x.contiguous(), 2, *others))


TYPES = dict.fromkeys(("x", "weight", "bias", "shift", "y"), "float16") | dict.fromkeys(("cells", "H", "W", "rows", "columns"), "i32")
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def compiled(capability: int, s: int, padded: bool, types: dict[str, str] = TYPES, **constants: int):
    sizes = dict(pooled_linear.tile(s, BYTES[types["x"]], BYTES[types["weight"]]), PADDED=padded, **constants)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    return compile_for(pooled_linear.forward_kernel, types, sizes, capability, **options)


@pytest.mark.extra
@pytest.mark.parametrize("s, padded", [(2, False), (4, True)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability, s, padded):
    """float16: 8 values at once to and from memory, in the loop past the registers; products by the tensor cores, nothing spilled."""
    found = compiled(capability, s, padded)
    assert found.stack == 0 and found.registers <= (112 if s == 2 else 168) and found.shared <= 99 * 1024
    copies = found.count(r"LDGSTS[.\w]*")
    assert copies and copies == found.count(r"LDGSTS[.\w]*128[.\w]*")
    assert found.count("STG.E.128") and not found.count("(LDG|STG).E.U16") and found.count(r"(H|HG|UTCH)MMA[.\w]*")


@pytest.mark.extra
@pytest.mark.parametrize("s", [1, 2, 3, 4])
@pytest.mark.parametrize("types", [TYPES | {"x": "float32"}, {name: kind.replace("float16", "bfloat16") for name, kind in TYPES.items()}])
def test_other_dtypes(types, s):
    """bfloat16, and a map in float32, as under autocast, where shared memory is the smallest."""
    found = compiled(86, s, True, types)
    assert found.stack == 0 and found.registers <= 184 and found.shared <= 99 * 1024


@pytest.mark.extra
def test_a_single_channel():
    """A size of 1 becomes a constant."""
    assert compiled(90, 2, True, x_stride=1, K=1, N=1).stack == 0
