# SPDX-License-Identifier: Apache-2.0
"""The operator ``depthwise_gelu``: gelu(3 x 3 depthwise convolution with zero padding and bias), (B, H, W, C) -> (B, H, W, C)."""

from mm_modules.dispatch import Operator

from . import native, reference, shifted, triton

__all__ = ["depthwise_gelu"]

# Arguments: x, and the nn.Conv2d.
depthwise_gelu = Operator("depthwise_gelu", [native.BACKEND, triton.BACKEND, shifted.BACKEND, reference.BACKEND])
