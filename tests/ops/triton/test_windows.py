# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``window_attention``: interpreted, against torch; compiled, within their ceilings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import normal
from hilo import HiLo
from litv2.ops import use
from litv2.ops.attention_forward import windows as of_hilo
from litv2.ops.triton import windows
from litv2.ops.windows import reference, triton
from triton_helpers import CAPABILITIES, compile_for

D = 16
SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14)]


def case(s: int, H: int, W: int, dtype: torch.dtype = torch.float32, beside: int = D) -> list[Tensor | None]:
    """Two heads, as a part of a wider product's columns; the padding; the channels beside."""
    product = normal(s, 2, H, W, 6 * D + 8).to(dtype)[..., : 6 * D]
    return [product, normal(1, 6 * D).to(dtype), normal(2, 2, H, W, beside).to(dtype) if beside else None]


def results(run, tensors: list[Tensor | None], s: int) -> list[Tensor]:
    """The output and all gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]
    y = run(*leaves[:2], s, 2, 0.3, *leaves[2:])
    return [y, *torch.autograd.grad(y, leaves, normal(3, *y.shape).to(y.dtype))]


def assert_close(ours: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    for mine, true in zip(ours, exact):
        assert mine.shape == true.shape and mine.dtype == dtype
        assert (mine - true).norm() <= 4 * torch.finfo(dtype).eps * true.norm().clamp_min(1)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("s, H, W", [*((2, H, W) for H, W in SIZES), (3, 7, 5), (4, 5, 7), (4, 7, 5), (5, 1, 6)])
def test_against_torch(s, H, W, dtype):
    """Windows that share a tile, that fill one and that do not; padded below, at the right, both and neither."""
    tensors = case(s, H, W, dtype)
    exact = results(reference.window_attention, [tensor.double() for tensor in tensors], s)
    assert_close(results(triton.window_attention, tensors, s), exact, dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_in_hilo(alpha, monkeypatch):
    """As the layer computes it, with the gradients of its bias where the map is padded; without a bias, too."""
    monkeypatch.setattr(triton, "why_not_heads", lambda *_: None)
    for bias in (True, False):
        layer, x = HiLo(4 * D, 4, qkv_bias=bias, alpha=alpha), normal(0, 2, 5, 7, 4 * D)
        tensors = [x.requires_grad_(), *layer.parameters()]
        exact = [layer(x), *torch.autograd.grad(layer(x).square().sum(), tensors)]
        with use(window_attention="torch"):
            ours = of_hilo.attention(x, layer)
        assert_close([ours], exact[:1], torch.float32)
        ours = of_hilo.attention(x, layer)
        assert_close([ours, *torch.autograd.grad(ours.square().sum(), tensors)], exact, torch.float32)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("s", [2, 4])
def test_what_is_not_finite_stays_in_its_window(s, value):
    """Several windows share a tile of the kernel, also of different images."""
    qkv, pad, _ = case(s, 5, 7)
    before = triton.window_attention(qkv, pad, s, 2, 0.3)
    for part in range(3):  # q, k, v of the second head
        qkv = case(s, 5, 7)[0]
        qkv[0, s, s + 1, (2 * part + 1) * D] = value
        changed = triton.window_attention(qkv, pad, s, 2, 0.3)
        same = (changed == before).unflatten(-1, (2, D)).all(-1)
        assert same[1].all() and same[..., 0].all() and not changed[0, s, s + 1, D:].isfinite().all()
        assert same[0, :s, :, 1].all() and same[0, :, :s, 1].all() and same[0, 2 * s :, :, 1].all() and same[0, :, 2 * s :, 1].all()


@pytest.mark.usefixtures("interpreter")
def test_an_empty_batch():
    qkv, pad, _ = case(2, 5, 7)
    y, of_qkv, of_pad = results(triton.window_attention, [qkv[:0], pad], 2)
    assert y.shape == (0, 5, 7, 2 * D) and of_qkv.shape == (0, 5, 7, 6 * D) and not of_pad.any()


@pytest.mark.parametrize(
    "shape, s, heads, beside, reason",
    [
        ((2, 5, 7, 6 * 24), 2, 2, 0, "heads of 16, 32, 64 channels, got 24"),
        ((2, 9, 9, 6 * D), 9, 2, 0, "windows of up to 8 x 8 tokens, got 9 x 9"),
        ((2, 5, 7, 6 * D), 2, 2, 24, "a multiple of those of a head, 16, got 24"),
        ((2**16, 2**8, 2**6, 6 * D), 2, 2, 0, "cells times heads"),
        ((65536, 2, 2, 6 * D), 2, 2, D, None),
    ],
)
def test_reasons(monkeypatch, shape, s, heads, beside, reason):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    qkv, side = torch.empty(1).expand(shape), torch.empty(1).expand(*shape[:3], beside)
    said = triton.why_not(qkv, torch.empty(shape[-1]), s, heads, 1.0, side if beside else None)
    assert said is None if reason is None else reason in said


KERNELS = {  # registers at most, and the tensor core's instructions
    "forward": (windows.forward_kernel, "qkv pad beside y", 64),
    "backward": (windows.backward_kernel, "gradient qkv pad of_qkv", 96),
}


@pytest.mark.extra
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("s, name", [(2, "forward"), (2, "backward"), (7, "backward")])
def test_machine_code(s, name, capability):
    """Heads of 32 channels in float16, with padding: 8 values at once to and from memory, products by the tensor cores, nothing spilled."""
    kernel, tensors, registers = KERNELS[name]
    types = dict.fromkeys(tensors.split(), "float16") | dict(of_padding="float32", scale="fp32")
    types |= dict.fromkeys(("windows", "H", "W", "rows", "columns", "heads", "all_heads"), "i32")
    sizes = windows.tile(s)
    warps = sizes.pop("num_warps")
    found = compile_for(kernel, types, dict(sizes, D=32, PADDED=True), capability, num_warps=warps)
    assert found.stack == 0 and found.registers <= (registers if s == 2 else 168)
    assert found.count(r"LDG\.E\.128") and found.count(r"STG\.E\.128") and not found.count(r"LDG\.E\.U16") and not found.count(r"STG\.E\.U16")
    assert found.count(r"HMMA[.\w]*")
