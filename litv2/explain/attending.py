# SPDX-License-Identifier: Apache-2.0
"""What a position attends to: in each block, and rolled out over the whole network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hilo import HiLo, HiLoWeights

from ..errors import UserError, listed
from ..layers import Block
from .positions import Position, cells_at, positions
from .recording import Attended, Merged, network_of, watched
from .sampling import spread_over_samples

__all__ = ["Attention", "BlockAttention", "attention"]


@dataclass(frozen=True)
class BlockAttention:
    """What one cell per image attends to in one block. The weights of a head sum to 1; a branch without heads is None.

    Attributes:
        block: its name, such as ``layers.2.blocks.0``.
        stride: pixels per token along each side.
        cells: (B, 2), row and column of the cell.
        hifi: (B, heads, sh, sw), over the window that the cell lies in.
        lofi: (B, heads, h, w), over the cells of the pooled map.
        window: (sh, sw), tokens of a window; the first window starts at the first token.
        pool: (ph, pw), tokens of a pooled cell.
    """

    block: str
    stride: int
    cells: Tensor
    hifi: Tensor | None
    lofi: Tensor | None
    window: tuple[int, int]
    pool: tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """What one position per image attends to.

    Attributes:
        at: (B, 2), x and y of the position in pixels.
        blocks: those that have attention, in the order of the network.
        rollout: (B, H, W) on the grid of patches, each patch's share in the cell of the last map at the position; sums to 1.
        patch: pixels per patch along each side.
    """

    at: Tensor
    blocks: list[BlockAttention]
    rollout: Tensor
    patch: int


def attention(model: nn.Module, images: Tensor, at: Position = None) -> Attention:
    """Returns what a position attends to.

    The rollout (Abnar and Zuidema, arXiv 2005.00928) goes from the last map back to the patches: at each attention layer half of a
    cell's share stays, for the residual connection, and half goes where its heads attend on average: a pooled cell's to the tokens that
    it averages. At a token merging it goes to the tokens that are sampled, where they are sampled. Feed-forward networks, and with them
    their 3 x 3 convolutions, are left out, and shares that go to padding are dropped.

    Args:
        model: a LITv2, or a model with one as its backbone. Any mode; it is as before afterwards.
        images: (B, C, H, W), normalised.
        at: as in ``positions``, whose errors are raised, too.
    """
    network = network_of(model)
    chosen = positions(network, images, at)
    blocks: list[BlockAttention] = []
    steps: list[Callable[[Tensor], Tensor]] = []  # each from the shares after a layer to those before it

    def see(layer: Attended | Merged) -> None:
        if isinstance(layer, Merged):
            steps.append(partial(spread_over_samples, layer))
        else:
            blocks.append(_of_cells(layer, cells_at(chosen, layer.stride, layer.H, layer.W)))
            steps.append(_step(layer))

    parts = [block.attn if isinstance(block, Block) else block for stage in network.stages for block in stage.blocks]
    if others := sorted({type(part).__name__ for part in parts if not (part is None or isinstance(part, HiLo))}):
        raise UserError(f"attention is recorded of HiLo alone, and this model has {listed(others)}; leave it out of --what")
    with watched(network, see, weights=True):
        *_, last = network._run_stages(images)
    cells = cells_at(chosen, network.feature_info[-1]["reduction"], *last.shape[1:3])
    share = torch.zeros(last.shape[:3], device=last.device)
    share[torch.arange(len(share)), cells[:, 0], cells[:, 1]] = 1
    for step in reversed(steps):
        share = step(share)
    return Attention(chosen, blocks, share / share.sum((1, 2), keepdim=True), network.patch_embed.patch_size)


def _of_cells(layer: Attended, cells: Tensor) -> BlockAttention:
    hilo, weights = layer.hilo, layer.weights
    assert weights is not None  # asked for
    images, (row, column), hifi, lofi = torch.arange(len(cells), device=cells.device), cells.unbind(1), None, None
    if weights.hifi is not None:
        (sh, sw), columns = hilo.window, -(-layer.W // hilo.window[1])
        window, token = row // sh * columns + column // sw, row % sh * sw + column % sw
        hifi = weights.hifi[images, window, :, token].float().unflatten(-1, (sh, sw))
    if weights.lofi is not None:
        pooled = [-(-n // side) for n, side in zip((layer.H, layer.W), hilo.pool)]
        lofi = weights.lofi[images, :, row * layer.W + column].float().unflatten(-1, pooled)
    return BlockAttention(layer.name, layer.stride, cells, hifi, lofi, hilo.window, hilo.pool)


def _step(layer: Attended) -> Callable[[Tensor], Tensor]:
    """Keeps the average over heads alone: on large maps the weights of all heads would fill the memory."""
    assert layer.weights is not None
    hifi, lofi = (None if weights is None else weights.float().mean(dim) for weights, dim in zip(layer.weights, (2, 1)))
    return partial(_before_attention, layer.hilo, HiLoWeights(hifi, lofi))


def _before_attention(hilo: HiLo, weights: HiLoWeights, share: Tensor) -> Tensor:
    """Shares (B, H, W) of the layer's outputs -> those of its inputs, with weights (B, windows, tokens, tokens) and (B, H * W, M)."""
    H, W = share.shape[1:]
    attended = torch.zeros_like(share)
    if weights.hifi is not None:
        (sh, sw), (nh, nw) = hilo.window, (-(-n // side) for n, side in zip((H, W), hilo.window))
        windows = F.pad(share, (0, nw * sw - W, 0, nh * sh - H)).view(-1, nh, sh, nw, sw).transpose(2, 3).flatten(3)  # (B, nh, nw, tokens)
        windows = windows.flatten(1, 2)[:, :, None] @ weights.hifi
        spread = windows.view(-1, nh, nw, sh, sw).transpose(2, 3).reshape(-1, nh * sh, nw * sw)
        attended += spread[:, :H, :W] * hilo.h_heads
    if weights.lofi is not None:
        ph, pw = hilo.pool
        pooled = (share.flatten(1)[:, None] @ weights.lofi).unflatten(-1, (-(-H // ph), -(-W // pw)))[:, 0]
        spread = pooled.repeat_interleave(ph, dim=1).repeat_interleave(pw, dim=2) / (ph * pw)
        attended += spread[:, :H, :W] * hilo.l_heads
    return (share + attended / hilo.num_heads) / 2

