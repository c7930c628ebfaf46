# SPDX-License-Identifier: Apache-2.0
"""Every backend of every operator against the operator's reference in float64, at odd sizes, in each dtype and on each device.

A new backend is tested here as soon as it is in the list of its operator. One that cannot compute a case skips it, saying why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpu_helpers import DEVICES
from helpers import fill, normal
from hilo import HiLo
from litv2.layers import Block, DeformableTokenMerging, PatchEmbed
from litv2.ops import OPERATORS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (1, 6), (5, 7), (7, 5), (14, 14), (17, 32)]
SOMETHING_ELSE = ("onnx",)  # computes nothing
KEPT_IN_FLOAT32 = {"deform_conv2d": (1, 7)}  # arguments: the offsets, the mask


def to(value: object, dtype: torch.dtype, device: str) -> object:
    """Tensors and modules in another dtype and on another device, with gradients where they had them."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device, dtype)
    if isinstance(value, Tensor):
        return value.detach().to(device, dtype).requires_grad_(value.requires_grad)
    return value


def depthwise_gelu(H: int, W: int, **_) -> tuple:
    conv = nn.Conv2d(48, 48, 3, padding=1, groups=48)
    return (2 * normal(1, 2, H, W, 48)).requires_grad_(), conv


def deform_conv2d(H: int, W: int, groups: int = 1, masked: bool = False, **_) -> tuple:
    """3 x 2 taps, offsets of a few pixels, some of them far outside."""
    Ho, Wo = H, W // 2 + 1
    input, weight = normal(1, 2, 8, H, W), normal(2, 6, 8 // groups, 3, 2)
    offset = 2 * normal(3, 2, 24, Ho, Wo)
    offset[0, 0] += 50
    mask = normal(4, 2, 12, Ho, Wo).sigmoid() if masked else None
    tensors = [None if t is None else t.requires_grad_() for t in (input, offset, weight, normal(5, 6))]
    return *tensors, (1, 2), (1, 1), (1, 1), mask if mask is None else mask.requires_grad_()


def block(H: int, W: int, window: int = 2, **_) -> tuple:
    return fill(Block(32, 4, window, 0.5)).eval(), normal(1, 3, H, W, 32)


def attention(H: int, W: int, window: int = 2, **_) -> tuple:
    return normal(1, 3, H, W, 64).requires_grad_(), fill(HiLo(64, 4, qkv_bias=True, window_size=window))


def window_attention(H: int, W: int, window: int = 2, **_) -> tuple:
    """Two heads of 16 channels."""
    return normal(1, 2, H, W, 96).requires_grad_(), normal(2, 96).requires_grad_(), window, 2, 0.3


def pooled_attention(H: int, W: int, pool: int = 2, **_) -> tuple:
    """Two heads of 16 channels."""
    tensors = normal(1, 2, H, W, 32), normal(2, 2, -(-H // pool), -(-W // pool), 64)
    q, kv = (tensor.requires_grad_() for tensor in tensors)
    return q, kv, 2, 0.3


def pooled_linear(H: int, W: int, pool: int = 2, **_) -> tuple:
    tensors = normal(1, 2, H, W, 80), normal(2, 200, 80), normal(3, 200), normal(4, 200)
    x, *others = (tensor.requires_grad_() for tensor in tensors)
    return x, pool, *others


def hilo_attention(H: int, W: int, window: int = 2, **_) -> tuple:
    """Two heads of 16 channels in each branch."""
    hifi, lofi = window_attention(H, W, window), pooled_attention(H, W, window)
    return *hifi[:2], *lofi[:2], window, 2, 2, 0.3


def linear(name: str, H: int, W: int) -> tuple:
    """48 inputs, 96 outputs."""
    x, weight, bias, residual = normal(1, 2, H, W, 48), normal(2, 96, 48), normal(3, 96), normal(4, 2, H, W, 96)
    tensors = (x, weight, bias) if name == "norm_linear" else (x, weight, bias, residual)
    return *(tensor.requires_grad_() for tensor in tensors), *(() if name == "linear_add" else (1e-3,))


def token_merging(H: int, W: int, **_) -> tuple:
    return normal(1, 2, max(H, 2), max(W, 2), 32), fill(DeformableTokenMerging(32, 272)).eval()


def patch_embed(H: int, W: int, **_) -> tuple:
    return normal(1, 2, 3, H, W), fill(PatchEmbed(3, 48, 4))


CASES: dict[str, list[tuple[str, Callable[..., tuple]]]] = {
    "depthwise_gelu": [("", depthwise_gelu)],
    "deform_conv2d": [("", deform_conv2d), ("groups and mask", lambda **size: deform_conv2d(groups=2, masked=True, **size))],
    "block": [(f"window {window}", lambda window=window, **size: block(window=window, **size)) for window in (0, 1, 2, 3)],
    "attention": [(f"window {window}", lambda window=window, **size: attention(window=window, **size)) for window in (2, 4)],
    "window_attention": [
        (f"window {window}", lambda window=window, **size: window_attention(window=window, **size)) for window in (2, 3, 4)
    ],
    "pooled_attention": [(f"pool {pool}", lambda pool=pool, **size: pooled_attention(pool=pool, **size)) for pool in (1, 2)],
    "pooled_linear": [(f"pool {pool}", lambda pool=pool, **size: pooled_linear(pool=pool, **size)) for pool in (2, 3)],
    "hilo_attention": [(f"window {window}", lambda window=window, **size: hilo_attention(window=window, **size)) for window in (2, 3, 4)],
    **{name: [("", partial(linear, name))] for name in ("norm_linear", "linear_add", "linear_add_norm")},
    "token_merging": [("", token_merging)],
    "patch_embed": [("", patch_embed)],
}
BACKENDS = [
    pytest.param(operator.name, backend, case, make, id=" ".join(filter(None, (operator.name, backend, case))))
    for operator in OPERATORS.values()
    for backend in list(operator.backends)[:-1]
    if backend not in SOMETHING_ELSE
    for case, make in CASES[operator.name]
]


def results(run: Callable[..., Any], arguments: tuple, with_gradients: bool) -> list[Tensor]:
    """The outputs, and with gradients those of all tensors and parameters that have some."""
    if not with_gradients:
        with torch.no_grad():
            y = run(*arguments)
        return [y] if isinstance(y, Tensor) else [*y]
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    leaves += [p for a in arguments if isinstance(a, nn.Module) for p in a.parameters()]
    y = run(*arguments)
    seed = normal(7, *y.shape).to(y.device, y.dtype)
    return [y, *torch.autograd.grad(y, leaves, seed, materialize_grads=True)]  # of padding that is not there


def error(ours: Tensor, exact: Tensor) -> float:
    """Of the norm, relative; NaN where one is."""
    exact = exact.to(ours.device)
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("with_gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator, backend, case, make", BACKENDS)
def test_backend(operator, backend, case, make, dtype, device, with_gradients):
    reference = OPERATORS[operator].backends["torch"]
    backend = OPERATORS[operator].backends[backend]
    computed, reasons = 0, set()
    for H, W in SIZES:
        kept = KEPT_IN_FLOAT32.get(operator, ())
        arguments = tuple(to(value, torch.float32 if i in kept else dtype, device) for i, value in enumerate(make(H=H, W=W)))
        with torch.set_grad_enabled(with_gradients):
            if reason := backend.why_not(*arguments):
                reasons.add(reason)
                continue
        computed += 1
        exact = results(reference.run, tuple(to(a, torch.float64, "cpu") for a in arguments), with_gradients)
        ours, plain = (results(run, arguments, with_gradients) for run in (backend.run, reference.run))
        for mine, theirs, true in zip(ours, plain, exact):
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine.device == theirs.device
            assert error(mine, true) <= max(2 * error(theirs, true), 4 * torch.finfo(torch.float32).eps), (H, W)
    if not computed:
        pytest.skip("; ".join(sorted(reasons)))
