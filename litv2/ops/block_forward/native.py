"""``block`` by the native CPU operators in two passes, where no gradients are wanted and nobody looks inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import has_global_hooks, has_hooks, is_watched

from .. import native
from ..packing import feed_forward_arguments, hilo_arguments

if TYPE_CHECKING:
    from ...layers import Block

MIN_TOKENS = 512  # of a batch: below, packing the weights of a block costs more than it saves

TORCH_PARTS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Dropout)


def backend(parts: tuple[type[nn.Module], ...]) -> Backend:
    known = {*TORCH_PARTS, *parts}

    def why_not(block: Block, x: Tensor) -> str | None:
        """Whoever traces, counts operations or replaces a layer gets the plain modules, as with torch's own fast path for transformers."""
        if native.problem is not None:
            return native.problem
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "a program is being compiled or traced"
        if type(x) is not Tensor:
            return f"it is for plain tensors, not for {type(x).__name__}"
        if torch.is_grad_enabled():
            return "gradients are enabled (torch.no_grad, torch.inference_mode)"
        if block.training:
            return "the block is in training mode"
        if x.device.type != "cpu":
            return f"it is for the CPU, not for {x.device.type}"
        if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return "it computes in float32, without autocast"
        if is_watched():
            return "a dispatch mode or a transform of torch.func is at work"
        if has_global_hooks():
            return "there are hooks on all modules"
        return next((reason for part in block.modules() if part is not block and (reason := _why_not_plain(part, known))), None)

    return Backend("native", infer_block, why_not, why_rather_not)


def why_rather_not(block: Block, x: Tensor) -> str | None:
    tokens = x[..., 0].numel()
    return f"{tokens} tokens are too few to pack the weights for, below {MIN_TOKENS}" if tokens < MIN_TOKENS else None


def _why_not_plain(module: nn.Module, known: set[type[nn.Module]]) -> str | None:
    name = type(module).__name__
    if type(module) not in known:
        return f"a {name} is not among the parts that it knows"
    if has_hooks(module):
        return f"there are hooks on a {name}"
    if module.training:
        return f"a {name} is in training mode"
    parameters = [p for p in module._parameters.values() if p is not None]
    if isinstance(module, nn.LayerNorm) and len(parameters) != 2:
        return "a LayerNorm has no scale and shift"
    if not all(type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and p.device.type == "cpu" for p in parameters):
        return f"the parameters of a {name} are not plain float32 tensors on the CPU"
    return None


def infer_block(block: Block, x: Tensor) -> Tensor:
    """The weights are packed anew each time: they may have changed."""
    if block.attn is not None:
        x = torch.ops.litv2.native_hilo(x, **hilo_arguments(block.attn, block.norm1))
    return torch.ops.litv2.native_feed_forward(x, **feed_forward_arguments(block.mlp, block.norm2))
