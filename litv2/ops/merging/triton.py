# SPDX-License-Identifier: Apache-2.0
"""``token_merging`` for inference by a Triton kernel: samples, product, batch norm and GELU in one pass.

The offsets come from torch, in float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_global_hooks, has_hooks

from .. import triton
from ..folding import merging_weights

if TYPE_CHECKING:
    from ...layers import DeformableTokenMerging

CHANNELS = 32  # that a product takes at once
CELLS = 2**31 - 1


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
    weight, bias = (conv.weight, conv.bias) if type(merging.norm_layer) is nn.Identity else merging_weights(merging)
    weight = weight.to(dtype).permute(0, 2, 3, 1).flatten(1)  # (N, 4 * C), ordered (tap, channel)
    return _forward(x.to(dtype), conv.predict_offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), weight, bias)


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
