"""Deformable convolution: the function, the module behind LITv2's token merging, and their backends."""

from .deform_conv import DeformConv2dPack, deform_conv2d
from .onnx_node import deform_conv_nodes

__all__ = ["DeformConv2dPack", "deform_conv2d", "deform_conv_nodes"]
