"""bfloat16 on a CPU that has no instructions for it.

torch's own products in bfloat16 go number by number there, many times as slowly as in float32, and its convolutions channel by
channel. Eager blocks of LITv2 compute the products in float32 instead, of factors rounded to bfloat16: what instructions for bfloat16
would give, but for roundings on the way. Activations stay bfloat16, and so does what is kept for the gradients.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mm_modules.DCN.reference import in_transform

__all__ = ["compute_dtype", "emulated", "products_in_float32"]

emulated: bool = torch.backends.mkldnn.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype(x: Tensor) -> torch.dtype:
    """In which torch multiplies x with weights on the CPU: under autocast that of autocast, else its own."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def products_in_float32(x: Tensor) -> contextlib.AbstractContextManager:
    """Within it every ``F.linear`` is computed so, if x is a tensor in whose place that pays."""
    serves = (
        emulated
        and type(x) is Tensor  # not a proxy of torch.fx
        and x.device.type == "cpu"
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or in_transform())
        and compute_dtype(x) == torch.bfloat16
    )
    return _ProductsInFloat32() if serves else contextlib.nullcontext()


class _ProductsInFloat32(TorchFunctionMode):
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
