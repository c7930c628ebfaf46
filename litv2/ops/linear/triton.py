# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a block for inference by Triton kernels: what stands before or after the product is no pass over memory of its own.

They are taken where that decides: for products whose time is that of reading and writing, which are those of few channels. A library's are
faster where arithmetic decides; then sum and norm are one pass after it, which ``torch.compile`` makes by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_modules.dispatch import Backend

from .. import triton

INPUTS, OUTPUTS = 256, 384  # what kernels hold of a row at most
FEW = 256  # outputs of a long product whose time is that of reading x: as many operations for each byte of it, of 150 to 300 that GPUs do
SHORT = 512  # inputs of a product that more outputs do not make long, either
NORMED = 4096  # channels that the kernel of sum and norm holds at most
CELLS = 2**31 - 128  # of a map: blocks of 128 are counted in 32 bits


def _why_not(x: Tensor, *others: Tensor) -> str | None:
    if (reason := triton.why_not(x)) is not None:
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"it supports float16 and bfloat16, got {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled; it takes weights that have the dtype of x"
    if any(tensor.dtype != x.dtype for tensor in others):
        return f"x is {x.dtype}, but the weights or the residual are not"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others)):
        return "gradients are enabled; use torch.no_grad or torch.inference_mode"
    return None if x[..., 0].numel() <= CELLS else f"it supports maps of up to {CELLS} cells, got {tuple(x.shape[:-1])}"


def why_not_norm_linear(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    if (reason := _why_not(x, weight, bias)) is not None:
        return reason
    return None if x.shape[-1] <= INPUTS else f"it supports up to {INPUTS} inputs, got {x.shape[-1]}"


def why_not_linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float | None = None) -> str | None:
    if (reason := _why_not(x, weight, bias, residual)) is not None:
        return reason
    return None if len(weight) <= OUTPUTS else f"it supports up to {OUTPUTS} outputs, got {len(weight)}"


def why_rather_not_norm_linear(*_) -> str | None:
    return triton.why_rather_not()


def why_rather_not_linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float | None = None) -> str | None:
    if len(weight) > FEW and x.shape[-1] > SHORT:
        return f"a library's products of more than {SHORT} inputs with more than {FEW} outputs are faster"
    return triton.why_rather_not()


def why_not_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> str | None:
    if (reason := _why_not(x, weight, bias, residual)) is not None:
        return reason
    return None if len(weight) <= NORMED else f"it supports up to {NORMED} outputs, got {len(weight)}"


def why_rather_not_add_norm(*_) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile makes one pass of sum and norm by itself"
    return triton.why_rather_not()


@torch.library.custom_op("litv2::triton_norm_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
def _norm_linear(x, weight, bias, eps):
    from ..triton import norm_linear

    return norm_linear.norm_linear(x, weight, bias, eps)


@torch.library.custom_op(
    "litv2::triton_linear_add", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor"
)
def _linear_add(x, weight, bias, residual):
    from ..triton import linear_add

    return linear_add.linear_add(x, weight, bias, residual)


@torch.library.custom_op(
    "litv2::triton_linear_add_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor residual, float eps) -> (Tensor, Tensor)",
)
def _linear_add_norm(x, weight, bias, residual, eps):
    from ..triton import linear_add

    return linear_add.linear_add_norm(x, weight, bias, residual, eps)


@torch.library.custom_op("litv2::triton_add_norm", mutates_args=(), schema="(Tensor x, Tensor residual, float eps) -> (Tensor, Tensor)")
def _add_norm(x, residual, eps):
    from ..triton import add_norm

    return add_norm.add_norm(x, residual, eps)


def linear_then_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _add_norm(F.linear(x, weight, bias), residual, eps)


@_norm_linear.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(*x.shape[:-1], len(weight))


@_linear_add.register_fake
def _(x, weight, bias, residual):
    return x.new_empty(*x.shape[:-1], len(weight))


@_linear_add_norm.register_fake
def _(x, weight, bias, residual, eps):
    return x.new_empty(*x.shape[:-1], len(weight)), x.new_empty(*x.shape[:-1], len(weight))


@_add_norm.register_fake
def _(x, residual, eps):
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


NORM_LINEAR = Backend("triton", _norm_linear, why_not_norm_linear, why_rather_not_norm_linear)
LINEAR_ADD = Backend("triton", _linear_add, why_not_linear_add, why_rather_not_linear_add)
LINEAR_ADD_NORM = Backend("triton", _linear_add_norm, why_not_linear_add, why_rather_not_linear_add)
ADD_NORM = Backend("add_norm", linear_then_add_norm, why_not_add_norm, why_rather_not_add_norm)
