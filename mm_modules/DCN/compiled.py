# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution by the C++/CUDA extension, if it is built (``setup.py``): the fastest backend.

The extension registers the operators ``litv2::deform_conv2d`` and its backward with their kernels and autocast rules; shape
inference and autograd are registered here.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
from torch import Tensor

from .. import torch_state
from ..dispatch import Backend, without_second_derivatives
from ..extension import load

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

problem = load("mm_modules.DCN._C")  # why it cannot be used, None if it can
_DEVICES = [device for device in ("cpu", "cuda") if problem is None and torch_state.has_kernel("litv2::deform_conv2d", device)]


def why_not(input: Tensor, *_) -> str | None:
    if problem is not None:
        return problem
    if input.device.type not in _DEVICES:
        return f"it was built for {' and '.join(_DEVICES)} only, got {input.device.type}"
    if input.dtype not in DTYPES:
        return f"it has no kernel for {input.dtype}"
    if input.device.type == "cuda" and not _fits(input.device):
        number = "{}.{}".format(*torch.cuda.get_device_capability(input.device))
        name = torch.cuda.get_device_name(input.device)
        return f"it was compiled for other GPUs than {name}; compile it again with TORCH_CUDA_ARCH_LIST={number} in the environment"
    if not torch.compiler.is_compiling() and torch_state.in_transform():
        return "it has no rules for torch.func's transforms and forward derivatives"
    return None


@torch_state.constant_in_graphs
def _fits(device: torch.device) -> bool:
    """Whether the library has kernels for this GPU; a constant of compiled graphs."""
    return _asked_once(device)


@cache
def _asked_once(device: torch.device) -> bool:
    # A machine without a GPU has fake tensors only, which no kernel ever sees.
    if not torch.cuda.is_available():
        return True
    with torch.cuda.device(device):
        return sys.modules["mm_modules.DCN._C"].cuda_kernels_fit()


def why_rather_not(*_) -> str | None:
    if torch_state.is_exporting():
        return "exported programs use plain tensor operations only, so as not to depend on the extension"
    return None


def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """See ``mm_modules.DCN.deform_conv2d``, which has checked the arguments; ``offset`` and ``mask`` are float32 or better."""
    emulated = torch_state.bfloat16_is_emulated()
    return torch.ops.litv2.deform_conv2d(input, offset, weight, bias, mask, stride, padding, dilation, emulated)


def _register() -> None:
    @torch.library.register_fake("litv2::deform_conv2d")
    def _(input, offset, weight, bias, mask, stride, padding, dilation, wide_products=False):
        (B, _, Ho, Wo), O = offset.shape, weight.shape[0]
        return input.new_empty(B, Ho, Wo, O).permute(0, 3, 1, 2)

    @torch.library.register_fake("litv2::deform_conv2d_backward")
    def _(gradient, input, offset, weight, mask, stride, padding, dilation, *needs):
        def like(tensor, needed):
            if not needed:
                return input.new_empty(0)
            a, b, c, d = tensor.shape
            return tensor.new_empty(a, c, d, b).permute(0, 3, 1, 2)

        return tuple(like(tensor, needed) for tensor, needed in zip((input, offset, weight, mask), needs))

    def keep(ctx, inputs, output):
        input, offset, weight, bias, mask, *ctx.geometry, ctx.wide_products = inputs
        ctx.save_for_backward(input, offset, weight, mask)

    def backward(ctx, gradient):
        needs = ctx.needs_input_grad
        input, offset, weight, mask = torch.ops.litv2.deform_conv2d_backward(
            gradient, *ctx.saved_tensors, *ctx.geometry, needs[0], needs[1], needs[2], needs[4], ctx.wide_products
        )
        bias = gradient.sum(dim=(0, 2, 3)) if needs[3] else None
        results = (input if needs[0] else None, offset if needs[1] else None, weight if needs[2] else None)
        return *results, bias, mask if needs[4] else None, None, None, None, None

    torch.library.register_autograd("litv2::deform_conv2d", backward, setup_context=keep)
    without_second_derivatives("litv2::deform_conv2d_backward", "deform_conv2d", BACKEND.name)


BACKEND = Backend("compiled", deform_conv2d, why_not, why_rather_not)

if problem is None:
    _register()
