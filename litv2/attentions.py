# SPDX-License-Identifier: Apache-2.0
"""Other attention in the place of HiLo: the layers of the paper's table 4, and that of the predecessor LIT.

Each maps the tokens (B, H * W, dim) of an H x W map to the same shape, for any H and W, and counts its multiply-adds as HiLo does, padded
cells included and softmax not. Its parameters have the names of the original, none of which HiLo has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops

__all__ = ["ATTENTIONS", "SRA", "RelativeSelfAttention", "SelfAttention", "WindowAttention", "attention_layer"]

ATTENTIONS = ("hilo", "msa", "sra", "w-msa", "t-msa", "relative-msa")


TABLE_IMAGE = 224  # side in pixels of the images that tables of relative positions are for


def attention_layer(name: str, block: int, stages_after: int, stride: int) -> Callable[..., nn.Module] | None:
    """Returns what makes the attention of a block from (dim, num_heads, qkv_bias, attn_drop, proj_drop); None for HiLo.

    Args:
        name: one of ``ATTENTIONS``. "sra" halves the map as often as there are stages after this one, as PVT does; "t-msa" has
            windows and spatial reduction in turns, as Twins (arXiv 2104.13840).
        block: number of the block in its stage, from 0.
        stages_after: number of stages after that of the block.
        stride: pixels of the image for a cell of the map, which gives the size of a table of relative positions.

    Raises:
        ValueError: the name is unknown.
    """
    reduction = partial(SRA, ratio=2**stages_after)
    layers: dict[str, Callable[..., nn.Module] | None] = {
        "hilo": None,
        "msa": SelfAttention,
        "sra": reduction,
        "w-msa": WindowAttention,
        "t-msa": reduction if block % 2 else WindowAttention,
        "relative-msa": partial(RelativeSelfAttention, side=max(1, TABLE_IMAGE // stride)),
    }
    if name not in layers:
        raise ValueError(f"LITv2: attention={name!r} must be one of {', '.join(ATTENTIONS)}")
    return layers[name]


class SelfAttention(nn.Module):
    """MSA, multi-head self-attention between all tokens (arXiv 1706.03762).

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.attn_drop = _checked_heads(dim, num_heads), attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        q, k, v = _heads(self.qkv(x), 3, self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, self.bias(H, W), dropout_p=self.attn_drop * self.training)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def bias(self, H: int, W: int) -> Tensor | None:
        """What is added to the logits, (num_heads, H * W, H * W); None for nothing."""
        return None

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj.in_features
        return 4 * N * D**2 + 2 * N**2 * D


class RelativeSelfAttention(SelfAttention):
    """The self-attention of LIT (arXiv 2105.14217): a learned bias per head for each distance in rows and columns, as in Swin.

    The table is for maps of ``side`` x ``side`` cells. For others it is resized like a picture, by bicubic interpolation, as Swin's is for
    other windows: a distance gets the bias of the same share of the map.
    """

    def __init__(self, dim: int, num_heads: int, side: int, **options):
        super().__init__(dim, num_heads, **options)
        self.fit(side)

    def fit(self, side: int) -> None:
        """Makes a new table, for maps of ``side`` x ``side`` cells."""
        self.side = side
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, H: int, W: int) -> Tensor:
        table = self.relative_position_bias_table.t().unflatten(1, (2 * self.side - 1, -1))  # (heads, rows, columns), from -(side - 1)
        # A traced graph always interpolates, even to the same size: without a branch on H and W, one graph serves every size.
        if torch.compiler.is_compiling() or not H == W == self.side:
            table = F.interpolate(table[None], (2 * H - 1, 2 * W - 1), mode="bicubic", align_corners=False)[0]
        rows, columns = torch.arange(H, device=table.device), torch.arange(W, device=table.device)
        row, column = rows[:, None] - rows + H - 1, columns[:, None] - columns + W - 1  # (H, H) and (W, W), from 0
        return table[:, row[:, None, :, None], column[:, None]].flatten(3).flatten(1, 2)


class WindowAttention(SelfAttention):
    """W-MSA, self-attention inside windows of 7 x 7 cells (Swin, arXiv 2103.14030), without shift.

    The map is zero-padded to whole windows on the right and at the bottom; without shift Swin masks none of these cells, and neither
    does Twins.
    """

    window = 7

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, _, C = x.shape
        s, nh, nw = self.window, *self._windows(H, W)
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, nw * s - W, 0, nh * s - H))
        windows = x.reshape(B, nh, s, nw, s, C).transpose(2, 3).reshape(B * nh * nw, s * s, C)
        y = super().forward(windows, s, s).reshape(B, nh, nw, s, s, C)
        return y.transpose(2, 3).reshape(B, nh * s, nw * s, C)[:, :H, :W].flatten(1, 2)

    def _windows(self, H: int, W: int) -> tuple[int, int]:
        return (H + self.window - 1) // self.window, (W + self.window - 1) // self.window

    def flops(self, H: int, W: int) -> int:
        nh, nw = self._windows(H, W)
        return nh * nw * super().flops(self.window, self.window)


class SRA(nn.Module):
    """Spatial reduction attention (PVT, arXiv 2102.12122): keys and values are of a map that a convolution with stride ``ratio`` reduces.

    With a ratio of 1 there is no convolution. The map is zero-padded to a multiple of the ratio on the right and at the bottom, where PVT
    would leave the last cells out.

    Raises:
        ValueError: the heads do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int, ratio: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.ratio, self.attn_drop = _checked_heads(dim, num_heads), ratio, attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        if ratio > 1:
            self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio)
            self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        (q,) = _heads(self.q(x), 1, self.num_heads)
        k, v = _heads(self.kv(self._reduced(x, H, W)), 2, self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop * self.training)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _reduced(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B, H * W, dim) -> (B, cells of the reduced map, dim)."""
        if self.ratio == 1:
            return x
        map = ops.pad_to_multiple(x.transpose(1, 2).unflatten(2, (H, W)), self.ratio)
        return self.norm(self.sr(map).flatten(2).transpose(1, 2))

    def flops(self, H: int, W: int) -> int:
        N, M, D = H * W, -(-H // self.ratio) * -(-W // self.ratio), self.proj.in_features
        reduction = M * D * (self.ratio**2 * D + 1) if self.ratio > 1 else 0  # a LayerNorm counts one per value
        return reduction + 2 * N * D**2 + 2 * M * D**2 + 2 * N * M * D


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, N, parts * heads * d) -> as many tensors (B, heads, N, d)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _checked_heads(dim: int, num_heads: int) -> int:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{dim} channels must be a positive multiple of num_heads={num_heads}")
    return num_heads
