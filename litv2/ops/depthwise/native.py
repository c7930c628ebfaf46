"""``depthwise_gelu`` by the native CPU operator, in training too: one pass instead of a convolution and a GELU."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mm_modules import torch_state
from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_hooks, is_exporting, is_watched

from .. import native


def why_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    if native.problem is not None:
        return native.problem
    if not isinstance(x, Tensor):
        return "it is for tensors, not for proxies of torch.fx"
    if x.device.type != "cpu":
        return f"it is for the CPU, not for {x.device.type}"
    weight = conv.weight
    if not {x.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        return f"it has no kernel for {x.dtype}"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"):
        return f"x is {x.dtype}, the weights are {weight.dtype}"
    dtype = compute_dtype(x)
    if dtype == torch.bfloat16 and not torch_state.bfloat16_is_emulated():
        return "this processor has bfloat16 instructions, which torch's convolution uses"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no kernel for {dtype}"
    if x.shape[-1] % 16:
        return f"it takes multiples of 16 channels, not {x.shape[-1]}"
    if has_hooks(conv):
        return "there are hooks on the convolution"
    if conv.bias is None:
        return "the convolution has no bias"
    if not torch.compiler.is_compiling() and is_watched():
        return "a dispatch mode or a transform of torch.func is at work"
    return None


def why_rather_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    return "an exported program is made of plain tensor operations, so that it needs nothing of ours" if is_exporting() else None


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    x = x.to(compute_dtype(x))  # the operator computes in float32 and rounds the result to this
    weight = conv.weight.float().flatten(1).t().contiguous()  # (9, C)
    bias = cast("Tensor", conv.bias).float()
    return torch.ops.litv2.native_depthwise_gelu(x, weight, bias)


BACKEND = Backend("native", depthwise_gelu, why_not, why_rather_not)
