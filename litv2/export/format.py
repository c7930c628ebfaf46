# SPDX-License-Identifier: Apache-2.0
"""What the exporter needs to know about a format; each format's module defines one of these."""

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
        write: writes a network to a path, possibly with further files beside it.
        load: loads a file in its runtime.
        suffix: suffix of its files.
        dtypes: dtypes that it can compute in.
        dynamic: dimensions that it can leave open until run time.
        min_cells: smallest side of the last map if the image size is dynamic.
    """

    write: Callable[[Network, Path, Settings], None]
    load: Callable[[Path], Run]
    suffix: str
    dtypes: tuple[str, ...] = ("float32",)
    dynamic: tuple[str, ...] = DYNAMIC
    min_cells: int = 1
