# SPDX-License-Identifier: Apache-2.0
"""The layers of LITv2, in data-flow order: PatchEmbed -> [Block ...] -> DeformableTokenMerging -> ...

Tokens are channels-last maps (B, H, W, C) throughout. Convolutions get a permuted view, which is (B, C, H, W) in the
channels-last memory format, so that nothing is copied between a Linear and a convolution.
Each module's ``flops(H, W)`` returns the multiply-adds for one H x W map, counted as in the public release.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from hilo import HiLo
from mm_modules.DCN import DeformConv2dPack

from . import ops


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), a view."""
    return x.permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), a view."""
    return x.permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drops the residual branch per sample with probability ``rate`` in training."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: rate={rate} must lie in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * kept.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


class PatchEmbed(nn.Module):
    """Image (B, in_chans, H, W) -> tokens (B, ceil(H / patch), ceil(W / patch), dim), one per patch, normalised.

    An image whose sides are not multiples of the patch size is zero-padded on the right and at the bottom.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return ops.patch_embed(x, self)

    def flops(self, H: int, W: int) -> int:
        """Returns the multiply-adds; H and W are the numbers of patches here."""
        return H * W * (self.proj.weight.numel() + self.proj.out_channels)


class DepthwiseConv(nn.Module):
    """3 x 3 depthwise convolution and GELU; its zero padding is LITv2's only positional information. (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_gelu(x, self.dwconv)


class Mlp(nn.Module):
    """Feed-forward network with a depthwise convolution before the activation (ConvFFN). (B, H, W, dim) -> (B, H, W, dim).

    Without ``conv``, as in LIT, there is only the activation.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, conv: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv: Any = DepthwiseConv(hidden_dim) if conv else nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.dwconv(self.fc1(x)))
        return self.drop(self.fc2(x))

    def flops(self, H: int, W: int) -> int:
        dim, hidden = self.fc1.in_features, self.fc1.out_features
        depthwise = 9 * hidden + hidden if isinstance(self.dwconv, DepthwiseConv) else 0
        return H * W * (2 * dim * hidden + depthwise)


class Block(nn.Module):
    """Pre-norm residual block: HiLo attention, then the feed-forward network. (B, H, W, dim) -> (B, H, W, dim).

    ``window_size`` is HiLo's; 0 leaves the attention out, as the first two stages of LITv2 do. ``attention`` makes another in its place
    from (dim, num_heads, qkv_bias, attn_drop, proj_drop); ``conv_ffn`` is the ``conv`` of the feed-forward network.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        alpha: float,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        attention: Callable[..., nn.Module] | None = None,
        conv_ffn: bool = True,
    ):
        super().__init__()
        self.attn: Any = None
        if window_size > 0:
            self.norm1 = nn.LayerNorm(dim)
            attention = attention or partial(HiLo, window_size=window_size, alpha=alpha)
            self.attn = attention(dim, num_heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, conv_ffn)
        self.drop_path = DropPath(drop_path)

    @ops.block(parts=(HiLo, DropPath, Mlp, DepthwiseConv))
    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(ops.attention(self.norm1(x), self.attn))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self, H: int, W: int) -> int:
        norm = H * W * self.norm2.normalized_shape[0]
        attention = 0 if self.attn is None else norm + self.attn.flops(H, W)
        return attention + norm + self.mlp.flops(H, W)


class DeformableTokenMerging(nn.Module):
    """DTM (LIT, arXiv 2105.14217): merges tokens by a deformable 2 x 2 convolution with stride 2.

    (B, H, W, dim) -> (B, H // 2, W // 2, out_dim). If H or W is odd, no patch starts at the last row or column.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.dconv = DeformConv2dPack(dim, out_dim, kernel_size=2, stride=2)
        self.norm_layer = nn.BatchNorm2d(out_dim)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return ops.token_merging(x, self)

    def flops(self, H: int, W: int) -> int:
        """Counts as the release does: 12 offset channels, although the layer has 8 (2 per tap), and no interpolation."""
        dim, out_dim = self.dconv.conv_offset.in_channels, self.norm_layer.num_features
        return (H // 2) * (W // 2) * (4 * dim * out_dim + 12 * (4 * dim + 1) + 2 * out_dim)
