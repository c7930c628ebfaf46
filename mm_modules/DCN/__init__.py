# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution: the function, its modules (including the one of LITv2's token merging) and its backends."""

from .deform_conv import deform_conv2d
from .modules import DeformConv2d, DeformConv2dPack, DeformConv2dPackMore, ModulatedDeformConv2d, ModulatedDeformConv2dPack
from .onnx_node import deform_conv_nodes

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformConv2dPackMore",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "deform_conv2d",
    "deform_conv_nodes",
]
