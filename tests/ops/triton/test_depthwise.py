# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``depthwise_gelu``: interpreted, against torch in float64; compiled, within their ceilings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import fill, normal
from litv2.layers import Mlp
from litv2.ops import OPERATORS, use
from litv2.ops.triton import depthwise
from triton_helpers import CAPABILITIES, compile_for, interpreted

interpreter = pytest.mark.usefixtures("interpreter")
BACKENDS = OPERATORS["depthwise_gelu"].backends


def case(B: int, H: int, W: int, C: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, nn.Conv2d]:
    conv = nn.Conv2d(C, C, 3, padding=1, groups=C).to(dtype)
    return normal(1, B, H, W, C).to(dtype).requires_grad_(), conv


def results(backend: str, x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """The output and the gradients of x, weight and bias."""
    y = BACKENDS[backend].run(x, conv)
    return [y, *torch.autograd.grad(y, (x, *conv.parameters()), normal(2, *y.shape).to(y.dtype))]


def in_float64(x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    return results("torch", x.detach().double().requires_grad_(), copy.deepcopy(conv).double())


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, H, W", [(2, 1, 1), (1, 1, 6), (1, 6, 1), (2, 5, 7), (1, 7, 5), (1, 14, 14), (1, 17, 3)])
def test_the_output_and_the_gradients(B, H, W, dtype):
    """As precise as torch's, whatever was in the memory; 17 rows are more than a program of the forward pass has."""
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it truncates
    arguments = case(B, H, W, 24, dtype)
    for ours, theirs, exact in zip(results("triton", *arguments), results("torch", *arguments), in_float64(*arguments)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        assert error(ours, exact) <= max(factor * error(theirs, exact), 1e-6)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability):
    types = dict.fromkeys(("x", "weight", "bias", "y"), "float16") | dict(H="i32", W="i32")
    tile = dict(depthwise.FORWARD, FINISH=True)
    found = compile_for(depthwise.forward_kernel, types, tile, capability, num_warps=tile.pop("num_warps"))
    assert found.registers <= 168 and found.stack == 0 and found.count("LDG.E.128") == 3 and found.count("STG.E.128") == 1
