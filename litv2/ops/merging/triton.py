# SPDX-License-Identifier: Apache-2.0
"""``token_merging`` for inference by two Triton kernels: the offsets, in float32; samples, product, batch norm and GELU in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_modules.DCN import DeformConv2dPack
from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_global_hooks, has_hooks

from .. import triton
from ..folding import merging_weights

if TYPE_CHECKING:
    from ...layers import DeformableTokenMerging

CHANNELS = 32  # that a product takes at once
CELLS = 2**31 - 1
GEOMETRY = 8, (2, 2), (2, 2), (0, 0), (1, 1), 1  # outputs, kernel, stride, padding, dilation, groups of the convolution of the offsets


def why_not(x: Tensor, merging: DeformableTokenMerging) -> str | None:
    if (reason := triton.why_not(x)) is not None:
        return reason
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad or torch.inference_mode"
    if merging.training:
        return "the layer is in training mode"
    if type(merging.norm_layer) not in (nn.BatchNorm2d, nn.Identity) or type(merging.act) is not nn.GELU:
        return "it knows a batch norm, or none, and GELU alone"
    if has_global_hooks() or any(map(has_hooks, merging.modules())):
        return "the layer or a part of it has hooks"
    if x.shape[-1] % CHANNELS:
        return f"the number of channels must be a multiple of {CHANNELS}, got {x.shape[-1]}"
    if x[..., 0].numel() > CELLS:
        return f"it supports up to {CELLS} cells, got {tuple(x.shape[:3])}"
    if min(x.shape[1:3]) < 2:
        return f"the map must have at least 2 x 2 cells, got {x.shape[1]} x {x.shape[2]}"
    return None


def why_rather_not(x: Tensor, merging: DeformableTokenMerging) -> str | None:
    if compute_dtype(x) == torch.float32:
        return "in float32 its products do not run on tensor cores, and its registers spill"
    return triton.why_rather_not()


def token_merging(x: Tensor, merging: DeformableTokenMerging) -> Tensor:
    dtype, conv = compute_dtype(x), merging.dconv
    weight, bias = folded(merging)
    weight = weight.to(dtype).permute(0, 2, 3, 1).flatten(1)  # (N, 4 * C), ordered (tap, channel)
    return _forward(x.to(dtype), predict_offset(x, conv), weight, bias)


def folded(merging: DeformableTokenMerging) -> tuple[Tensor, Tensor]:
    """The weight and bias with the norm, if there still is one, folded in."""
    return (merging.dconv.weight, merging.dconv.bias) if type(merging.norm_layer) is nn.Identity else merging_weights(merging)


def predict_offset(x: Tensor, conv: DeformConv2dPack) -> Tensor:
    """(B, H, W, C) -> (B, H // 2, W // 2, 8) in float32, also under autocast: from x as it is."""
    first = conv.conv_offset
    plain = type(conv) is DeformConv2dPack and type(first) is nn.Conv2d and first.bias is not None and x.dtype in triton.DTYPES
    if not plain or _geometry(first) != GEOMETRY:
        return conv.predict_offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return _predict_offset(x, first.weight.permute(0, 2, 3, 1).flatten(1), first.bias)


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


@torch.library.custom_op("litv2::triton_predict_offset", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor")
def _predict_offset(x, weight, bias):
    from ..triton import offsets

    return offsets.predict_offset(x, weight, bias)


@_predict_offset.register_fake
def _(x, weight, bias):
    return x.new_empty(len(x), x.shape[1] // 2, x.shape[2] // 2, len(weight), dtype=torch.float32)


@torch.library.custom_op(
    "litv2::triton_token_merging", mutates_args=(), schema="(Tensor x, Tensor offset, Tensor weight, Tensor bias) -> Tensor"
)
def _forward(x, offset, weight, bias):
    from ..triton import merging

    return merging.token_merging(x, offset, weight, bias)


@_forward.register_fake
def _(x, offset, weight, bias):
    return x.new_empty(*offset.shape[:3], len(weight))


BACKEND = Backend("triton", token_merging, why_not, why_rather_not)
