# SPDX-License-Identifier: Apache-2.0
"""Where deformable token merging samples: from a cell of a coarse map through one, two and three mergings down to pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .positions import Position, cells_at, positions
from .recording import Merged, network_of, watched

__all__ = ["Samples", "offsets", "spread_over_samples"]


@dataclass(frozen=True)
class Samples:
    """What one cell per image reads, through this token merging and all those before it: 4, 16, 64 ... samples.

    Attributes:
        merging: its name, such as ``layers.0.downsample``.
        stride: pixels per cell of its output along each side.
        cells: (B, 2), row and column of the cell.
        points: (B, samples, 2), x and y in pixels from the corner of the image. A point of a later merging lies between the tokens of
            an earlier one, and so do its samples: they are interpolated between those of the four tokens around it, as the values are.
        weights: (B, samples), the share of each sample that lies on the map; beyond the edge the network reads zeros.
        regular: (B, samples, 2), the same points without offsets: the grid of a plain convolution.
    """

    merging: str
    stride: int
    cells: Tensor
    points: Tensor
    weights: Tensor
    regular: Tensor


def offsets(model: nn.Module, images: Tensor, at: Position = None) -> list[Samples]:
    """Returns where each token merging samples for the cell at a position, from the first merging to the last.

    Args:
        model: a LITv2, or a model with one as its backbone. Any mode; it is as before afterwards.
        images: (B, C, H, W), normalised.
        at: as in ``positions``, whose errors are raised, too.
    """
    network = network_of(model)
    chosen = positions(network, images, at)
    mergings: list[Merged] = []
    with watched(network, lambda layer: mergings.append(layer) if isinstance(layer, Merged) else None):
        network._run_stages(images)
    return [_samples(mergings[: i + 1], chosen) for i in range(len(mergings))]


def _samples(mergings: list[Merged], at: Tensor) -> Samples:
    """Of the last of these mergings, through the others back to the image."""
    last = mergings[-1]
    cells = cells_at(at, 2 * last.stride, *last.offsets.shape[1:3])
    points = regular = cells[:, None].float()  # (B, n, 2), rows and columns, in tokens of the map that is read next
    weights = points.new_ones(points.shape[:2])
    for merging in reversed(mergings):
        if merging is not last:
            size = merging.offsets.shape[1:3]
            weights = weights * _share_on_map(points, size)
            points = torch.minimum(points.clamp(min=0), points.new_tensor(size) - 1)  # of the tokens around it, only those on the map count
        moved = _interpolate(merging.offsets, points)  # (B, n, 4, 2)
        points = (2 * points[:, :, None] + _taps(points) + moved).flatten(1, 2)
        regular = (2 * regular[:, :, None] + _taps(points)).flatten(1, 2)
        weights = weights.repeat_interleave(4, dim=1)
    first = mergings[0]
    weights = weights * _share_on_map(points, (first.H, first.W))
    in_pixels = [((p + 0.5) * first.stride).flip(-1) for p in (points, regular)]
    return Samples(last.name, 2 * last.stride, cells, in_pixels[0], weights, in_pixels[1])


def spread_over_samples(merging: Merged, share: Tensor) -> Tensor:
    """Shares of the merging's output cells (B, H // 2, W // 2) -> shares of its input tokens (B, H, W) that they are read from.

    Each of the four samples counts the same, and within it each token by its weight in the interpolation; what lies beyond the edge is
    lost.
    """
    B, h, w = share.shape
    rows, columns = (torch.arange(n, device=share.device, dtype=share.dtype) for n in (h, w))
    cells = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[None, :, :, None]  # (1, h, w, 1, 2)
    points = (2 * cells + _taps(share) + merging.offsets.to(share.dtype)).flatten(1, 3)  # (B, 4 * h * w, 2)
    size = points.new_tensor((merging.H, merging.W))
    spread = share.new_zeros(B, merging.H * merging.W)
    corner = points.floor()
    for step in _taps(share).flatten(0, -2):
        token = corner + step
        weight = (1 - (points - token).abs()).clamp(min=0).prod(-1) * ((token >= 0) & (token < size)).all(-1)
        index = token.clamp(min=0).minimum(size - 1).long()
        part = weight * share.flatten(1).repeat_interleave(4, dim=1) / 4
        spread.scatter_add_(1, index[..., 0] * merging.W + index[..., 1], part)
    return spread.unflatten(1, (merging.H, merging.W))


def _taps(like: Tensor) -> Tensor:
    """(4, 2): row and column of the samples of a 2 x 2 convolution."""
    return torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)], device=like.device, dtype=like.dtype)


def _interpolate(offsets: Tensor, points: Tensor) -> Tensor:
    """Offsets (B, h, w, 4, 2) at points (B, n, 2) on the map, rows first -> (B, n, 4, 2), bilinear between cells."""
    h, w = offsets.shape[1:3]
    scale = points.new_tensor((max(h - 1, 1), max(w - 1, 1))) / 2
    grid = (points / scale - 1).flip(-1)[:, None]  # grid_sample takes x first, from -1 at the first cell's centre to 1 at the last's
    values = F.grid_sample(offsets.flatten(3).permute(0, 3, 1, 2).to(points.dtype), grid, padding_mode="border", align_corners=True)
    return values[:, :, 0].transpose(1, 2).unflatten(2, (4, 2))


def _share_on_map(points: Tensor, size: Sequence[int]) -> Tensor:
    """(B, n, 2) -> (B, n): the part of each bilinear sample that falls on a map of this size, 0 a token or more beyond the edge."""
    last = points.new_tensor(size) - 1
    beyond = (-points).clamp(min=0) + (points - last).clamp(min=0)
    return (1 - beyond).clamp(min=0).prod(-1)
