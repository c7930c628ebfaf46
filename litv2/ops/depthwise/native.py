# SPDX-License-Identifier: Apache-2.0
"""``depthwise_gelu`` by the native CPU operator, also in training: one pass instead of a convolution and a GELU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_hooks, is_exporting, is_watched

from .. import native


def why_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    if native.problem is not None:
        return native.problem
    if not isinstance(x, Tensor):
        return "it supports tensors only, got a torch.fx proxy"
    if x.device.type != "cpu":
        return f"it supports the CPU only, got {x.device.type}"
    weight = conv.weight
    if not {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        return f"it has no kernel for {x.dtype}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
        return f"x is {x.dtype}, but the weights are {weight.dtype}"
    dtype = compute_dtype(x)
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no kernel for {dtype}"
    if x.shape[-1] % 16:
        return f"the number of channels must be a multiple of 16, got {x.shape[-1]}"
    if has_hooks(conv):
        return "the convolution has hooks"
    if conv.bias is None:
        return "the convolution has no bias"
    if not torch.compiler.is_compiling() and is_watched():
        return "a dispatch mode or a torch.func transform is active"
    return None


def why_rather_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    return "exported programs use plain tensor operations only, so as not to depend on the extension" if is_exporting() else None


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    x = x.to(compute_dtype(x))  # the operator computes in float32 and rounds the result to the dtype of x
    weight = conv.weight.float().flatten(1).t().contiguous()  # (9, C)
    bias = cast("Tensor", conv.bias).float()
    return torch.ops.litv2.native_depthwise_gelu(x, weight, bias)


BACKEND = Backend("native", depthwise_gelu, why_not, why_rather_not)
