# SPDX-License-Identifier: Apache-2.0
"""Converts plain modules to the arguments of the native operators that replace them. ``dtype`` is that of the matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .folding import merging_weights, token_projections

if TYPE_CHECKING:
    from hilo import HiLo

    from ..layers import DeformableTokenMerging, Mlp, PatchEmbed


def packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Returns a weight (N, K) in the layout of the native products (csrc/operators.h, Matrix) and the bias padded to whole panels.

    ``dtype`` is that of the product. With bfloat16 both factors are rounded to it and accumulated in float32. With int8 each row of the
    weight is rounded to 127 steps of its largest value (and each token, when it is multiplied, to 255 steps of its range). If K is
    not a multiple of 32 the product stays in float32.
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if weight.shape[1] % 32:  # products of lower precision take 32 inputs at once, as oneDNN's do
        dtype = torch.float32
    packed = _packed_int8(weight) if dtype == torch.int8 else torch.ops.litv2.native_pack(weight.to(dtype))
    return packed, F.pad(bias, (0, _missing(len(bias))))


def _packed_int8(weight: Tensor) -> Tensor:
    """Weight (N, K) -> int8 (panels, bytes of a panel), see ``int8_panel`` in csrc/operators.h. Symmetric, a scale per row."""
    weight = F.pad(weight.detach().float(), (0, 0, 0, _missing(len(weight))))
    K, columns = weight.shape[1], native.columns
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    steps = (weight / scale.clamp_min(1e-30)).round().to(torch.int8).unflatten(0, (-1, columns))  # (panels, columns, K)
    sums = steps.unflatten(2, (-1, 32)).sum(dim=3, dtype=torch.int32)  # (panels, columns, K / 32)
    return torch.cat(
        [
            steps.unflatten(2, (-1, 4)).transpose(1, 2).reshape(-1, K * columns),
            scale.reshape(-1, columns).view(torch.int8),
            sums.transpose(1, 2).reshape(-1, K // 32 * columns).view(torch.int8),
        ],
        dim=1,
    )


def _missing(n: int) -> int:
    """Returns the padding of n to a multiple of the columns that a product writes at once."""
    return -n % native.columns


def feed_forward_arguments(mlp: Mlp, norm: nn.LayerNorm, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | float]:
    """Returns the arguments of the operator ``native_feed_forward`` after x: x + mlp(norm(x))."""
    conv = mlp.dwconv.dwconv
    assert conv.bias is not None
    rest = _missing(len(conv.bias))  # zero hidden channels that pad to whole columns
    fc1, fc1_bias = packed(F.pad(mlp.fc1.weight, (0, 0, 0, rest)) if rest else mlp.fc1.weight, mlp.fc1.bias, dtype)
    fc2, fc2_bias = packed(F.pad(mlp.fc2.weight, (0, rest)) if rest else mlp.fc2.weight, mlp.fc2.bias, dtype)
    depthwise = F.pad(conv.weight.flatten(1).t(), (0, rest)).contiguous()  # (9, hidden)
    result: dict[str, Tensor | float] = dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, fc1=fc1, fc1_bias=fc1_bias)
    return result | dict(depthwise=depthwise, depthwise_bias=F.pad(conv.bias, (0, rest)), fc2=fc2, fc2_bias=fc2_bias)


def hilo_arguments(attn: HiLo, norm: nn.LayerNorm, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | float | int]:
    """Returns the arguments of the operator ``native_hilo`` after x: x + attn(norm(x))."""
    none = norm.weight.new_zeros(0)
    result: dict[str, Tensor | float | int] = dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps, kv=none, kv_bias=none)
    if attn.l_heads and attn.window[0] > 1:
        result["kv"], result["kv_bias"] = packed(attn.l_kv.weight, attn.l_kv.bias, dtype)
    weights, biases = zip(*token_projections(attn))
    result["proj"], result["proj_bias"] = packed(torch.cat(weights), torch.cat(biases), dtype)
    for name in ("h_proj", "l_proj"):
        linear = getattr(attn, name, None)  # a branch without heads has none
        result[name], result[f"{name}_bias"] = (none, none) if linear is None else packed(linear.weight, linear.bias, dtype)
    return result | dict(h_heads=attn.h_heads, l_heads=attn.l_heads, window_size=attn.window[0])


def patch_embed_arguments(embed: PatchEmbed) -> dict[str, Tensor | float | int]:
    """Returns the arguments of the operator ``native_patch_embed`` after the image."""
    weight, bias = packed(embed.proj.weight.flatten(1), embed.proj.bias)
    norm = embed.norm
    return dict(patch=embed.patch_size, weight=weight, bias=bias, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)


def token_merging_arguments(merging: DeformableTokenMerging, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | int]:
    """Returns the arguments of ``native_token_merging`` after x: gelu(norm(dconv(x))) in evaluation mode. Offsets stay in float32."""
    conv = merging.dconv
    weight, bias = merging_weights(merging)
    weight, bias = packed(weight.permute(0, 2, 3, 1).flatten(1), bias, dtype)  # inputs ordered (tap, channel)
    offset = conv.conv_offset.weight.permute(0, 2, 3, 1).flatten(2)  # (8, row, column and channel)
    top, offset_bias = packed(offset[:, 0], conv.conv_offset.bias)
    result: dict[str, Tensor | int] = dict(offset_top=top, offset_bottom=packed(offset[:, 1], None)[0], offset_bias=offset_bias)
    return result | dict(weight=weight, bias=bias, out_channels=merging.norm_layer.num_features)
