# SPDX-License-Identifier: Apache-2.0
"""From what a user gives, images, folders, patterns or a list on the standard input, to the paths of the images."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from .errors import UserError

__all__ = ["image_list"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def image_list(given: Iterable[str | Path]) -> list[Path]:
    """Returns the paths of images, in the order of what is given.

    A folder stands for the images in it and its subfolders, in alphabetical order; a pattern (``*``, ``?``, ``[...]``, and ``**`` for any
    subfolders) for the images and folders that it matches, each image once, in alphabetical order; and ``-`` for the paths on the
    standard input, one per line, whether or not they exist.

    Raises:
        UserError: something given does not exist, a folder contains no images, a pattern matches none, or the standard input is empty.
    """
    return [image for what in given for image in (_listed_on_stdin() if str(what) == "-" else _found(str(what)))]


def _listed_on_stdin() -> list[Path]:
    lines = sys.stdin.buffer.read().splitlines() if sys.stdin else []  # bytes: the names of files need not be text
    paths = [Path(os.fsdecode(line)) for line in lines if line.strip()]
    if not paths:
        raise UserError("-: expected the paths of images on the standard input, one per line, and there are none")
    return paths


def _found(what: str) -> list[Path]:
    if os.path.lexists(what):  # first: a file's name may look like a pattern
        images = _images_in(Path(what))
    elif glob.has_magic(what):
        images = sorted({image for match in glob.iglob(what, recursive=True) for image in _images_in(Path(match))})
    else:
        raise UserError(f"{what}: there is no such image or folder")
    if not images:
        raise UserError(f"{what}: no images ({', '.join(SUFFIXES)}) in this folder" if os.path.isdir(what) else f"{what}: no image matches")
    return images


def _images_in(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
