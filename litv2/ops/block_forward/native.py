# SPDX-License-Identifier: Apache-2.0
"""``block`` by the native CPU operators in two passes, if no gradients are needed and no hook or mode observes the layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import has_global_hooks, has_hooks, is_exporting, is_watched

from .. import native
from ..folding import is_plain
from ..packing import feed_forward_arguments, hilo_arguments

if TYPE_CHECKING:
    from ...layers import Block

MIN_TOKENS = 512  # in a batch: below, packing the weights of a block costs more time than it saves

TORCH_PARTS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Dropout)


def backend(parts: tuple[type[nn.Module], ...]) -> Backend:
    known = {*TORCH_PARTS, *parts}

    def why_not(block: Block, x: Tensor) -> str | None:
        """With tracing, operation counters or replaced layers the plain modules run, as with torch's own fast path for transformers."""
        if native.problem is not None:
            return native.problem
        if is_exporting():
            return "the model is being exported or traced"
        if not torch.compiler.is_compiling() and type(x) is not Tensor:
            return f"it supports plain tensors only, got {type(x).__name__}"
        if torch.is_grad_enabled():
            return "gradients are enabled; use torch.no_grad or torch.inference_mode"
        if block.training:
            return "the block is in training mode"
        if x.device.type != "cpu":
            return f"it supports the CPU only, got {x.device.type}"
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return "it supports float32 without autocast only"
        if not torch.compiler.is_compiling() and is_watched():
            return "a dispatch mode or a torch.func transform is active"
        if has_global_hooks():
            return "global module hooks are registered"
        for part in block.modules():
            if part is not block and (reason := _why_not_plain(part, known)):
                return reason
        if block.attn is not None and not is_plain(block.attn):
            return "its HiLo has options beyond the paper's: rectangular windows, another pool size, or masked padding"
        return None

    return Backend("native", infer_block, why_not, why_rather_not)


def why_rather_not(block: Block, x: Tensor) -> str | None:
    tokens = x[..., 0].numel()
    return f"packing the weights pays off from {MIN_TOKENS} tokens, got {tokens}" if tokens < MIN_TOKENS else None


def _why_not_plain(module: nn.Module, known: set[type[nn.Module]]) -> str | None:
    name = type(module).__name__
    if type(module) not in known:
        return f"a {name} is not a module that it supports"
    if has_hooks(module):
        return f"a {name} has hooks"
    if module.training:
        return f"a {name} is in training mode"
    parameters = [p for p in module._parameters.values() if p is not None]
    if isinstance(module, nn.LayerNorm) and len(parameters) != 2:
        return "a LayerNorm has no weight and bias"
    if not all(type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters):
        return f"the parameters of a {name} are not plain float32 tensors on the CPU"
    return None


def infer_block(block: Block, x: Tensor) -> Tensor:
    """Computes the block; the weights are packed anew in each call, since they may have changed."""
    if block.attn is not None:
        x = torch.ops.litv2.native_hilo(x, **hilo_arguments(block.attn, block.norm1))
    return torch.ops.litv2.native_feed_forward(x, **feed_forward_arguments(block.mlp, block.norm2))
