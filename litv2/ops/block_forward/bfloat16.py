# SPDX-License-Identifier: Apache-2.0
"""``block`` in bfloat16 on a CPU without bfloat16 instructions.

There, torch computes bfloat16 matrix products element by element, many times slower than in float32. This backend runs the block's own
forward, but its linear layers multiply in float32 with factors rounded to bfloat16, which gives the same as bfloat16 instructions up to
intermediate rounding. Activations stay in bfloat16, and so do the tensors saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_modules import torch_state
from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype, in_transform

if TYPE_CHECKING:
    from ...layers import Block


def backend(forward: Callable[[Block, Tensor], Tensor]) -> Backend:
    def run(block: Block, x: Tensor) -> Tensor:
        with LinearInFloat32():
            return forward(block, x)

    return Backend("bfloat16-emulation", run, why_not, why_rather_not)


def why_not(block: Block, x: Tensor) -> str | None:
    if type(x) is not Tensor:
        return f"it supports plain tensors only, got {type(x).__name__}"
    if x.device.type != "cpu":
        return f"it supports the CPU only, got {x.device.type}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform():
        return "the model is being compiled, traced or transformed by torch.func"
    if compute_dtype(x) != torch.bfloat16:
        return f"it supports bfloat16 only, got {compute_dtype(x)}"
    return None


def why_rather_not(block: Block, x: Tensor) -> str | None:
    return None if torch_state.bfloat16_is_emulated() else "this processor has bfloat16 instructions, which torch uses"


class LinearInFloat32(TorchFunctionMode):
    """Within this mode every ``F.linear`` that torch would compute in bfloat16 multiplies in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_linear if func is F.linear else func)(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    in_bfloat16 = compute_dtype(input) == torch.bfloat16 and (weight.dtype == input.dtype or torch.is_autocast_enabled("cpu"))
    if in_bfloat16 and type(weight) in (Tensor, nn.Parameter) and {input.dtype, weight.dtype} <= {torch.float32, torch.bfloat16}:
        return _Linear.apply(input, weight, bias)
    return F.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, x, weight, bias):
        x = x.bfloat16()
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), _rounded(weight), None if bias is None else _rounded(bias)).bfloat16()

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        gradient = gradient.float()
        rows = gradient.flatten(0, -2)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            (gradient @ _rounded(weight)).bfloat16() if of_x else None,
            rows.t() @ x.flatten(0, -2).float() if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _rounded(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()
