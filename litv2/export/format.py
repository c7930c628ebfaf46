"""What the export needs to know of a format; each format's module ends in one of these."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .settings import DYNAMIC, Network, Settings

__all__ = ["Format", "Run"]

Run = Callable[[Tensor], tuple[Tensor, ...]]  # images (B, C, H, W) -> results, on the CPU


@dataclass(frozen=True)
class Format:
    """How files of a format are written and run.

    Attributes:
        write: writes a network to a path; other files may appear beside it.
        load: the file in its runtime.
        suffix: what its files end in.
        dtypes: those that it can compute in.
        dynamic: what it can leave open until it runs.
        min_cells: the least side of the last map where sizes are dynamic.
    """

    write: Callable[[Network, Path, Settings], None]
    load: Callable[[Path], Run]
    suffix: str
    dtypes: tuple[str, ...] = ("float32",)
    dynamic: tuple[str, ...] = DYNAMIC
    min_cells: int = 1
