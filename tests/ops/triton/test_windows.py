# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``window_attention``: interpreted, against torch; compiled, within their ceilings."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gpu_helpers import on_gpu
from helpers import normal
from hilo import HiLo
from litv2.ops import OPERATORS
from litv2.ops.triton import windows
from litv2.ops.windows import reference, triton
from triton_helpers import CAPABILITIES, compile_for

D = 16
SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14)]


def case(s: int, H: int, W: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two heads, as a part of a wider product's columns; the padding."""
    return normal(s, 2, H, W, 6 * D + 8).to(dtype)[..., : 6 * D], normal(1, 6 * D).to(dtype)


def results(run, tensors: Sequence[Tensor], s: int) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = run(*leaves, s, 2, 0.3)
    return [y, *torch.autograd.grad(y, leaves, normal(3, *y.shape).to(y), materialize_grads=True)]  # of padding that is not there


def assert_as_precise(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    for mine, plain, true in zip(ours, theirs, exact):
        assert mine.shape == true.shape and mine.dtype == plain.dtype
        scale = true.norm().clamp_min(1e-6)
        factor = 4 if plain.dtype == torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it truncates
        assert (mine - true).norm() / scale <= max(factor * (plain - true).norm() / scale, 1e-6)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s, H, W", [*((2, H, W) for H, W in SIZES), (3, 7, 5), (4, 5, 7), (4, 7, 5)])
def test_against_torch(s, H, W, dtype):
    """Windows that share a tile, that fill one and that do not; padded below, at the right, both and neither."""
    tensors = case(s, H, W, dtype)
    exact = results(reference.window_attention, [tensor.double() for tensor in tensors], s)
    plain = results(reference.window_attention, tensors, s)
    assert_as_precise(results(triton.window_attention, tensors, s), plain, exact)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_in_hilo(alpha):
    """As the layer computes it, with the gradients of its bias where the map is padded; without a bias, too."""
    for bias in (True, False):
        layer, x = HiLo(4 * D, 4, qkv_bias=bias, alpha=alpha), normal(0, 2, 5, 7, 4 * D)

        def computed(run, layer: HiLo, x: Tensor) -> list[Tensor]:
            leaves = [x.requires_grad_(), *layer.parameters()]
            y = run(x, layer)
            return [y, *torch.autograd.grad(y, leaves, normal(3, *y.shape).to(y.dtype))]

        plain, ours = (computed(OPERATORS["attention"].backends[name].run, layer, x.clone()) for name in ("torch", "windows"))
        exact = computed(OPERATORS["attention"].backends["torch"].run, copy.deepcopy(layer).double(), x.double())
        assert_as_precise(ours, plain, exact)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("s", [2, 4])
def test_what_is_not_finite_stays_in_its_window(monkeypatch, s, value):
    """Several windows share a tile of the kernel, also of different images. (Torch's fused attention on the CPU makes 0 of some NaN.)"""
    monkeypatch.setattr(reference, "_by_fused_attention", reference._on_cuda)
    qkv, pad = case(s, 5, 7)
    before = triton.window_attention(qkv, pad, s, 2, 0.3)
    for part in range(3):  # q, k, v of the second head
        qkv = case(s, 5, 7)[0]
        qkv[0, s, s + 1, (2 * part + 1) * D] = value
        changed = triton.window_attention(qkv, pad, s, 2, 0.3)
        window = torch.zeros_like(before, dtype=torch.bool)
        window[0, s : 2 * s, s : 2 * s, D:] = True
        assert torch.equal(changed[~window], before[~window])
        assert torch.equal(changed.isfinite(), reference.window_attention(qkv, pad, s, 2, 0.3).isfinite())


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors, autograd, and AOTAutograd's tracing."""
    qkv, pad = (tensor.requires_grad_() for tensor in case(2, 1, 3))
    torch.library.opcheck(torch.ops.litv2.triton_window_attention, (qkv, pad, 2, 2, 0.3))


@pytest.mark.usefixtures("interpreter")
def test_an_empty_batch():
    qkv, pad = case(2, 5, 7)
    y, of_qkv, of_pad = results(triton.window_attention, [qkv[:0], pad], 2)
    assert y.shape == (0, 5, 7, 2 * D) and of_qkv.shape == (0, 5, 7, 6 * D) and not of_pad.any()


@pytest.mark.parametrize(
    "shape, s, heads, reason",
    [
        ((2, 5, 7, 6 * 24), 2, 2, "heads of 16, 32 channels in torch.float32, got 24"),
        ((2, 9, 9, 6 * D), 7, 2, "windows of up to 4 x 4 tokens, got 7 x 7"),
        ((2**16, 2**8, 2**6, 6 * D), 2, 2, "cells times heads"),
        ((65536, 2, 2, 6 * D), 2, 2, None),
    ],
)
def test_reasons(monkeypatch, shape, s, heads, reason):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    said = triton.why_not(torch.empty(1).expand(shape), torch.empty(shape[-1]), s, heads, 1.0)
    assert said is None if reason is None else reason in said


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_windows_than_a_fused_kernel_takes(dtype):
    """On a GPU: 70000 windows, as they are and in generated code; the same gradients in each run."""
    tensors = [normal(0, 2, 350, 399, 6 * D).to("cuda", dtype), normal(1, 6 * D).to("cuda", dtype)]
    exact = results(reference.window_attention, [tensor.double() for tensor in tensors], 2)
    plain, ours, again = (results(run, tensors, 2) for run in (reference.window_attention, *2 * [triton.window_attention]))
    assert_as_precise(ours, plain, exact)
    assert all(map(torch.equal, ours, again))
    generated = torch.compile(triton.window_attention)(*tensors, 2, 2, 0.3)
    assert torch.equal(generated, ours[0])


KERNELS = {  # registers at most, and the tensor core's instructions
    "forward": (windows.forward_kernel, "qkv pad y", 64),
    "backward": (windows.backward_kernel, "gradient qkv pad of_qkv", 96),
}


@pytest.mark.extra
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, capability):
    """2 x 2, 32 channels, float16, padded: 8 values at once to and from memory, products by the tensor cores, nothing spilled."""
    kernel, tensors, registers = KERNELS[name]
    types = dict.fromkeys(tensors.split(), "float16") | dict(of_padding="float32", scale="fp32")
    types |= dict.fromkeys(("windows", "H", "W", "rows", "columns", "heads"), "i32")
    sizes = dict(windows.TILE, S=2, D=32, PADDED=True)
    found = compile_for(kernel, types, sizes, capability, num_warps=sizes.pop("num_warps"))
    assert found.stack == 0 and found.registers <= registers
    assert found.count("LDG.E.128") and found.count("STG.E.128") and not found.count("(LDG|STG).E.U16") and found.count(r"HMMA[.\w]*")
