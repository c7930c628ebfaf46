# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the functions of this package return, as figures of matplotlib. Axes are in pixels of the image as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import MissingPackage
from .attending import Attention, BlockAttention
from .frequencies import HALF_NYQUIST, BranchSpectrum, radial_profile
from .sampling import Samples
from .subjects import View

try:
    from matplotlib.figure import Figure  # unlike pyplot it needs no backend and keeps no figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingPackage(f"{error}; pictures need matplotlib: pip install matplotlib") from error

__all__ = ["COLOURS", "draw_attention", "draw_cam", "draw_offsets", "draw_spectrum", "overlay"]

COLOURS = "viridis"  # from dark to bright for every reader, colour-blind ones and black-and-white printers included
BRANCHES = {"hifi": ("Hi-Fi", "#d55e00", "-"), "lofi": ("Lo-Fi", "#0072b2", "--")}  # of the Okabe-Ito palette
MARK = "#ff2d55"  # colour of the position
COLUMNS = 12  # at most, of the panels of heads
DPI = 110


def draw_spectrum(spectra: Sequence[BranchSpectrum]) -> Figure:
    """Draws, for each block with both branches, their magnitudes on one logarithmic scale, and below the radial profiles.

    If no block has both, all are drawn, and a panel says which branch has no heads.
    """
    blocks: dict[str, dict[str, BranchSpectrum]] = {}
    for part in spectra:
        blocks.setdefault(part.block, {})[part.branch] = part
    blocks = {name: parts for name, parts in blocks.items() if len(parts) == 2} or blocks
    figure = Figure(figsize=(1.9 * len(blocks) + 1.2, 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(3, len(blocks), squeeze=False, height_ratios=(1, 1, 0.9))
    for (name, parts), column in zip(blocks.items(), grid.T):
        logs = {branch: part.magnitude.clamp(min=1e-12).log10() for branch, part in parts.items()}
        limits = dict(vmin=min(float(x.min()) for x in logs.values()), vmax=max(float(x.max()) for x in logs.values()))
        for (branch, (title, _, _)), axes in zip(BRANCHES.items(), column):
            if branch in logs:
                shown = axes.imshow(logs[branch], cmap=COLOURS, extent=_frequencies(*logs[branch].shape), **limits)
                axes.set(xticks=(-0.4, 0, 0.4), yticks=(-0.4, 0, 0.4))
            else:
                axes.text(0.5, 0.5, f"no {title} heads", ha="center", transform=axes.transAxes)
                axes.set(xticks=(), yticks=())
            if axes in grid[:, 0]:
                axes.set_ylabel(f"{title}\ncycles per token", fontsize=8)
        figure.colorbar(shown, ax=list(column[:2]), location="bottom", aspect=14, label="log10 of magnitude").ax.tick_params(labelsize=7)
        for branch, part in parts.items():
            title, colour, style = BRANCHES[branch]
            column[2].semilogy(*radial_profile(part.magnitude), style, label=title, color=colour)
        column[2].axvline(HALF_NYQUIST, color="grey", linewidth=0.8, linestyle=":")
        column[2].set(xlabel="cycles per token")
        column[0].set_title(_short(name), fontsize=9)
    grid[2, 0].set_ylabel("magnitude", fontsize=8)
    grid[2, 0].legend(fontsize=8)
    for axes in grid.flat:
        axes.tick_params(labelsize=7)
    return figure


def draw_attention(view: View, attention: Attention, index: int = 0) -> Figure:
    """Draws the position and its rollout, then a panel per head of each block. Each panel has its own scale, from 0 to its maximum."""
    heads = {block.block: list(_heads(block, index)) for block in attention.blocks}
    columns = max([min(len(panels), COLUMNS) for panels in heads.values()], default=1)
    rows = [-(-len(panels) // columns) for panels in heads.values()]
    heights = [3.6, *(1.2 * n + 0.25 for n in rows)]
    figure = Figure(figsize=(max(columns, 7), sum(heights)), dpi=DPI, layout="constrained")
    top, *parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    place, rolled = top.subplots(1, 2)
    at = attention.at[index].tolist()
    overlay(place, view, "position", at=at)
    overlay(rolled, view, "rolled out over the network", attention.rollout[index], attention.patch, at=at)
    for n, part, (name, panels) in zip(rows, parts, heads.items()):
        part.suptitle(_short(name), fontsize=8)
        grid = part.subplots(n, columns, squeeze=False).flatten()
        for axes, (title, weights, cell, corner) in zip(grid, panels):
            overlay(axes, view, title, weights, cell, corner, at, small=True)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
    return figure


def _heads(block: BlockAttention, index: int) -> Iterator[tuple[str, Tensor, tuple[int, int], tuple[int, int]]]:
    """Title, weights, and in pixels the height and width of their cells and the corner (y, x) of the first, of each head."""
    if block.hifi is not None:
        row, column = block.cells[index].tolist()
        (sh, sw), stride = block.window, block.stride
        corner = (row // sh * sh * stride, column // sw * sw * stride)
        for i, weights in enumerate(block.hifi[index]):
            yield f"Hi-Fi {i}", weights, (stride, stride), corner
    if block.lofi is not None:
        cell = (block.pool[0] * block.stride, block.pool[1] * block.stride)
        for i, weights in enumerate(block.lofi[index]):
            yield f"Lo-Fi {i}", weights, cell, (0, 0)


def draw_offsets(view: View, samples: Sequence[Samples], index: int = 0) -> Figure:
    """Draws the points that a cell samples through each merging and those before it (dots), where they would lie without offsets
    (crosses) and the cell itself. Dots of samples beyond the edge of a map, which count less, are darker."""
    figure = Figure(figsize=(4.4 * len(samples), 4.9), dpi=DPI, layout="constrained")
    for axes, part in zip(figure.subplots(1, len(samples), squeeze=False)[0], samples):
        side, (row, column) = part.stride, part.cells[index].tolist()
        moved = (part.points - part.regular)[index].norm(dim=-1)
        figures = f"{len(moved)} samples, moved by {moved.mean():.1f} pixels"
        overlay(axes, view, f"{_short(part.merging)}: cell ({row}, {column}) of stride {side}\n{figures}")
        axes.add_patch(Rectangle((column * side, row * side), side, side, fill=False, edgecolor=MARK))
        axes.scatter(*part.regular[index].T, s=9, marker="x", linewidths=0.7, color="white")
        axes.scatter(*part.points[index].T, s=14, c=part.weights[index], cmap=COLOURS, vmin=0, vmax=1, edgecolors="black", linewidths=0.5)
        reach = 2 * side + moved.max().item()
        x, y = (column + 0.5) * side, (row + 0.5) * side
        axes.set(xlim=(x - reach, x + reach), ylim=(y + reach, y - reach), facecolor="0.3")
        axes.set_axis_on()
        axes.tick_params(labelsize=7)
    return figure


def draw_cam(view: View, maps: dict[str, Tensor], what: str) -> Figure:
    """Draws the image and, over it, a class activation map (H, W) of each method for ``what``."""
    figure = Figure(figsize=(3.4 * (1 + len(maps)), 3.9), dpi=DPI, layout="constrained")
    first, *others = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    overlay(first, view)
    for axes, (title, values) in zip(others, maps.items()):
        overlay(axes, view, title, values)
    figure.suptitle(what, fontsize=10)
    return figure


def overlay(
    axes: Any, view: View, title: str = "", weights: Tensor | None = None, cell: int | tuple[int, int] = 1,
    corner: tuple[int, int] = (0, 0), at: Sequence[float] | None = None, small: bool = False,
) -> None:  # fmt: skip
    """Shows the image in grey, and over it weights: the higher, the brighter and the more opaque. Without weights, in colour.

    Args:
        weights: (h, w), of at least 0.
        cell: pixels of the tensor per weight, or height and width.
        corner: y and x of the first weight's corner in pixels.
        at: x and y of a position to mark.
    """
    H, W = view.size
    seen = view.seen
    axes.imshow(seen if weights is None else np.asarray(seen.convert("L")), cmap="gray", vmin=0, vmax=255, extent=(0, W, H, 0))
    if weights is not None:
        values = np.asarray(weights.cpu(), dtype=np.float64)
        share = values / max(values.max(), 1e-30)
        (y, x), (high, wide) = corner, (cell, cell) if isinstance(cell, int) else cell
        extent = (x, x + wide * values.shape[1], y + high * values.shape[0], y)
        axes.imshow(share, cmap=COLOURS, vmin=0, vmax=1, alpha=0.35 + 0.5 * share, extent=extent, interpolation="nearest")
    if at is not None:
        axes.plot(*at, marker="o", markersize=3 if small else 8, markerfacecolor="none", markeredgecolor=MARK)
    axes.set(xlim=(0, W), ylim=(H, 0))
    axes.set_title(title, fontsize=6 if small else 9, y=1)  # a place for it need not be searched for, which takes long
    axes.set_axis_off()


def _frequencies(H: int, W: int) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of a centred transform in cycles per token: its pixels are frequencies, frequency 0 at [H // 2, W // 2]."""
    (left, right), (top, bottom) = (((-(n // 2) - 0.5) / n, (n - n // 2 - 0.5) / n) for n in (W, H))
    return left, right, bottom, top


def _short(name: str) -> str:
    """``layers.2.blocks.0`` -> stage 3, block 1."""
    _, stage, kind, *number = name.split(".")
    return f"stage {int(stage) + 1}, " + (f"block {int(number[0]) + 1}" if kind == "blocks" else "token merging")
