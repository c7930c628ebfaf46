# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels work on a device, and compute there what torch does: tried once per process, before the first use.

The Triton that is installed compiles them for the GPU that is there, and no test has seen every such pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_modules.torch_state import without_modes

from ..linear import reference as linear
from ..pooled.reference import pooled_attention
from ..pooled_linear.reference import pooled_linear as linear_of_pooled
from ..windows.reference import window_attention
from . import add_norm, depthwise, embedding, hilo_attention, linear_add, merging, norm_linear, offsets, pooled, pooled_linear, windows

TOLERANCE = 0.02  # of the largest value: float16, and TF32 in torch's convolution; what goes wrong is as large as the values
FLOAT32 = 1e-5  # what float32 is better than, and TF32 is not


Normal = Callable[..., Tensor]  # of a shape: random values in float16 that require gradients
Comparison = tuple[str, Sequence[Tensor], Sequence[Tensor]]  # of what, ours, torch's


def compare(device: torch.device, checks: Sequence[Callable[[Normal], Iterator[Comparison]]] | None = None) -> None:
    """Compares kernels with torch on a small map, in float16.

    Args:
        checks: those of ``CHECKS`` to do; None for all.

    Raises:
        ArithmeticError: a kernel computes something else than torch.
        Exception: whatever Triton raises.
    """
    generator = torch.Generator(device).manual_seed(0)  # its own: the user's random numbers stay as they are

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).half().requires_grad_()

    with without_modes(), torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for check in CHECKS if checks is None else checks:
            for name, ours, theirs in check(normal):
                tolerance = FLOAT32 if theirs[0].dtype == torch.float64 else TOLERANCE
                for a, b in zip(ours, theirs):
                    if not (a.float() - b.float()).abs().amax() <= tolerance * b.float().abs().amax():  # NaN does not agree
                        raise ArithmeticError(f"{name} differs from torch's")


def of_depthwise_gelu(normal: Normal) -> Iterator[Comparison]:
    x, weight, bias = inputs = normal(2, 5, 7, 32), normal(32, 1, 3, 3), normal(32)
    expected = F.gelu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=32)).permute(0, 2, 3, 1)
    yield "depthwise_gelu", [depthwise.depthwise_gelu(*inputs)], [expected]
    gradient = normal(*expected.shape).detach()
    gradients = torch.autograd.grad(expected, inputs, gradient)
    yield "the gradient of depthwise_gelu", depthwise.depthwise_gelu_backward(gradient, *inputs), gradients


def of_attention(normal: Normal) -> Iterator[Comparison]:
    qkv, pad, options = normal(2, 5, 7, 3 * 64), normal(3 * 64), (2, 2, 32**-0.5)  # window, heads, scale
    hifi = window_attention(qkv, pad, *options)
    yield "window_attention", [windows.window_attention(qkv, pad, *options)], [hifi]
    gradient = normal(*hifi.shape).detach()
    gradients = torch.autograd.grad(hifi, (qkv, pad), gradient, retain_graph=True)
    yield "the gradient of window_attention", windows.window_attention_backward(gradient, qkv, pad, *options), gradients
    for side in (3, 9):  # of the pooled map: one block of keys, and two
        q, kv = normal(2, 5, 7, 3 * 64)[..., 64:128], normal(2, side, side, 2 * 64)
        lofi = pooled_attention(q, kv, *options[1:])
        yield "pooled_attention", [pooled.pooled_attention(q, kv, *options[1:])], [lofi]
        both = hilo_attention.hilo_attention(qkv, pad, q, kv, 2, 2, 2, 32**-0.5)  # window, heads of each branch, scale
        yield "hilo_attention", [both], [torch.cat((hifi, lofi), dim=-1)]


def of_linear(normal: Normal) -> Iterator[Comparison]:
    x, weight, bias, shift = normal(2, 5, 7, 96), normal(48, 96), normal(48), normal(48)
    yield "norm_linear", [norm_linear.norm_linear(x, weight, bias, 1e-5)], [linear.norm_linear(x, weight, bias, 1e-5)]
    added = x, weight, bias, normal(2, 5, 7, 48)
    yield "linear_add", [linear_add.linear_add(*added)], [linear.linear_add(*added)]
    wide = x, normal(384, 96), normal(384), normal(2, 5, 7, 384)
    yield "linear_add_norm", linear_add.linear_add_norm(*wide, 1e-5), linear.linear_add_norm(*wide, 1e-5)
    y, residual = normal(2, 5, 7, 96)[..., 48:], added[3]
    expected = y + residual
    yield "add_norm", add_norm.add_norm(y, residual, 1e-5), [expected, F.layer_norm(expected, (48,), eps=1e-5)]
    means = x, 2, weight, bias, shift
    yield "pooled_linear", [pooled_linear.pooled_linear(*means)], [linear_of_pooled(*means)]


def of_merging(normal: Normal) -> Iterator[Comparison]:
    x, weight, bias = normal(2, 5, 7, 32), normal(48, 32, 2, 2), normal(48)
    expected = F.gelu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2)).permute(0, 2, 3, 1)
    offset = x.new_zeros(*expected.shape[:3], 8, dtype=torch.float32)
    yield "token_merging", [merging.token_merging(x, offset, weight.permute(0, 2, 3, 1).flatten(1), bias.float())], [expected]
    weight, bias = normal(8, 32, 2, 2).float() / 3, normal(8)  # of more bits than TF32 holds
    expected = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), stride=2).permute(0, 2, 3, 1)
    yield "predict_offset", [offsets.predict_offset(x, weight.permute(0, 2, 3, 1).flatten(1), bias)], [expected]


def of_embedding(normal: Normal) -> Iterator[Comparison]:
    images, weight, bias, scale, shift = normal(2, 3, 5, 7), normal(32, 3, 4, 4), normal(32), normal(32), normal(32)
    expected = F.conv2d(F.pad(images, (0, 1, 0, 3)), weight, bias, stride=4).permute(0, 2, 3, 1)
    expected = F.layer_norm(expected, (32,), scale, shift)
    weight = weight.permute(0, 2, 3, 1).flatten(1)
    yield "patch_embed", [embedding.patch_embed(images, weight, bias, scale, shift, 4, 1e-5, images.dtype)], [expected]


CHECKS = (of_depthwise_gelu, of_attention, of_linear, of_merging, of_embedding)
