# SPDX-License-Identifier: Apache-2.0
"""The fourteen attention layers of the paper's single-layer benchmark, behind one interface.

``layer(x, H, W)`` maps x (B, H * W, dim), in row-major order, to the same shape; ``layer.flops(H, W)`` returns the multiply-adds for one
map. ``LAYERS`` names and builds the layers and holds the figures that the release published for dim 768, 12 heads and 14 x 14 tokens.
Each layer has its authors' hyperparameters for the stage of 14 x 14 tokens. A layer is timm's if timm has it.

Multiply-adds are counted like the release's (with fvcore), so that they can be compared with its table: matrix products and convolutions
without biases, 5 per element of an affine normalisation and 4 per bilinearly sampled element; softmax, pooling, gates and other
element-wise operations are not counted. ``torch.utils.flop_counter`` counts only products and convolutions; if its number for a layer
differs, the layer's docstring says by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm.layers
import torch
import torch.nn.functional as F
from timm.models import pvt_v2, swin_transformer, xcit
from torch import Tensor, nn

from hilo import HiLo

Size = tuple[int, int]


def to_map(x: Tensor, H: int, W: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a channels-last view."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], H, W)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def pad(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) with zeros on the right and at the bottom, up to whole h x w windows."""
    bottom, right = -x.shape[1] % h, -x.shape[2] % w
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x


def to_windows(x: Tensor, h: int, w: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, h * w, C), windows row by row."""
    B, H, W, C = x.shape
    return x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3).reshape(-1, h * w, C)


def from_windows(x: Tensor, H: int, W: int, h: int, w: int) -> Tensor:
    """The inverse of ``to_windows``."""
    return x.reshape(-1, H // h, W // w, h, w, x.shape[-1]).transpose(2, 3).reshape(-1, H, W, x.shape[-1])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """q (B, N, C), k and v (B, M, C), bias that broadcasts to (B, heads, N, M) -> (B, N, C)."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))


class MSA(timm.layers.Attention):
    """Multi-head self-attention between all tokens (ViT, arXiv 2010.11929); timm's."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x)

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.attn_dim
        return 4 * N * D**2 + 2 * N**2 * D


class CrossWindow(nn.Module):
    """CSWin (arXiv 2107.00652): half of the heads attend in stripes over the whole height, the others over the whole width; in addition,
    the values go through a 3 x 3 depthwise convolution inside each stripe (locally enhanced positional encoding)."""

    def __init__(self, dim: int, heads: int, stripe: int = 7):
        super().__init__()
        self.heads, self.stripe = heads // 2, stripe
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = nn.ModuleList(nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2) for _ in range(2))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape
        x = pad(x.reshape(B, H, W, C), self.stripe, self.stripe)
        Hp, Wp = x.shape[1:3]
        qkv = self.qkv(x).unflatten(-1, (3, 2, C // 2))  # (B, Hp, Wp, 3, orientations, C / 2)
        out = []
        for i, (h, w) in enumerate(((Hp, self.stripe), (self.stripe, Wp))):
            q, k, v = to_windows(qkv[..., i, :].flatten(3), h, w).chunk(3, dim=-1)  # (B * stripes, h * w, C / 2)
            y = attend(q, k, v, self.heads) + to_tokens(self.lepe[i](to_map(v, h, w)))
            out.append(from_windows(y, Hp, Wp, h, w)[:, :H, :W])
        return self.proj(torch.cat(out, dim=-1).reshape(B, N, C))

    def flops(self, H: int, W: int) -> int:
        D, s = self.proj.in_features, self.stripe
        Hp, Wp = H + -H % s, W + -W % s
        N = Hp * Wp
        return 3 * N * D**2 + N * s * (Hp + Wp) * D + 9 * N * D + H * W * D**2


class DAT(nn.Module):
    """Deformable attention (arXiv 2201.00520): for each group of heads, a small network shifts the cells at which keys and values are
    sampled from the map by up to one cell; the relative position bias is sampled, also bilinearly, from a table of ``size``.

    Positions are normalised as in the paper, from -1 at the first to 1 at the last cell, so that without offsets the map itself is read.
    ``flops`` counts 5 N C for the normalisation and 4 N C + 4 heads N^2 for sampling tokens and table, which torch's counter misses."""

    def __init__(self, dim: int, heads: int, size: Size, groups: int = 3, kernel: int = 5):
        super().__init__()
        self.heads, self.groups, c = heads, groups, dim // groups
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.offset_conv = nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c)
        self.offset_norm = nn.LayerNorm(c)
        self.offset = nn.Linear(c, 2, bias=False)
        self.bias = nn.Parameter(torch.empty(groups, heads // groups, 2 * size[0] - 1, 2 * size[1] - 1))
        nn.init.trunc_normal_(self.bias, std=0.01)
        last = torch.tensor([size[1] - 1.0, size[0] - 1.0])  # last column and row: positions are (x, y), as in grid_sample
        cells = torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1])).flip(1)
        self.register_buffer("last", last, persistent=False)
        self.register_buffer("cells", cells.to(last), persistent=False)  # (N, 2)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape
        q = self.q(x)
        hidden = self.offset_conv(self._grouped(q, H, W)).permute(0, 2, 3, 1)
        offset = self.offset(F.gelu(self.offset_norm(hidden))).tanh().reshape(-1, N, 2)
        place = self.cells + offset  # (B * groups, N, 2), in cells
        grid = (2 * place / self.last - 1).reshape(-1, H, W, 2)
        sampled = F.grid_sample(self._grouped(x, H, W), grid, align_corners=True).reshape(B, C, N).transpose(1, 2)
        distance = (self.cells[:, None] - place[:, None]) / self.last  # (B * groups, queries, keys, 2), in [-1, 1]
        table = self.bias.expand(B, -1, -1, -1, -1).flatten(0, 1)
        bias = F.grid_sample(table, distance, align_corners=True).reshape(B, self.heads, N, N)
        return self.proj(attend(q, self.k(sampled), self.v(sampled), self.heads, bias))

    def _grouped(self, x: Tensor, H: int, W: int) -> Tensor:
        """(B, H * W, C) -> (B * groups, C / groups, H, W)."""
        return to_map(split_heads(x, self.groups).flatten(0, 1), H, W)

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj.in_features
        offsets = self.offset_conv.weight[0].numel() * N * D + 5 * N * D + 2 * N * D
        return 4 * N * D**2 + 2 * N**2 * D + offsets + 4 * N * D + 4 * self.heads * N**2


class Performer(nn.Module):
    """FAVOR+ (arXiv 2009.14794): softmax attention by positive orthogonal random features, linear in the number of tokens.

    ``flops`` counts, as fvcore does, half a multiply-add for each division of an output by its normaliser; torch's counter does not."""

    def __init__(self, dim: int, heads: int, features: int = 256):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("directions", self.orthogonal(features, dim // heads))

    @staticmethod
    def orthogonal(features: int, d: int) -> Tensor:
        """Returns blocks of d orthogonal rows with the norms of rows of a Gaussian matrix: (features, d)."""
        q, r = torch.linalg.qr(torch.randn(-(-features // d), d, d))
        q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)  # otherwise the directions are not uniform
        return q.flatten(0, 1)[:features] * torch.randn(features, d).norm(dim=1, keepdim=True)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self._features(q, largest=(-1,)), self._features(k, largest=(-2, -1))  # (B, heads, N, features)
        y = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(dim=-2).unsqueeze(-1))
        return self.proj(merge_heads(y))

    def _features(self, x: Tensor, largest: tuple[int, ...]) -> Tensor:
        """phi with exp(q k / sqrt(d)) = E[phi(q) phi(k)], up to a factor that the normaliser removes: the largest exponent is 0."""
        x = x * x.shape[-1] ** -0.25
        exponent = x @ self.directions.T - x.square().sum(-1, keepdim=True) / 2
        return (exponent - exponent.amax(largest, keepdim=True)).exp() + 1e-6

    def flops(self, H: int, W: int) -> int:
        N, D, m = H * W, self.proj.in_features, len(self.directions)
        return 4 * N * D**2 + 4 * N * m * D + self.heads * N * m + N * D // 2


class Linformer(nn.Module):
    """Linformer (arXiv 2006.04768): learned matrices project the keys and the values of all ``tokens`` to ``rank`` of them.

    The release used the default rank of its source, 256, which exceeds its 196 tokens and thus saves nothing."""

    def __init__(self, dim: int, heads: int, tokens: int, rank: int = 256):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.k_mix, self.v_mix = (nn.Parameter(torch.empty(rank, tokens).uniform_(-(rank**-0.5), rank**-0.5)) for _ in range(2))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(attend(q, self.k_mix @ k, self.v_mix @ v, self.heads))

    def flops(self, H: int, W: int) -> int:
        N, D, rank = H * W, self.proj.in_features, len(self.k_mix)
        return 4 * N * D**2 + 4 * N * rank * D


class SRA(pvt_v2.Attention):
    """Spatial reduction attention (PVT, arXiv 2102.12122): keys and values come from a map reduced by a strided convolution; timm's.

    ``flops`` counts 5 per element of the reduced map for its LayerNorm, which torch's counter misses."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x, (H, W))

    def flops(self, H: int, W: int) -> int:
        N, D, s = H * W, self.dim, self.sr.stride[0] if self.sr else 1
        M = (H // s) * (W // s)
        reduction = M * s**2 * D**2 + 5 * M * D if self.sr else 0
        return 2 * N * D**2 + 2 * M * D**2 + 2 * N * M * D + reduction


class Window(nn.Module):
    """Attention inside windows with a relative position bias (Swin, arXiv 2103.14030); timm's, with the fused kernel.

    With ``shift``, the map is rolled first and cells that were not neighbours are masked; this works only for maps of ``size``. The
    release timed these layers without the bias (2 k parameters, no multiply-adds)."""

    def __init__(self, dim: int, heads: int, size: Size | None = None, window: int = 7, shift: int = 0):
        super().__init__()
        self.window, self.shift = window, shift if size and min(size) > window else 0
        self.attention = swin_transformer.WindowAttention(dim, heads, window_size=window)
        self.attention.fused_attn = True
        self.register_buffer("mask", self._mask(*size) if self.shift else None, persistent=False)

    def _mask(self, H: int, W: int) -> Tensor:
        """(windows, window^2, window^2): minus infinity between parts of a window that come from opposite edges of the map."""
        s, sides = self.window, (H + -H % self.window, W + -W % self.window)
        parts = [(torch.arange(side) >= side - s).int() + (torch.arange(side) >= side - self.shift).int() for side in sides]
        part = to_windows((3 * parts[0][:, None] + parts[1])[None, :, :, None], s, s)  # (windows, window^2, 1)
        return torch.zeros(len(part), s**2, s**2).masked_fill(part != part.transpose(1, 2), float("-inf"))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape
        x, s = pad(x.reshape(B, H, W, C), self.window, self.window), self.window
        Hp, Wp = x.shape[1:3]
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        x = from_windows(self.attention(to_windows(x, s, s), self.mask), Hp, Wp, s, s)
        if self.shift:
            x = x.roll((self.shift, self.shift), dims=(1, 2))
        return x[:, :H, :W].reshape(B, N, C)

    def flops(self, H: int, W: int) -> int:
        D, s = self.attention.dim, self.window
        N = (H + -H % s) * (W + -W % s)
        return 4 * N * D**2 + 2 * N * s**2 * D


class Focal(nn.Module):
    """Focal attention with two levels (arXiv 2107.00641), for maps of ``size``: the tokens of a window attend to the window, to the ring
    of ``expand`` cells around it, and to the 3 x 3 windows around it, each pooled to one token with learned weights; all with learned
    position biases.

    As in its authors' code, the ring is read from four rolled maps: it wraps around at the edges of the map, and 4 * 3 of its cells
    occur twice (132 keys for 120 cells)."""

    def __init__(self, dim: int, heads: int, size: Size, window: int = 7, expand: int = 3):
        super().__init__()
        if size[0] % window or size[1] % window:
            raise ValueError(f"Focal: the sides of the map {size} must be multiples of the window size {window}")
        self.size, self.heads, self.window, area = size, heads, window, window**2
        self.qkv, self.proj, self.pool = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(area, 1)
        nn.init.constant_(self.pool.weight, 1 / area)
        nn.init.zeros_(self.pool.bias)

        # The keys of each window, (windows, keys): cells of the map, then its windows, numbered on from H * W.
        cells = torch.arange(size[0] * size[1]).reshape(1, *size, 1)
        own = to_windows(cells, window, window).squeeze(-1)
        rings = []
        for dy, dx in ((-expand, -expand), (-expand, expand), (expand, -expand), (expand, expand)):
            rolled = to_windows(cells.roll((dy, dx), dims=(1, 2)), window, window).squeeze(-1)
            y, x = torch.arange(window) - dy, torch.arange(window) - dx
            inside = ((y >= 0) & (y < window))[:, None] & ((x >= 0) & (x < window))
            rings.append(rolled[:, ~inside.flatten()])
        nh, nw = size[0] // window, size[1] // window
        around = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
        place = torch.cartesian_prod(torch.arange(nh), torch.arange(nw))[:, None] + around  # (windows, 9, 2)
        outside = ((place < 0) | (place >= torch.tensor([nh, nw]))).any(-1)
        pooled = cells.numel() + (place[..., 0] * nw + place[..., 1]).masked_fill(outside, 0)
        keys = torch.cat((own, *rings, pooled), dim=1)
        mask = torch.zeros(keys.shape).masked_fill(F.pad(outside, (keys.shape[1] - 9, 0)), float("-inf"))
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("mask", mask[:, None, None], persistent=False)  # (windows, 1, 1, keys)

        self.bias_own = nn.Parameter(torch.empty(heads, (2 * window - 1) ** 2))
        self.bias_ring = nn.Parameter(torch.empty(heads, area, keys.shape[1] - area - 9))
        self.bias_pooled = nn.Parameter(torch.empty(heads, (window + 2) ** 2))
        for bias in (self.bias_own, self.bias_ring, self.bias_pooled):
            nn.init.trunc_normal_(bias, std=0.02)
        self.register_buffer("places_own", self._places(window, window), persistent=False)
        self.register_buffer("places_pooled", self._places(window, 3), persistent=False)

    @staticmethod
    def _places(q: int, k: int) -> Tensor:
        """Returns the index into the bias table for each pair of a cell in q x q and one in k x k: (q^2, k^2)."""
        difference = torch.arange(q)[:, None] - torch.arange(k) + k - 1  # (q, k)
        return ((q + k - 1) * difference[:, None, :, None] + difference[None, :, None]).reshape(q**2, k**2)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        if self.size != (H, W):
            raise ValueError(f"Focal: the map is {H} x {W}, but the layer was built for {self.size}")
        B, N, C = x.shape
        windows = to_windows(x.reshape(B, H, W, C), self.window, self.window)
        pooled = self.pool(windows.transpose(1, 2)).reshape(B, -1, C)
        q, k, v = self.qkv(torch.cat((x, pooled), dim=1)).chunk(3, dim=-1)  # (B, N + windows, C)
        q = to_windows(q[:, :N].reshape(B, H, W, C), self.window, self.window)
        k, v = (t[:, self.keys.flatten()].reshape(len(q), -1, C) for t in (k, v))  # (B * windows, keys, C)
        # Windows are merged with the heads, so that one bias serves the whole batch: (B, windows * heads, ...).
        q, k, v = (split_heads(t, self.heads).reshape(B, -1, t.shape[1], C // self.heads) for t in (q, k, v))
        bias = torch.cat((self.bias_own[:, self.places_own], self.bias_ring, self.bias_pooled[:, self.places_pooled]), dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(self.mask + bias).flatten(0, 1))
        y = merge_heads(y.reshape(-1, self.heads, self.window**2, C // self.heads))
        return self.proj(from_windows(y, H, W, self.window, self.window).reshape(B, N, C))

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj.in_features
        windows = N // self.window**2
        return 4 * N * D**2 + 3 * windows * D**2 + N * D + 2 * N * self.keys.shape[1] * D


class XCA(xcit.XCA):
    """Cross-covariance attention (XCiT, arXiv 2106.09681): channels attend to channels; timm's. Without the local patch interaction,
    which is a separate layer in XCiT and is not in the published count."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return super().forward(x)

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj.in_features
        return 4 * N * D**2 + 2 * N * D * (D // self.num_heads)


class QuadTree(nn.Module):
    """QuadTree attention with two levels (arXiv 2201.02767, type B, for even H and W): full attention on the half-size map; then, per
    head, the four tokens of a cell attend to the children of the ``topk`` cells with the highest scores. The two outputs are added with
    learned weights and 3 x 3 depthwise convolutions of the values.

    ``flops`` is the published count. It omits the 2 N 4 topk D of the fine attention (9.6 M compared with 613 M), a custom kernel of its
    authors that fvcore misses but torch's counter sees here, and counts 5 per element of the GroupNorms, which torch's counter misses."""

    def __init__(self, dim: int, heads: int, topk: int = 8):
        super().__init__()
        self.heads, self.topk = heads, topk
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        halve = [nn.GroupNorm(1, dim), nn.GELU(), nn.Conv2d(dim, dim, 2, stride=2), nn.GroupNorm(1, dim), nn.GELU(), nn.Conv2d(dim, dim, 1)]
        self.coarse_value = nn.Sequential(*halve)
        self.lepe = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(2))
        self.weight = nn.Parameter(torch.zeros(2))  # of the coarse and the fine level, before softmax

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        B, N, C = x.shape
        h, w, heads, d = H // 2, W // 2, self.heads, C // self.heads
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q_map, k_map, v_map = (to_map(t, H, W) for t in (q, k, v))
        v_coarse = self.coarse_value(v_map)

        q1, k1, v1 = (split_heads(to_tokens(t), heads) for t in (F.avg_pool2d(q_map, 2), F.avg_pool2d(k_map, 2), v_coarse))
        scores = (q1 @ k1.transpose(-2, -1) * d**-0.5).softmax(dim=-1)  # (B, heads, h * w, h * w)
        coarse = merge_heads(scores @ v1) + to_tokens(self.lepe[0](v_coarse))  # (B, h * w, C)

        best = scores.topk(min(self.topk, h * w), dim=-1).indices.transpose(1, 2)  # (B, h * w, heads, topk)
        children = (best // w * 2 * W + best % w * 2).unsqueeze(-1) + torch.tensor([0, 1, W, W + 1], device=x.device)
        image, head = torch.arange(B, device=x.device).reshape(B, 1, 1, 1), torch.arange(heads, device=x.device).reshape(heads, 1)
        rows = (image * N + children.flatten(3)) * heads + head  # (B, h * w, heads, 4 * topk), of k and v as (B * N * heads, d)
        k0, v0 = (t.reshape(-1, d)[rows].flatten(0, 1) for t in (k, v))  # (B * h * w, heads, 4 * topk, d)
        q0 = split_heads(to_windows(q.reshape(B, H, W, C), 2, 2), heads)  # (B * h * w, heads, 4, d)
        fine = merge_heads(F.scaled_dot_product_attention(q0, k0, v0))  # (B * h * w, 4, C)
        fine = fine + to_windows(self.lepe[1](v_map).permute(0, 2, 3, 1), 2, 2)

        weight = self.weight.softmax(dim=0)
        y = weight[0] * coarse.reshape(-1, 1, C) + weight[1] * fine
        return self.proj(from_windows(y, H, W, 2, 2).reshape(B, N, C))

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj.in_features
        M = N // 4
        values = 4 * M * D**2 + M * D**2 + 5 * (N + M) * D
        return 4 * N * D**2 + 2 * M**2 * D + values + 9 * (N + M) * D


class VAN(nn.Module):
    """Large kernel attention (VAN, arXiv 2202.09741): a depthwise 5 x 5, a dilated depthwise 7 x 7 and a pointwise convolution gate the
    tokens, between two projections and with a residual connection."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in, self.pointwise, self.proj_out = (nn.Linear(dim, dim) for _ in range(3))
        self.near = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.far = nn.Conv2d(dim, dim, 7, padding=9, dilation=3, groups=dim)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        y = F.gelu(self.proj_in(x))
        near = self.near(to_map(y, H, W)).contiguous()  # a dilated depthwise convolution is twice as fast channels-first
        gate = self.pointwise(to_tokens(self.far(near)))
        return x + self.proj_out(y * gate)

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj_out.in_features
        return 3 * N * D**2 + (25 + 49) * N * D


class HorNet(nn.Module):
    """Recursive gated convolution (gnConv of HorNet, arXiv 2207.14284): one 7 x 7 depthwise convolution computes ``order`` gates (of
    dim / 8 to dim channels for order 4), which alternate with projections to the next width."""

    def __init__(self, dim: int, order: int = 4):
        super().__init__()
        self.widths = [dim // 2**i for i in reversed(range(order))]
        self.proj_in, self.proj_out = nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.gates = nn.Conv2d(sum(self.widths), sum(self.widths), 7, padding=3, groups=sum(self.widths))
        self.widen = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths, self.widths[1:]))

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        y, gates = self.proj_in(x).split((self.widths[0], sum(self.widths)), dim=-1)
        first, *others = (to_tokens(self.gates(to_map(gates, H, W))) / 3).split(self.widths, dim=-1)  # the scale 1 / 3 is the authors'
        y = y * first
        for widen, gate in zip(self.widen, others):
            y = widen(y) * gate
        return self.proj_out(y)

    def flops(self, H: int, W: int) -> int:
        N, D = H * W, self.proj_out.in_features
        return N * (3 * D**2 + 49 * sum(self.widths) + sum(a * b for a, b in zip(self.widths, self.widths[1:])))


@dataclass(frozen=True)
class Release:
    name: str
    build: Callable[[int, int, Size], nn.Module]  # of dim, heads and the size of the map
    parameters: float  # published, millions
    flops: float  # published, millions of multiply-adds
    cpu: int  # published images/s, batch 64, Core i9-10900X
    rtx3090: int


DIM, HEADS, SIZE = 768, 12, (14, 14)  # of the published figures
LAYERS = {
    entry.name: entry
    for entry in (
        Release("MSA", lambda dim, heads, size: MSA(dim, heads, qkv_bias=True), 2.36, 521.43, 505, 4403),
        Release("Cross Window", lambda dim, heads, size: CrossWindow(dim, heads), 2.37, 493.28, 325, 4334),
        Release("DAT", DAT, 2.38, 528.69, 223, 3074),
        Release("Performer", lambda dim, heads, size: Performer(dim, heads), 2.36, 617.24, 181, 3180),
        Release("Linformer", lambda dim, heads, size: Linformer(dim, heads, size[0] * size[1]), 2.46, 616.56, 518, 4578),
        Release("SRA", lambda dim, heads, size: SRA(dim, heads, sr_ratio=2), 4.72, 419.56, 710, 4810),
        Release("Local Window", lambda dim, heads, size: Window(dim, heads), 2.36, 477.17, 631, 4537),
        Release("Shifted Window", lambda dim, heads, size: Window(dim, heads, size, shift=3), 2.36, 477.17, 374, 4351),
        Release("Focal", Focal, 2.44, 526.85, 146, 2842),
        Release("XCA", lambda dim, heads, size: XCA(dim, heads, qkv_bias=True), 2.36, 481.69, 583, 4659),
        Release("QuadTree", lambda dim, heads, size: QuadTree(dim, heads), 5.33, 613.25, 72, 3978),
        Release("VAN", lambda dim, heads, size: VAN(dim), 1.83, 357.96, 59, 4213),
        Release("HorNet", lambda dim, heads, size: HorNet(dim), 2.23, 436.51, 132, 3996),
        Release("HiLo", lambda dim, heads, size: HiLo(dim, heads, qkv_bias=True, window_size=2, alpha=0.9), 2.20, 298.30, 1029, 5104),
    )
}
