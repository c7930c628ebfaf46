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

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # the trainer's, which are torchvision's


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
        matches = {Path(match) for match in glob.iglob(what, recursive=True)}
        images = sorted({image for match in matches if match.is_dir() or _is_image(match) for image in _images_in(match)})
    else:
        raise UserError(f"{what}: there is no such image or folder")
    if not images:
        raise UserError(f"{what}: no images ({', '.join(SUFFIXES)}) in this folder" if os.path.isdir(what) else f"{what}: no image matches")
    return images


def _images_in(path: Path) -> list[Path]:
    """The path itself, unless it is a folder."""
    if not path.is_dir():
        return [path]
    files = (Path(place, name) for place, _, names in os.walk(path, followlinks=True) for name in names)  # links as the trainer takes them
    return sorted(filter(_is_image, files))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES
