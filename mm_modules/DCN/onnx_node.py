# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution as one node of an ONNX graph: ``DeformConv`` of opset 19. It computes nothing here."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..dispatch import Backend, use


def deform_conv_nodes() -> AbstractContextManager[None]:
    """Within this context ``torch.onnx.export`` writes each deformable convolution as a DeformConv node (torch 2.8 or newer)."""
    return use(deform_conv2d="onnx")


def why_rather_not(*_) -> str:
    return "it is only for ONNX exports, inside deform_conv_nodes()"


def deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask) -> Tensor:
    """See ``mm_modules.DCN.deform_conv2d``. The node uses one dtype for all inputs: that of the offsets, never below float32."""
    (B, _, Ho, Wo), (O, C_per_group, kh, kw) = offset.shape, weight.shape
    dtype = offset.dtype
    inputs = [input.to(dtype), weight.to(dtype), offset]
    if bias is not None or mask is not None:
        inputs.append(torch.zeros(O, dtype=dtype) if bias is None else bias.to(dtype))
    if mask is not None:
        inputs.append(mask)
    attributes = dict(
        kernel_shape=[kh, kw],
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=input.shape[1] // C_per_group,
        offset_group=offset.shape[1] // (2 * kh * kw),
    )
    return torch.onnx.ops.symbolic("DeformConv", inputs, attributes, dtype=dtype, shape=(B, O, Ho, Wo), version=19).to(input.dtype)


BACKEND = Backend("onnx", deform_conv2d, why_rather_not=why_rather_not)
