# SPDX-License-Identifier: Apache-2.0
"""Loads the native CPU operators (csrc/) if they are built, and registers them with torch.

``LITV2_NATIVE=0`` disables them; torch's own operators then compute the same up to rounding. As there, the last bits may depend on the
number of threads and of images; in float32, where Strassen's algorithm adds tokens, also on the other images of a batch.
"""

from __future__ import annotations

import os

import torch

from mm_modules.dispatch import without_second_derivatives
from mm_modules.extension import load

__all__ = ["columns", "problem"]

# Why they are unavailable, or None.
problem: str | None = "switched off by LITV2_NATIVE=0" if os.environ.get("LITV2_NATIVE", "1") == "0" else load("litv2.ops._C")


def _register() -> None:
    panel = torch.ops.litv2.native_panel()

    @torch.library.register_fake("litv2::native_pack")
    def _(weight):
        N, K = weight.shape
        if weight.dtype == torch.bfloat16:
            return weight.new_empty(-(-N // columns), K // 2, columns, 2)
        panels = -(-N // panel)
        pairs = panels // 2 if K % 64 == 0 and panels * panel >= 128 else 0  # strassen_pairs in csrc/operators.h
        return weight.new_empty(panels + 2 * pairs, K, panel)

    @torch.library.register_fake("litv2::native_depthwise_gelu")
    def _(x, weight, bias):
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("litv2::native_depthwise_gelu_backward")
    def _(gradient, x, weight, bias):
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(weight), torch.empty_like(bias)

    for name in ("feed_forward", "hilo", "blocks"):
        torch.library.register_fake(f"litv2::native_{name}")(lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))

    @torch.library.register_fake("litv2::native_classifier")
    def _(image, patch, tensors, eps, stages, classes):
        return image.new_empty(len(image), classes)

    @torch.library.register_fake("litv2::native_patch_embed")
    def _(image, patch, weight, bias, norm_weight, norm_bias, eps):
        B, _, H, W = image.shape
        return image.new_empty(B, H // patch, W // patch, len(norm_weight))

    @torch.library.register_fake("litv2::native_token_merging")
    def _(x, offset_top, offset_bottom, offset_bias, weight, bias, out_channels):
        B, H, W, _ = x.shape
        return x.new_empty(B, H // 2, W // 2, out_channels)

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    def backward(ctx, gradient):
        return torch.ops.litv2.native_depthwise_gelu_backward(gradient, *ctx.saved_tensors)

    torch.library.register_autograd("litv2::native_depthwise_gelu", backward, setup_context=keep)
    without_second_derivatives("litv2::native_depthwise_gelu_backward", "depthwise_gelu", "native")


if problem is None:
    columns: int = torch.ops.litv2.native_columns()  # that a product writes at once; a constant, for compiled graphs
    _register()
