# SPDX-License-Identifier: Apache-2.0
"""The picture of a training's curves, as classification, detection and segmentation write it at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .files import atomic_write

__all__ = ["Curve", "save_curves"]


@dataclass(frozen=True)
class Curve:
    """Points of one curve; without a label it has no entry in the legend."""

    x: Sequence[float]
    y: Sequence[float]
    label: str | None = None
    marker: str | None = None
    width: float = 1.5


def save_curves(path: str | Path, panels: dict[str, list[Curve]], xlabel: str, units: dict[str, str] | None = None) -> None:
    """Draws panels side by side into a PNG, each with a title and its curves.

    Args:
        panels: title -> curves. A panel may be empty.
        xlabel: what all panels count, such as ``epoch``.
        units: title -> unit of its vertical axis.
    """
    from matplotlib.figure import Figure  # slow to import; unlike pyplot it needs no backend and keeps no figure

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for curve in curves:
            axis.plot(curve.x, curve.y, label=curve.label, marker=curve.marker, linewidth=curve.width)
        axis.set(title=title, xlabel=xlabel, ylabel=(units or {}).get(title, ""))
        axis.grid(alpha=0.3)
        if any(curve.label for curve in curves):
            axis.legend()
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=120)
