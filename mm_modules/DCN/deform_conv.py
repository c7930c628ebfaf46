# SPDX-License-Identifier: Apache-2.0
"""Deformable convolution v1 and v2 (arXiv 1703.06211, 1811.11168): one function, several backends.

It computes the same as ``torchvision.ops.deform_conv2d``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from ..dispatch import Operator
from . import compiled, onnx_node, reference, vision

__all__ = ["deform_conv2d", "operator"]

# Backends, called with (input, offset, weight, bias, stride, padding, dilation, mask): the compiled one if it is built for the device
# and dtype; else on CUDA torchvision's, one kernel without large temporaries; else plain PyTorch. Exports always use plain PyTorch.
operator = Operator("deform_conv2d", [onnx_node.BACKEND, compiled.BACKEND, vision.BACKEND, reference.BACKEND])


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Convolution whose taps are displaced by ``offset`` and sampled with bilinear interpolation, zero outside the image.

    Args:
        input: (B, C, H, W), any memory format; channels-last is fastest.
        offset: (B, 2 * offset_groups * kh * kw, Ho, Wo), the displacement (y, x) of each tap in pixels. Kept in float32 if
            ``input`` has a lower precision.
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        stride, padding, dilation: as in a convolution, one number or (vertical, horizontal).
        mask: (B, offset_groups * kh * kw, Ho, Wo), a factor on each sample (v2), or None.

    Returns:
        (B, O, Ho, Wo) in channels-last memory format. Under autocast it has autocast's dtype, as for a convolution.
        A NaN offset gives NaN in exactly the outputs that use it; a sample outside the image, however far, gives 0. A sample at
        exactly -1 is outside: its offset has zero gradient, as in the original operator (torchvision's is not zero). (In the
        PyTorch backend, a NaN offset may also make the gradient of the first pixel of its image NaN.)

    Raises:
        ValueError: shapes or dtypes do not match; the message names them.
    """
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(input, offset, weight, bias, stride, padding, dilation, mask)

    # Positions rounded to 8 bits of mantissa would move samples by whole pixels, so they are never below float32.
    position_dtype = torch.promote_types(input.dtype, torch.float32)
    offset = offset.to(position_dtype)
    mask = None if mask is None else mask.to(position_dtype)
    return operator(input, offset, weight, bias, stride, padding, dilation, mask)


def _check(input, offset, weight, bias, stride, padding, dilation, mask) -> None:
    def fail(message: str):
        raise ValueError(f"deform_conv2d: {message}")

    for name, tensor in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
        if tensor is not None and (tensor.dim() != 4 or not tensor.is_floating_point()):
            fail(f"{name} must be a 4-D floating-point tensor, got {tuple(tensor.shape)} {tensor.dtype}")
    for name, tensor in (("offset", offset), ("weight", weight), ("bias", bias), ("mask", mask)):
        if tensor is not None and tensor.device != input.device:
            fail(f"{name} is on {tensor.device}, but input is on {input.device}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            fail(f"{name} is {tensor.dtype}, but input is {input.dtype}")
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        fail(f"stride={stride} and dilation={dilation} must be at least 1, padding={padding} at least 0")

    B, C, H, W = input.shape
    O, C_per_group, kh, kw = weight.shape
    groups = C // C_per_group
    if C % C_per_group or O % groups:
        shapes = f"weight {tuple(weight.shape)} does not fit input {tuple(input.shape)}"
        fail(f"{shapes}: C must be groups * weight.shape[1] and groups must divide O")
    if bias is not None and bias.shape != (O,):
        fail(f"bias has shape {tuple(bias.shape)}, expected ({O},)")
    offset_groups = offset.shape[1] // (2 * kh * kw)
    if offset_groups < 1 or offset.shape[1] % (2 * kh * kw) or C % offset_groups:
        fail(f"offset has {offset.shape[1]} channels, expected 2 * offset_groups * {kh} * {kw} with offset_groups dividing C={C}")
    Ho = (H + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    Wo = (W + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    if Ho < 1 or Wo < 1:
        fail(f"the output would be {Ho} x {Wo} for input {tuple(input.shape)}, kernel {kh} x {kw}, {stride=}, {padding=}, {dilation=}")
    if (offset.shape[0], offset.shape[2], offset.shape[3]) != (B, Ho, Wo):
        fail(f"offset has shape {tuple(offset.shape)}, expected ({B}, {offset.shape[1]}, {Ho}, {Wo})")
    if mask is not None and tuple(mask.shape) != (B, offset_groups * kh * kw, Ho, Wo):
        fail(f"mask has shape {tuple(mask.shape)}, expected ({B}, {offset_groups * kh * kw}, {Ho}, {Wo})")
