# SPDX-License-Identifier: Apache-2.0
"""HiLo attention, the layer of LITv2 ("Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213).

One layer, two kinds of heads over the same map of tokens:

* Hi-Fi heads see fine local detail: self-attention inside non-overlapping s x s windows.
* Lo-Fi heads see the whole picture at low resolution: every position attends to the s x s average-pooled map.

This file depends only on torch, so it can be copied into another project:

    >>> import torch
    >>> from hilo import HiLo, HiLo2d
    >>> hilo = HiLo(dim=384, num_heads=12, window_size=2, alpha=0.5)
    >>> hilo(torch.randn(64, 14 * 14, 384), H=14, W=14).shape  # tokens
    torch.Size([64, 196, 384])
    >>> hilo(torch.randn(64, 14, 14, 384)).shape  # a channels-last map
    torch.Size([64, 14, 14, 384])
    >>> HiLo2d(dim=384, num_heads=12)(torch.randn(64, 384, 14, 14)).shape  # a map as convolutions take it
    torch.Size([64, 384, 14, 14])
    >>> hilo.flops(14, 14)
    83467776
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HiLo", "HiLo2d", "HiLoWeights"]


class HiLoWeights(NamedTuple):
    """The attention of both branches before dropout; None for a branch without heads. Rows are queries and sum to 1."""

    hifi: Tensor | None  # (B, windows, h_heads, sh * sw, sh * sw), windows and their cells in row-major order, without extra tokens
    lofi: Tensor | None  # (B, l_heads, E + H * W, E + M), the E extra tokens, then M pooled cells in row-major order


class _Tokens(NamedTuple):
    extra: Tensor  # (B, E, dim)
    map: Tensor  # (B, H, W, dim)


class HiLo(nn.Module):
    """Attention that assigns some heads to local windows (Hi-Fi) and the others to a pooled global view (Lo-Fi).

    Args:
        dim: channels of the input and of the output.
        num_heads: total number of heads in both branches; each has ``dim // num_heads`` channels.
        qkv_bias: whether the query, key and value projections have a bias (the output projections always do).
        qk_scale: scale of the attention logits; None for ``head_dim ** -0.5``.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate of the output.
        window_size: side s of the windows and of the pooling, or (sh, sw). 1 is plain multi-head self-attention:
            all heads are Lo-Fi, ``alpha`` is ignored and nothing is pooled, unless ``pool_size`` is given.
        alpha: share of the heads assigned to Lo-Fi, in [0, 1]: ``int(num_heads * alpha)`` heads. 0 is Hi-Fi only, 1 is Lo-Fi only.
        pool_size: side p of the pooling, or (ph, pw), where it is not that of the windows.
        mask_padding: whether the cells that the layer itself pads are left out. The paper lets both branches treat them like any others.

    Each branch zero-pads the map on the right and at the bottom to whole windows or pooled cells, so that H and W can be any size.

    Raises:
        ValueError: an argument is out of range, or in the place of another.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_scale: float | None = None, attn_drop: float = 0.0,
        proj_drop: float = 0.0, window_size: int | Sequence[int] = 2, alpha: float = 0.5, *,
        pool_size: int | Sequence[int] | None = None, mask_padding: bool = False,
    ):  # fmt: skip
        super().__init__()
        if not isinstance(qkv_bias, bool):
            raise self._error(f"qkv_bias={qkv_bias!r} must be True or False; write window_size={qkv_bias!r} if that was meant")
        if qk_scale is not None and not (_is_number(qk_scale) and qk_scale > 0):
            raise self._error(f"qk_scale={qk_scale!r} must be None or a positive number")
        if not (_is_number(dim, whole=True) and _is_number(num_heads, whole=True) and dim % num_heads == 0):
            raise self._error(f"dim={dim!r} must be a positive multiple of num_heads={num_heads!r}")
        for name, share in dict(attn_drop=attn_drop, proj_drop=proj_drop, alpha=alpha).items():
            if not (_is_number(share) and 0 <= share <= 1):
                raise self._error(f"{name}={share!r} must be a number in [0, 1]")
        self.dim, self.num_heads, self.head_dim, self.alpha, self.mask_padding = dim, num_heads, dim // num_heads, alpha, mask_padding
        self.window = self._pair("window_size", window_size)
        self.pool = self.window if pool_size is None else self._pair("pool_size", pool_size)
        self.window_size = self.window[0] if self.window[0] == self.window[1] else self.window
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.l_heads = num_heads if self.window == (1, 1) else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        self.l_dim, self.h_dim = self.l_heads * self.head_dim, self.h_heads * self.head_dim
        if self.l_heads:
            self.l_q = nn.Linear(dim, self.l_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * self.l_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(self.l_dim, self.l_dim)
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * self.h_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(self.h_dim, self.h_dim)
        self.attn_drop, self.proj_drop = attn_drop, nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, H: int | None = None, W: int | None = None, *, context: Tensor | None = None, pos: Tensor | None = None,
        context_pos: Tensor | None = None, mask: Tensor | None = None, extra_tokens: int = 0, need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, HiLoWeights]:  # fmt: skip
        """Attends from x to itself, or to a context.

        Args:
            x: tokens (B, H * W, dim) in row-major order, with H and W, or a map (B, H, W, dim).
            context: a map (B, rows, columns, dim) that keys and values are computed from instead of x. Hi-Fi attends from each window of
                x to that of the context at its place, so that with Hi-Fi heads it must have the size of x.
            pos: a positional term of the shape of x (or a batch of 1) that is added for queries and keys, but not for values.
            context_pos: the same of the context, for keys.
            mask: (B, rows, columns) or a batch of 1, True for the valid cells of what is attended to; the others are left out of windows,
                averages and attention. Outputs at invalid cells, and of windows or maps without a valid one, are finite but mean nothing.
            extra_tokens: number E of leading tokens that are no cells of the map, such as a class token: x is (B, E + H * W, dim). In
                Hi-Fi they are a window of their own; in Lo-Fi they attend to all pooled cells and to each other, and cells attend to them.
            need_weights: whether to return the attention, too.

        Returns:
            A tensor of the shape of x, Hi-Fi channels first; with ``need_weights`` also ``HiLoWeights``.

        Raises:
            ValueError: the shape of an argument does not fit.
        """
        if not isinstance(extra_tokens, int) or extra_tokens < 0:
            raise self._error(f"extra_tokens={extra_tokens!r} must be an integer of at least 0, the number of tokens that are no cells")
        value = self._tokens("x", x, H, W, extra_tokens)
        query = key = value if pos is None else self._add("pos", value, pos)
        context = None if context is x and pos is context_pos is None else context  # one product then serves queries, keys and values
        if context is not None:  # extra tokens are of x, also as keys and values
            seen = self._tokens("context", context, None, None, batches=x.shape[:1])
            placed = seen if context_pos is None else self._add("context_pos", seen, context_pos)
            key, value = _Tokens(query.extra, placed.map), _Tokens(value.extra, seen.map)
            key = value if pos is None and context_pos is None else key
        elif context_pos is not None:
            raise self._error("context_pos is the position of a context, but there is none; that of x is pos")
        if self.h_heads and query.map.shape[1:3] != key.map.shape[1:3]:
            sizes = f"context is {tuple(key.map.shape)}, expected the H and W of x {tuple(query.map.shape)}"
            raise self._error(f"{sizes}, as Hi-Fi's windows lie over each other; resize it, or leave Hi-Fi out (alpha=1)")
        if mask is not None:  # nobody reads what is at invalid cells, NaN included
            if mask.dtype != torch.bool or mask.shape not in (key.map.shape[:3], (1, *key.map.shape[1:3])):
                raise self._error(f"mask is {tuple(mask.shape)} of {mask.dtype}, expected {tuple(key.map.shape[:3])} of torch.bool")
            valid = {id(y): y._replace(map=y.map.masked_fill(~mask[..., None], 0)) for y in (key, value)}
            query, key, value = (valid.get(id(y), y) for y in (query, key, value))
        elif self.mask_padding:
            mask = torch.ones((), dtype=torch.bool, device=x.device).expand(1, *key.map.shape[1:3])

        hifi, h_weights = self._hifi(query, key, value, mask, need_weights) if self.h_heads else (None, None)
        lofi, l_weights = self._lofi(query, key, value, mask, need_weights) if self.l_heads else (None, None)
        parts = [part for part in (hifi, lofi) if part is not None]
        out = self.proj_drop((torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).reshape(x.shape))
        return (out, HiLoWeights(h_weights, l_weights)) if need_weights else out

    def _hifi(self, query: _Tokens, key: _Tokens, value: _Tokens, mask: Tensor | None, need_weights: bool):
        """Attention inside each window (section 3.2, "high-frequency attention") -> (B, E + H * W, h_dim) and its weights."""
        (sh, sw), (B, H, W), heads, d = self.window, query.map.shape[:3], self.h_heads, self.head_dim
        nh, nw = (H + sh - 1) // sh, (W + sw - 1) // sw

        def windows(x: Tensor, heads: int, d: int) -> Tensor:
            """(B, nh * sh, nw * sw, heads * d) -> (B * nh * nw, heads, sh * sw, d)."""
            return x.view(B, nh, sh, nw, sw, heads, d).permute(0, 1, 3, 5, 2, 4, 6).reshape(B * nh * nw, heads, sh * sw, d)

        q, k, v = (windows(x, heads, d) for x in _parts(self.h_qkv, (query, key, value), lambda x: _fit(x.map, nh * sh, nw * sw)))
        if mask is not None:
            mask = windows(_fit(mask[..., None].expand(B, H, W, 1), nh * sh, nw * sw, value=not self.mask_padding), 1, 1).mT
        # Torch's fused kernels on CUDA take at most 65535 sequences, and work on tiles of 128 tokens, where a window has sh * sw.
        y, weights = self._attention(q, k, v, mask, written_out=need_weights or q.is_cuda)
        y = y.reshape(B, nh, nw, heads, sh, sw, d).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, nh * sh, nw * sw, self.h_dim)
        y = _fit(y, H, W).flatten(1, 2)
        if query.extra.shape[1]:
            q, k, v = (_split(x, heads) for x in _parts(self.h_qkv, (query, key, value), lambda x: x.extra))
            y = torch.cat((self._attention(q, k, v)[0].transpose(1, 2).flatten(2), y), dim=1)
        return self.h_proj(y), None if weights is None else weights.unflatten(0, (B, nh * nw))

    def _lofi(self, query: _Tokens, key: _Tokens, value: _Tokens, mask: Tensor | None, need_weights: bool):
        """Attention from every position to the pooled map ("low-frequency attention") -> (B, E + H * W, l_dim) and its weights."""
        if mask is not None:  # the share of each pooled cell that is valid
            share = _average(mask[..., None].to(query.map.dtype), self.pool, padding=not self.mask_padding)

        def pooled(x: _Tokens) -> Tensor:
            """The extra tokens, then the averages over valid cells: (B, E + M, dim)."""
            return _join(x.extra, _average(x.map, self.pool) if mask is None else _average(x.map, self.pool) / share.clamp(min=1e-6))

        q = _split(self.l_q(_join(query.extra, query.map)), self.l_heads)
        k, v = (_split(x, self.l_heads) for x in _parts(self.l_kv, (key, value), pooled))
        if mask is not None:
            mask = F.pad(share.flatten(1) > 0, (query.extra.shape[1], 0), value=True)[:, None, None]
        y, weights = self._attention(q, k, v, mask, written_out=need_weights)
        return self.l_proj(y.transpose(1, 2).flatten(2)), weights

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, written_out: bool = False):
        """(B, heads, N, d), (B, heads, M, d), mask of (B, heads, N, M) or less -> (B, heads, N, d), and the weights if written out."""
        if mask is not None:
            mask = mask | ~mask.any(dim=-1, keepdim=True)  # where nothing is valid, all is: a mean, not NaN
        if not written_out:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.attn_drop * self.training, scale=self.scale), None
        logits = q * self.scale @ k.mT
        weights = (logits if mask is None else logits.masked_fill(~mask, float("-inf"))).softmax(-1)
        return F.dropout(weights, self.attn_drop, self.training) @ v, weights

    def _tokens(self, name: str, x: Tensor, H: int | None, W: int | None, extra: int = 0, batches: Sequence[int] = ()) -> _Tokens:
        """Takes tokens (B, extra + H * W, dim) or a map (B, H, W, dim) apart, with the batch size, if given, one of ``batches``."""
        tokens, maps = (f"{extra} + H * W", "") if extra else ("H * W", " or a map (B, H, W, dim)")
        if x.dim() not in ((3,) if extra else (3, 4)) or x.shape[-1] != self.dim:
            raise self._error(f"{name} has shape {tuple(x.shape)}, expected (B, {tokens}, dim){maps} with dim={self.dim}")
        if batches and x.shape[0] not in batches:
            raise self._error(f"{name} has a batch of {x.shape[0]}, expected {' or '.join(map(str, batches))}")
        if x.dim() == 4:
            if (H, W) not in ((None, None), tuple(x.shape[1:3])):
                raise self._error(f"{name} is a map of {x.shape[1]} x {x.shape[2]} cells, expected {H} x {W}")
            H, W, x = *x.shape[1:3], x.flatten(1, 2)
        elif H is None or W is None or x.shape[1] != extra + H * W:
            raise self._error(f"{name} has {x.shape[1]} tokens, expected {tokens} with H={H} and W={W}{maps}")
        return _Tokens(x[:, :extra], x[:, extra:].unflatten(1, (H, W)))

    def _add(self, name: str, x: _Tokens, pos: Tensor) -> _Tokens:
        term = self._tokens(name, pos, x.map.shape[1], x.map.shape[2], x.extra.shape[1], (1, x.map.shape[0]))
        return _Tokens(x.extra + term.extra, x.map + term.map)

    def _pair(self, name: str, size: int | Sequence[int]) -> tuple[int, int]:
        sides = tuple(size) if isinstance(size, Sequence) else (size, size)
        if len(sides) != 2 or not all(_is_number(side, whole=True) for side in sides):
            raise self._error(f"{name}={size!r} must be an integer of at least 1, or two for rows and columns")
        return int(sides[0]), int(sides[1])

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {message}")

    def flops(self, H: int, W: int, context_size: tuple[int, int] | None = None, extra_tokens: int = 0) -> int:
        """Returns the multiply-adds for one H x W map, counted as in the paper: padded cells included, softmax and pooling not."""
        (sh, sw), (ph, pw), (Hc, Wc), E = self.window, self.pool, context_size or (H, W), extra_tokens
        windows, M = -(-H // sh) * -(-W // sw), -(-Hc // ph) * -(-Wc // pw)  # M: cells of the pooled map
        N, D, Dh, Dl = windows * sh * sw, self.dim, self.h_dim, self.l_dim
        hifi = 3 * (N + E) * D * Dh + 2 * (windows * (sh * sw) ** 2 + E**2) * Dh + (N + E) * Dh**2
        lofi = (N + E) * D * Dl + 2 * (M + E) * D * Dl + 2 * (N + E) * (M + E) * Dl + (N + E) * Dl**2
        return hifi + lofi

    def extra_repr(self) -> str:
        heads, pool = f"Hi-Fi {self.h_heads}, Lo-Fi {self.l_heads}", "" if self.pool == self.window else f", pool_size={self.pool}"
        return f"dim={self.dim}, heads=({heads}), window_size={self.window_size}, alpha={self.alpha}{pool}"


class HiLo2d(HiLo):
    """``HiLo`` over maps (B, dim, H, W) of any memory format, as convolutions take them, with its arguments and parameters.

    The result is in the channels-last memory format, also the faster one to come in.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, *, context: Tensor | None = None, pos: Tensor | None = None, context_pos: Tensor | None = None,
        mask: Tensor | None = None, need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, HiLoWeights]:  # fmt: skip
        """As ``HiLo.forward``, with x, context, pos and context_pos as maps (B, dim, H, W). Extra tokens have no place in a map."""
        maps: dict[str, Any] = dict(x=x, context=context, pos=pos, context_pos=context_pos)
        for name, value in maps.items():
            if value is not None and (value.dim() != 4 or value.shape[1] != self.dim):
                raise self._error(f"{name} must have shape (B, {self.dim}, H, W), got {tuple(value.shape)}; HiLo takes (B, H, W, dim)")
            maps[name] = None if value is None else value.permute(0, 2, 3, 1)
        maps["context"] = maps["x"] if context is x else maps["context"]
        out = super().forward(**maps, mask=mask, need_weights=need_weights)
        return (out[0].permute(0, 3, 1, 2), out[1]) if isinstance(out, tuple) else out.permute(0, 3, 1, 2)


def _is_number(value: Any, whole: bool = False) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and (not whole or (isinstance(value, Integral) and int(value) >= 1))


def _parts(linear: nn.Module, inputs: Sequence[_Tokens], prepare: Callable[[_Tokens], Tensor]) -> Sequence[Tensor]:
    """Equal parts of a linear layer's output, each from an input of its own; one product where they are the same."""
    if all(x is inputs[0] for x in inputs):
        return linear(prepare(inputs[0])).chunk(len(inputs), dim=-1)
    if type(linear) is not nn.Linear:  # one that was put in its place: only it knows what it computes
        return [linear(prepare(x)).chunk(len(inputs), dim=-1)[i] for i, x in enumerate(inputs)]
    weights, biases = linear.weight.chunk(len(inputs)), [None] * len(inputs) if linear.bias is None else linear.bias.chunk(len(inputs))
    return [F.linear(prepare(x), weight, bias) for x, weight, bias in zip(inputs, weights, biases)]


def _fit(x: Tensor, H: int, W: int, value: bool = False) -> Tensor:
    """(B, h, w, C) -> (B, H, W, C), padded with zeros, or ``value``, or cropped, on the right and at the bottom."""
    # A traced graph always pads, even by 0: without a branch on H and W, one graph serves every size. A negative pad crops.
    same = not torch.compiler.is_compiling() and x.shape[1:3] == (H, W)
    return x if same else F.pad(x, (0, 0, 0, W - x.shape[2], 0, H - x.shape[1]), value=value)


def _average(x: Tensor, size: tuple[int, int], padding: bool = False) -> Tensor:
    """(B, H, W, C) -> (B, ceil(H / rows), ceil(W / columns), C). The permuted view costs nothing and pooling keeps the layout."""
    H, W = ((n + side - 1) // side * side for n, side in zip(x.shape[1:3], size))
    return x if size == (1, 1) else F.avg_pool2d(_fit(x, H, W, padding).permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def _join(extra: Tensor, map: Tensor) -> Tensor:
    """(B, E, C), (B, H, W, C) -> (B, E + H * W, C)."""
    return torch.cat((extra, map.flatten(1, 2)), dim=1) if extra.shape[1] else map.flatten(1, 2)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
