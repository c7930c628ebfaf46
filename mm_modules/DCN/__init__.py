"""Deformable convolution: the function, the module behind LITv2's token merging, and their backends."""

from .backend_onnx import deform_conv_nodes
from .deform_conv import DeformConv2dPack, deform_conv2d

__all__ = ["DeformConv2dPack", "deform_conv2d", "deform_conv_nodes"]
