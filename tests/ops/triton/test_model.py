# SPDX-License-Identifier: Apache-2.0
"""A whole model with every kernel, interpreted: what it computes, and its gradients, are those of torch's operators."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import assert_as_precise, normal, tiny_model
from litv2 import fuse
from litv2.ops import OPERATORS, use
from triton_helpers import Called

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [pytest.mark.extra, pytest.mark.usefixtures("interpreter")]
PLAIN = dict.fromkeys(set(OPERATORS) - {"deform_conv2d"}, "torch")
KERNELS = dict(block="torch", depthwise_gelu="triton")  # the native operators would be preferred, as the tensors are on the CPU


def model(**settings) -> nn.Module:
    """With few hidden channels, as the interpreter is slow."""
    return tiny_model(embed_dim=32, num_heads=(1, 2, 4, 8), mlp_ratio=1, **settings)


def test_gradients():
    """With batch norm as in evaluation: from the statistics of the last map, which is tiny, gradients of the first layers are not exact."""
    results = []
    for choice in (KERNELS, PLAIN):
        with use(**choice), Called() as called:
            network = model().eval()
            y = network(normal(0, 1, 3, 32, 64))
            results.append([y, *torch.autograd.grad(y.square().sum(), tuple(network.parameters()))])
        names = {"depthwise_gelu", "depthwise_gelu_backward", "window_attention", "window_attention_backward"}
        assert set(called.names) == (names if choice is KERNELS else set())
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-6  # those of offsets are small differences of large sums


@pytest.mark.parametrize("form", [lambda model: model, fuse], ids=["plain", "fused"])
@torch.no_grad()
def test_inference_in_bfloat16(form):
    exact, x = model().eval(), normal(0, 1, 3, 32, 64)
    with use(**PLAIN):
        expected, plain = exact(x), form(model().eval()).bfloat16()(x.bfloat16())
    with use(**KERNELS, token_merging="triton"), Called() as called:
        ours = form(model().eval()).bfloat16()(x.bfloat16())
    folded = {"hilo_attention", "pooled_attention", "pooled_linear", "norm_linear", "linear_add", "linear_add_norm"}
    names = {"patch_embed", "depthwise_gelu", "predict_offset", "token_merging"} | (folded if form is fuse else {"window_attention"})
    assert names == set(called.names)
    assert_as_precise(ours, plain, expected, factor=4)  # the interpreter truncates to bfloat16
