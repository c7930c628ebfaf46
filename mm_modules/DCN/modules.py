# SPDX-License-Identifier: Apache-2.0
"""Modules on top of ``deform_conv2d``: offsets given by the caller or predicted, with a mask (v2) or without.

The names and the state-dict keys (``weight``, ``bias``, ``conv_offset`` and ``conv_offset_mask``) are those of the public release's
package. Three things differ: the convolution that predicts offsets has the same dilation as the one that uses them, ``bias=False``
gives ``None`` instead of a constant bias, and ``forward`` returns only the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..torch_state import is_exporting
from .deform_conv import deform_conv2d

__all__ = ["DeformConv2d", "DeformConv2dPack", "DeformConv2dPackMore", "ModulatedDeformConv2d", "ModulatedDeformConv2dPack"]


class _DeformConv2d(nn.Module):
    """Base class of the modules: their arguments, weight and bias.

    Args:
        kernel_size, stride, padding, dilation, groups, bias: as in ``nn.Conv2d``.
        deformable_groups: groups of input channels, each with its own offsets.
        im2col_step: images per call of the release's kernel; ignored, since any batch size works.
        lr_mult: the release's learning-rate factor of ``conv_offset``; ignored, use a parameter group instead.

    Shape:
        (B, in_channels, H, W) in any memory format -> (B, out_channels, Ho, Wo), channels-last.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        im2col_step: int | None = None,
        bias: bool = True,
        lr_mult: float | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        if in_channels % groups or out_channels % groups or in_channels % deformable_groups:
            raise ValueError(f"{name}: {groups=} and {deformable_groups=} must divide {in_channels=}, groups also {out_channels=}")
        for ignored, value in (("im2col_step", im2col_step), ("lr_mult", lr_mult)):
            if value is not None:
                warnings.warn(f"{name}: {ignored}={value} has no effect here and can be removed", stacklevel=2)
        self.kernel_size, self.stride, self.padding, self.dilation = map(_pair, (kernel_size, stride, padding, dilation))
        self.deformable_groups = deformable_groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self._add_offset_layers(in_channels)
        self.reset_parameters()

    def _add_offset_layers(self, in_channels: int) -> None:
        """Hook for subclasses to add the layers that predict their offsets."""

    def _offset_conv(self, in_channels: int, values_per_tap: int) -> nn.Conv2d:
        """Returns a plain convolution of the same geometry with ``values_per_tap`` outputs per tap."""
        channels = values_per_tap * self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        return nn.Conv2d(in_channels, channels, self.kernel_size, self.stride, self.padding, self.dilation)

    def reset_parameters(self) -> None:
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        out_channels, kernel = len(self.weight), self.kernel_size
        return f"{out_channels} channels, {kernel=}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class DeformConv2d(_DeformConv2d):
    """A deformable convolution whose offsets are given."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """offset: (B, 2 * deformable_groups * kh * kw, Ho, Wo), as in ``deform_conv2d``."""
        return self._convolve(x, offset)


class DeformConv2dPack(_DeformConv2d):
    """A deformable convolution that predicts its own offsets with a plain convolution of the same geometry, as in LITv2.

    ``conv_offset`` is initialised to zero, so that training starts from a plain convolution. Offsets are computed and kept in
    float32 under autocast.
    """

    def _add_offset_layers(self, in_channels: int) -> None:
        self.conv_offset = self._offset_conv(in_channels, 2)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero(self.conv_offset)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.predict_offset(x))

    def predict_offset(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 2 * deformable_groups * kh * kw, Ho, Wo), in float32 or better."""
        return _in_float32(self.conv_offset, x)


class DeformConv2dPackMore(_DeformConv2d):
    """:class:`DeformConv2dPack` with a small network instead of the plain convolution: 1 x 1 to a quarter of the channels, batch norm,
    ReLU, and then the zero-initialised convolution."""

    def _add_offset_layers(self, in_channels: int) -> None:
        hidden = in_channels // 4
        if hidden < 1:
            raise ValueError(f"DeformConv2dPackMore: {in_channels=} must be at least 4: a quarter of the channels predicts the offsets")
        squeeze = (nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True))
        self.conv_offset = nn.Sequential(*squeeze, self._offset_conv(hidden, 2))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero(self.conv_offset[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.predict_offset(x))

    def predict_offset(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 2 * deformable_groups * kh * kw, Ho, Wo), in float32 or better."""
        first, norm, relu, last = cast("Iterable[Any]", self.conv_offset)
        with torch.autocast(x.device.type, enabled=False):
            hidden = relu(norm(first(x.to(first.weight.dtype))))
        return _in_float32(last, hidden)


class ModulatedDeformConv2d(_DeformConv2d):
    """Deformable convolution v2 whose offsets and mask (a factor on each sample) are given."""

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """offset: (B, 2 * n, Ho, Wo), mask: (B, n, Ho, Wo), for n = deformable_groups * kh * kw."""
        return self._convolve(x, offset, mask)


class ModulatedDeformConv2dPack(_DeformConv2d):
    """Deformable convolution v2 that predicts its own offsets and mask with a plain convolution of the same geometry.

    ``conv_offset_mask`` is initialised to zero, so that all samples of a plain convolution are weighted by one half. The first two
    thirds of its channels are the offsets, the last third is the mask before the sigmoid. Both are computed and kept in float32 under
    autocast.
    """

    def _add_offset_layers(self, in_channels: int) -> None:
        self.conv_offset_mask = self._offset_conv(in_channels, 3)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        _zero(self.conv_offset_mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, *self.predict_offset_and_mask(x))

    def predict_offset_and_mask(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, in_channels, H, W) -> (B, 2 * n, Ho, Wo) and (B, n, Ho, Wo) for n = deformable_groups * kh * kw, in float32 or better."""
        both = _in_float32(self.conv_offset_mask, x)
        n = both.shape[1] // 3
        return both[:, : 2 * n], both[:, 2 * n :].sigmoid()


def _zero(conv: Any) -> None:
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)


def _in_float32(conv: Any, x: Tensor) -> Tensor:
    """Runs the convolution in float32 or better even under autocast, since rounded offsets would move samples."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
        plain = conv.stride == conv.kernel_size and conv.dilation == (1, 1) and conv.padding == (0, 0)
        if plain and x.device.type == "cuda" and torch.compiler.is_compiling() and not is_exporting() and not torch.is_grad_enabled():
            return _of_patches(x, weight, bias)
        return F.conv2d(x.to(dtype), weight, bias, conv.stride, conv.padding, conv.dilation)


def _of_patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of patches that do not overlap, as a sum of products: of it ``torch.compile`` makes one kernel, which reads x in its
    own precision. A library's convolution reads a float32 copy."""
    kh, kw = weight.shape[2:]
    h, w = x.shape[2] // kh, x.shape[3] // kw
    x = x.narrow(2, 0, h * kh).narrow(3, 0, w * kw).unflatten(3, (w, kw)).unflatten(2, (h, kh))  # (B, C, h, kh, w, kw)
    products = x.permute(0, 2, 4, 3, 5, 1).unsqueeze(3).to(weight.dtype) * weight.permute(0, 2, 3, 1)  # (B, h, w, O, kh, kw, C)
    return (products.sum(dim=(4, 5, 6)) + bias).permute(0, 3, 1, 2)
