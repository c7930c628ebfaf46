# SPDX-License-Identifier: Apache-2.0
"""A module in code that ``torch.compile`` generates for inference, with the options that suit the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compilation import COMPILE_OPTIONS
from .cuda_graph import each_tensor

__all__ = ["CUDA_OPTIONS", "Compiled"]

CUDA_OPTIONS: dict[str, Any] = {
    **COMPILE_OPTIONS,
    # HiLo's window attention is computed where its result is joined with the other branch, instead of in a kernel of its own.
    "realize_opcount_threshold": 64,
    "force_pointwise_cat": True,
    # Of kernels that are generated. Where products are tuned, their bias is often written to memory before them: the ways are timed once,
    # and the faster one is missed.
    "max_autotune_pointwise": True,
    "triton.cudagraphs": True,
}


class Compiled(nn.Module):
    """Takes and returns what ``module`` does, which must be for inference. The first call compiles, and so may other shapes."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.on_cuda = next(module.parameters()).is_cuda
        self.module = torch.compile(module, options=CUDA_OPTIONS if self.on_cuda else COMPILE_OPTIONS)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        # Not among the options, which Dynamo does not see: it then passes weights as inputs, and there is nothing to freeze.
        with torch._inductor.config.patch(freezing=True):
            result = self.module(x)
        return each_tensor(torch.clone, result) if self.on_cuda else result  # the next replay of a CUDA graph overwrites it
