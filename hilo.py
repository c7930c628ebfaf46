"""HiLo attention, the layer of LITv2 ("Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213).

One layer, two kinds of heads over the same map of tokens:

* Hi-Fi heads see fine local detail: self-attention inside non-overlapping s x s windows.
* Lo-Fi heads see the whole picture at low resolution: every position attends to the s x s average-pooled map.

This file depends only on torch, so it can be copied into another project:

    >>> import torch
    >>> from hilo import HiLo
    >>> hilo = HiLo(dim=384, num_heads=12, window_size=2, alpha=0.5)
    >>> hilo(torch.randn(64, 14 * 14, 384), H=14, W=14).shape
    torch.Size([64, 196, 384])
    >>> hilo.flops(14, 14)
    83467776
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HiLo"]


class HiLo(nn.Module):
    """Attention that assigns some heads to local windows (Hi-Fi) and the others to a pooled global view (Lo-Fi).

    Args:
        dim: channels of the input and of the output.
        num_heads: total number of heads in both branches; each has ``dim // num_heads`` channels.
        qkv_bias: whether the query, key and value projections have a bias (the output projections always do).
        qk_scale: scale of the attention logits; None for ``head_dim ** -0.5``.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        window_size: side s of the windows and of the pooling. 1 is plain multi-head self-attention:
            all heads are Lo-Fi, nothing is pooled and ``alpha`` is ignored.
        alpha: share of the heads assigned to Lo-Fi, in [0, 1]: ``int(num_heads * alpha)`` heads. 0 is Hi-Fi only, 1 is Lo-Fi only.

    Shape:
        ``x`` (B, H * W, dim) in row-major order -> (B, H * W, dim), Hi-Fi channels first. H and W can be any size: if they
        are not multiples of the window size, the map is zero-padded on the right and at the bottom, both branches treat the
        padded cells like any others (no mask), and the result is cropped.

    Raises:
        ValueError: an argument is out of range, or the shape of the input is not (B, H * W, dim).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: int = 2,
        alpha: float = 0.5,
    ):
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"HiLo: dim={dim} must be a positive multiple of num_heads={num_heads}")
        if window_size < 1 or window_size != int(window_size):
            raise ValueError(f"HiLo: window_size={window_size} must be an integer of at least 1")
        if not 0 <= alpha <= 1:
            raise ValueError(f"HiLo: alpha={alpha} must lie in [0, 1]: it is the share of the heads assigned to Lo-Fi")

        self.dim = dim
        self.num_heads = num_heads
        self.window_size = int(window_size)
        self.alpha = alpha
        self.head_dim = dim // num_heads
        self.scale = qk_scale or self.head_dim**-0.5
        self.l_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim = self.l_heads * self.head_dim
        self.h_dim = self.h_heads * self.head_dim

        if self.l_heads:
            self.l_q = nn.Linear(dim, self.l_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim)
        self.attn_drop = attn_drop
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        if x.dim() != 3:
            raise ValueError(f"HiLo: x must have shape (B, H * W, dim), got {tuple(x.shape)}")
        if x.shape[2] != self.dim:
            raise ValueError(f"HiLo: the last dimension of x is {x.shape[2]} (shape {tuple(x.shape)}), expected dim={self.dim}")
        if x.shape[1] != H * W:
            raise ValueError(f"HiLo: x has {x.shape[1]} tokens, but H * W = {H} * {W} = {H * W}")

        # Pad the map to nh x nw whole windows.
        s, B, C = self.window_size, x.shape[0], x.shape[2]
        nh, nw = (H + s - 1) // s, (W + s - 1) // s
        x = x.reshape(B, H, W, C)
        # A traced graph always pads, even by 0: without a branch on H and W, one graph serves every size.
        padded = torch.compiler.is_compiling() or (nh * s, nw * s) != (H, W)
        if padded:
            x = F.pad(x, (0, 0, 0, nw * s - W, 0, nh * s - H))

        if not self.l_heads:
            out = self._hifi(x, nh, nw)
        elif not self.h_heads:
            out = self._lofi(x, nh, nw)
        else:
            out = torch.cat((self._hifi(x, nh, nw), self._lofi(x, nh, nw)), dim=-1)
        if padded:
            out = F.pad(out, (0, 0, 0, W - nw * s, 0, H - nh * s))  # a negative pad crops
        return self.proj_drop(out.reshape(B, H * W, C))

    def _hifi(self, x: Tensor, nh: int, nw: int) -> Tensor:
        """Attention inside each window (section 3.2, "high-frequency attention"). (B, nh*s, nw*s, dim) -> (..., h_dim)."""
        s, B, heads, d = self.window_size, x.shape[0], self.h_heads, self.head_dim
        qkv = self.h_qkv(x).reshape(B, nh, s, nw, s, 3, heads, d)
        qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B * nh * nw, heads, s * s, d)
        attention = self._products if x.device.type == "cuda" else self._attention
        y = attention(*qkv.unbind(0))  # (B*nh*nw, heads, s*s, d)
        y = y.reshape(B, nh, nw, heads, s, s, d).permute(0, 1, 4, 2, 5, 3, 6)
        return self.h_proj(y.reshape(B, nh * s, nw * s, self.h_dim))

    def _lofi(self, x: Tensor, nh: int, nw: int) -> Tensor:
        """Attention from every position to the pooled map ("low-frequency attention"). (B, nh*s, nw*s, dim) -> (..., l_dim)."""
        s, B, heads, d = self.window_size, x.shape[0], self.l_heads, self.head_dim
        q = self.l_q(x).reshape(B, nh * s * nw * s, heads, d).transpose(1, 2)  # (B, heads, N, d)
        if s > 1:
            # The tokens are channels-last already; the permuted view costs nothing and pooling keeps the layout.
            x = F.avg_pool2d(x.permute(0, 3, 1, 2), s).permute(0, 2, 3, 1)  # (B, nh, nw, dim)
        k, v = self.l_kv(x).reshape(B, nh * nw, 2, heads, d).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, M, d)
        y = self._attention(q, k, v).transpose(1, 2)  # (B, N, heads, d)
        return self.l_proj(y.reshape(B, nh * s, nw * s, self.l_dim))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        drop = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)

    def _products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``_attention`` written out, for windows on CUDA. Torch's fused kernels there take at most 65535 sequences, and work on
        tiles of 128 tokens, where a window has s * s."""
        weights = (q * self.scale @ k.mT).softmax(-1)
        return F.dropout(weights, self.attn_drop, self.training) @ v

    def flops(self, H: int, W: int) -> int:
        """Returns the multiply-adds for one H x W map, counted as in the paper: padded cells included, softmax and pooling not."""
        s = self.window_size
        M = -(-H // s) * -(-W // s)  # windows, and cells of the pooled map
        N = M * s * s
        D, Dh, Dl = self.dim, self.h_dim, self.l_dim
        hifi = 3 * N * D * Dh + M * s**4 * Dh * 2 + N * Dh**2
        lofi = N * D * Dl + 2 * M * D * Dl + 2 * N * M * Dl + N * Dl**2
        return hifi + lofi

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads=(Hi-Fi {self.h_heads}, Lo-Fi {self.l_heads}), window_size={self.window_size}, alpha={self.alpha}"
