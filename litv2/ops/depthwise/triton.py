# SPDX-License-Identifier: Apache-2.0
"""``depthwise_gelu`` by a Triton kernel, also in training: one pass over the largest tensors of the network, where torch makes three.

For the gradients only x is kept: what GELU was applied to is computed again.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend, without_second_derivatives
from mm_modules.torch_state import compute_dtype, has_hooks

from .. import triton


def why_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    if (reason := triton.why_not(x)) is not None:
        return reason
    if x.dtype != conv.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, but the weights are {conv.weight.dtype}"
    if has_hooks(conv):
        return "the convolution has hooks"
    return "the convolution has no bias" if conv.bias is None else None


def why_rather_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    return triton.why_rather_not()


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return _forward(x.to(compute_dtype(x)), conv.weight, cast("Tensor", conv.bias))


@torch.library.custom_op("litv2::triton_depthwise_gelu", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def _forward(x, weight, bias):
    from ..triton import depthwise

    return depthwise.depthwise_gelu(x, weight, bias)


@torch.library.custom_op(
    "litv2::triton_depthwise_gelu_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
)
def _backward(gradient, x, weight, bias):
    from ..triton import depthwise

    return depthwise.depthwise_gelu_backward(gradient, x, weight, bias)


@_forward.register_fake
def _(x, weight, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(gradient, x, weight, bias):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weight, bias))


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_forward.register_autograd(lambda ctx, gradient: _backward(gradient, *ctx.saved_tensors), setup_context=_keep)
without_second_derivatives("litv2::triton_depthwise_gelu_backward", "depthwise_gelu", "triton")

BACKEND = Backend("triton", depthwise_gelu, why_not, why_rather_not)
