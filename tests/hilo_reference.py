# SPDX-License-Identifier: Apache-2.0
"""HiLo one sample, window, head and query at a time: slow and obvious, written from the docstrings of hilo.py."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hilo import HiLo


class Slow(NamedTuple):
    """What ``HiLo.forward`` returns with need_weights, and NaN where that means nothing or is not a cell of x."""

    out: Tensor
    hifi: Tensor
    lofi: Tensor


class Seen(NamedTuple):
    """A token that queries attend to: what its key and its value are computed from."""

    key: Tensor
    value: Tensor


def slow_hilo(
    layer: HiLo, x: Tensor, H: int, W: int, *, context: Tensor | None = None, pos: Tensor | None = None,
    context_pos: Tensor | None = None, mask: Tensor | None = None, extra_tokens: int = 0,
) -> Slow:  # fmt: skip
    """As ``layer(x, H, W, ...)``, with x and pos as tokens, the context and its position as maps, in the dtype of the layer."""
    dtype = next(layer.parameters()).dtype
    x, context, pos, context_pos = (None if y is None else y.to(dtype) for y in (x, context, pos, context_pos))
    samples = []
    for b in range(len(x)):
        own = [None if y is None else y[b % len(y)] for y in (context, pos, context_pos, mask)]  # len 1 is for all samples
        samples.append(_sample(layer, x[b], H, W, extra_tokens, *own))
    return Slow(*map(torch.stack, zip(*samples)))


@torch.no_grad()
def _sample(
    layer: HiLo, x: Tensor, H: int, W: int, E: int, context: Tensor | None, pos: Tensor | None, context_pos: Tensor | None,
    mask: Tensor | None,
) -> Slow:  # fmt: skip
    d, h_dim, zero = layer.head_dim, layer.h_heads * layer.head_dim, torch.zeros_like(x[0])
    placed = list(x if pos is None else x + pos)  # the tokens with their positions
    extra = [Seen(placed[n], x[n]) for n in range(E)]
    rows, columns = (H, W) if context is None else context.shape[:2]

    def cell(i: int, j: int) -> Seen | None:
        """A cell of the padded map that is attended to, None where it is left out."""
        if i >= rows or j >= columns:
            return None if layer.mask_padding else Seen(zero, zero)
        if mask is not None and not mask[i, j]:
            return None
        if context is None:
            return Seen(placed[E + i * W + j], x[E + i * W + j])
        return Seen(context[i, j] if context_pos is None else context[i, j] + context_pos[i, j], context[i, j])

    def pooled_cell(cells: list[Seen | None]) -> Seen | None:
        valid = [cell for cell in cells if cell is not None]
        return Seen(*(torch.stack(part).mean(dim=0) for part in zip(*valid))) if valid else None

    def attend(branch: str, head: int, queries: list[int], seen: list[Seen | None]) -> list[tuple[Tensor, Tensor]]:
        """The output of a head and its weights for each query, by its place in x. Keys that are left out have the weight 0."""
        q, k, v = ("h_qkv 0", "h_qkv 1", "h_qkv 2") if branch == "h" else ("l_q 0", "l_kv 0", "l_kv 1")
        keys = {n: _head(layer, k, head, token.key) for n, token in enumerate(seen) if token is not None}
        values = {n: _head(layer, v, head, token.value) for n, token in enumerate(seen) if token is not None}
        results = []
        for query in queries:
            weights, y = x.new_zeros(len(seen)), x.new_zeros(d)
            logits = torch.stack([_head(layer, q, head, placed[query]) @ key * layer.scale for key in keys.values()])
            for weight, n in zip(logits.softmax(dim=0), keys):
                weights[n] = weight
                y = y + weight * values[n]
            results.append((y, weights))
        return results

    (sh, sw), (ph, pw) = layer.window, layer.pool
    windows, pooled = (-(-H // sh), -(-W // sw)), (-(-rows // ph), -(-columns // pw))
    heads = torch.full((len(x), layer.dim), torch.nan, dtype=x.dtype)  # before the output projections
    hifi = torch.full((windows[0] * windows[1], layer.h_heads, sh * sw, sh * sw), torch.nan, dtype=x.dtype)
    lofi = torch.full((layer.l_heads, len(x), E + pooled[0] * pooled[1]), torch.nan, dtype=x.dtype)

    # Queries at invalid cells mean nothing; with a context the mask is that of the context.
    means = {(i, j) for i in range(H) for j in range(W) if context is not None or cell(i, j) is not None}
    for head in range(layer.h_heads):
        columns_of_head = slice(head * d, (head + 1) * d)
        for w, (top, left) in enumerate(product(range(0, windows[0] * sh, sh), range(0, windows[1] * sw, sw))):
            places = [(top + i, left + j) for i in range(sh) for j in range(sw)]
            seen = [cell(i, j) for i, j in places]
            queries = {n: E + i * W + j for n, (i, j) in enumerate(places) if (i, j) in means}
            if any(seen):
                for (n, query), (y, weights) in zip(queries.items(), attend("h", head, list(queries.values()), seen)):
                    heads[query, columns_of_head], hifi[w, head, n] = y, weights
        for n, (y, _) in enumerate(attend("h", head, list(range(E)), extra)):
            heads[n, columns_of_head] = y

    blocks = product(range(0, pooled[0] * ph, ph), range(0, pooled[1] * pw, pw))
    seen = extra + [pooled_cell([cell(top + i, left + j) for i in range(ph) for j in range(pw)]) for top, left in blocks]
    queries = [*range(E), *(E + i * W + j for i, j in sorted(means))]
    for head in range(layer.l_heads if any(seen) else 0):
        for query, (y, weights) in zip(queries, attend("l", head, queries, seen)):
            heads[query, h_dim + head * d : h_dim + (head + 1) * d], lofi[head, query] = y, weights

    hifi_out = [layer.h_proj(heads[:, :h_dim])] if layer.h_heads else []
    lofi_out = [layer.l_proj(heads[:, h_dim:])] if layer.l_heads else []
    return Slow(torch.cat(hifi_out + lofi_out, dim=1), hifi, lofi)


def _head(layer: HiLo, name: str, head: int, x: Tensor) -> Tensor:
    """The query, key or value of a head: its rows of the part ``PROJECTION PART`` of a projection."""
    projection, part = name.split()
    linear: nn.Linear = getattr(layer, projection)
    branch_dim = layer.head_dim * (layer.h_heads if projection[0] == "h" else layer.l_heads)
    start = int(part) * branch_dim + head * layer.head_dim
    own = slice(start, start + layer.head_dim)
    return linear.weight[own] @ x if linear.bias is None else linear.weight[own] @ x + linear.bias[own]
