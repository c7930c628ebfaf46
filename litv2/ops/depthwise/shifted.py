# SPDX-License-Identifier: Apache-2.0
"""``depthwise_gelu`` as nine shifted multiply-adds, which ``torch.compile`` turns into one kernel for CUDA.

There a convolution is a call of a library, whose padding, bias and GELU each pass over the largest tensors of the network. This sum has no
call in it: Inductor reads x and writes the result once, and keeps nothing between.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, has_hooks, is_exporting


def why_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    if not isinstance(x, Tensor):
        return "it supports tensors only, got a torch.fx proxy"
    if has_hooks(conv):
        return "the convolution has hooks"
    if conv.bias is None:
        return "the convolution has no bias"
    return None


def why_rather_not(x: Tensor, conv: nn.Conv2d) -> str | None:
    if x.device.type != "cuda":
        return f"it pays off on CUDA only, got {x.device.type}"
    if not torch.compiler.is_compiling():
        return "without torch.compile it is nine passes instead of one"
    return "exported programs keep the convolution, which other runtimes know" if is_exporting() else None


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    H, W = x.shape[1:3]
    dtype = compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)  # of the sum
    weight = conv.weight.flatten(1).t().to(wide).contiguous()  # (9, C)
    x = F.pad(x.to(dtype), (0, 0, 1, 1, 1, 1))
    y = cast("Tensor", conv.bias).to(wide)
    for tap in range(9):
        y = y + weight[tap] * x.narrow(1, tap // 3, H).narrow(2, tap % 3, W).to(wide)
    return F.gelu(y).to(dtype)


BACKEND = Backend("shifted", depthwise_gelu, why_not, why_rather_not)
