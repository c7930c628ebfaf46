# SPDX-License-Identifier: Apache-2.0
"""``patch_embed`` for inference by a Triton kernel: padding, product, bias and LayerNorm in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_global_hooks, has_hooks

from .. import triton

if TYPE_CHECKING:
    from ...layers import PatchEmbed

CHANNELS = 256  # of the result at most: one program has them all, for the norm
INPUTS = 256  # values of a patch at most: more are a product for a library
PIXELS = 2**31 - 1


def why_not(x: Tensor, embed: PatchEmbed) -> str | None:
    if (reason := triton.why_not(x)) is not None:
        return reason
    if torch.is_grad_enabled():
        return "gradients are enabled; use torch.no_grad or torch.inference_mode"
    conv, norm, patch = embed.proj, embed.norm, embed.patch_size
    if type(conv) is not nn.Conv2d or type(norm) is not nn.LayerNorm:
        return f"it knows nn.Conv2d and nn.LayerNorm alone, got {type(conv).__name__} and {type(norm).__name__}"
    dim, inputs = conv.out_channels, conv.in_channels * patch**2
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    if geometry != ((patch, patch), (patch, patch), (0, 0), (1, 1), 1) or conv.bias is None:
        return "the convolution must be one of whole patches, with a bias"
    if norm.normalized_shape != (dim,) or norm.weight is None or norm.bias is None:
        return "the norm must be one of all channels, with scale and shift"
    if has_global_hooks() or has_hooks(conv) or has_hooks(norm):
        return "a part of the layer has hooks"
    if dim > CHANNELS or inputs > INPUTS:
        return f"it supports up to {CHANNELS} channels, of up to {INPUTS} values of a patch, got {dim}, of {inputs}"
    if x.ndim != 4 or x.shape[1] != conv.in_channels or min(x.shape[2:]) < 1:
        return f"x must be images (B, {conv.in_channels}, H, W), got {tuple(x.shape)}"
    if x.shape[0] * x.shape[2] * x.shape[3] > PIXELS:
        return f"it supports up to {PIXELS} pixels, got {tuple(x.shape)}"
    if x.dtype not in triton.DTYPES:
        return f"it has no kernel for {x.dtype}"
    if {x.dtype} != {conv.weight.dtype, norm.weight.dtype} and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype}, but the weights are {conv.weight.dtype} and {norm.weight.dtype}"
    return None


def why_rather_not(x: Tensor, embed: PatchEmbed) -> str | None:
    if compute_dtype(x) == torch.float32:
        return "in float32 it splits its factors, and where there are many channels its registers spill"
    return triton.why_rather_not()


def patch_embed(x: Tensor, embed: PatchEmbed) -> Tensor:
    conv, norm = embed.proj, embed.norm
    # Rows, columns, channels: no copy where the weights are channels-last.
    weight = conv.weight.to(compute_dtype(x)).permute(0, 2, 3, 1).flatten(1)
    # Under autocast norms are in float32, and so is what they return.
    dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return _forward(x, weight, conv.bias, norm.weight, norm.bias, embed.patch_size, norm.eps, dtype)


@torch.library.custom_op(
    "litv2::triton_patch_embed",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift, int patch, float eps, ScalarType dtype) -> Tensor",
)
def _forward(x, weight, bias, scale, shift, patch, eps, dtype):
    from ..triton import embedding

    return embedding.patch_embed(x, weight, bias, scale, shift, patch, eps, dtype)


@_forward.register_fake
def _(x, weight, bias, scale, shift, patch, eps, dtype):
    B, _, H, W = x.shape
    return x.new_empty(B, (H + patch - 1) // patch, (W + patch - 1) // patch, len(weight), dtype=dtype)


BACKEND = Backend("triton", patch_embed, why_not, why_rather_not)
