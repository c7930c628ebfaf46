# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m litv2``, one per file, and what they share."""

from __future__ import annotations

import sys
from pathlib import Path

from ..errors import MissingPackage, UserError
from ..weights.download import fetch
from ..weights.reading import read_checkpoint
from ..weights.state_dict import find_weights

__all__ = ["or_small", "print_notes", "print_table", "read", "which_weights"]

SMALL = Path(__file__).resolve().parents[2] / "examples/litv2_imagenette.safetensors"


def or_small(checkpoint: str | None) -> str:
    """Returns the checkpoint, or where none is given the small classifier of the examples, and says so.

    Raises:
        UserError: there is neither.
    """
    if checkpoint is not None:
        return checkpoint
    if not SMALL.exists():
        raise UserError("the small classifier is part of the repository, not of the package; pass another with --checkpoint")
    print_notes([f"without --checkpoint: the small classifier of ten classes, {SMALL}"])
    return str(SMALL)


def read(source: str) -> tuple[Path, dict]:
    """Reads a checkpoint given as a file, a URL or a zoo name, also of an mmengine training run; returns its path and content."""
    path = fetch(source)
    try:
        return path, read_checkpoint(path)
    except UserError as error:
        if "mmengine." not in str(error):
            raise
        try:
            from ..openmmlab.runner import MMENGINE_CLASSES  # such a file also holds the history of losses
        except ImportError as missing:
            raise MissingPackage(f"{path} was written by mmengine, which is needed to read it: run `make mm` ({missing})") from error
        return path, read_checkpoint(path, also=MMENGINE_CLASSES)


def which_weights(content: dict) -> str:
    """Describes which weights :func:`find_weights` takes from a checkpoint that may hold two kinds."""
    found = []
    for which in ("ema", "model"):
        try:
            find_weights(content, which)
            found.append(which)
        except UserError:
            pass
    return {"ema": "the moving average only", "model": "plain"}.get("".join(found), "the moving average (--weights model: the plain ones)")


def print_notes(notes: list[str]) -> None:
    """Prints notes to stderr: stdout is reserved for the results."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def print_table(rows: list[tuple]) -> None:
    """Prints rows as a table with aligned columns."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(f"{str(cell):{width}}" for cell, width in zip(row, widths)).rstrip())
