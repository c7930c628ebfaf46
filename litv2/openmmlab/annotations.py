# SPDX-License-Identifier: Apache-2.0
"""Checks a COCO file before its masks reach pycocotools, whose C code would crash on coordinates far outside of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pycocotools import mask

from ..errors import UserError

__all__ = ["check_annotations"]

LARGEST_SIDE = 1 << 16  # pixels


def check_annotations(path: str | Path, content: dict, with_masks: bool) -> None:
    """Checks the sizes of the images, and the boxes and masks of the annotations, in the content of a COCO file.

    Args:
        with_masks: whether every annotation must have one.

    Raises:
        UserError: one is not as COCO defines it; the message names it.
    """
    sizes = {}
    for image in content["images"]:
        size = image.get("height"), image.get("width")
        if not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size):
            raise UserError(f"{path}: the image {image.get('id')!r} needs a width and height from 1 to {LARGEST_SIDE}, got {image!r}")
        sizes[_number(image.get("id"), f"{path}: the id of an image")] = size
    for annotation in content["annotations"]:
        where = f"{path}: the annotation {annotation.get('id')!r}"
        number = _number(annotation.get("image_id"), f"{where}: image_id")
        if number not in sizes:
            raise UserError(f"{where} is of the image {number}, which is not among the images")
        if not _numbers(annotation.get("bbox"), 2 * LARGEST_SIDE) or len(annotation["bbox"]) != 4:
            raise UserError(f"{where}: bbox must be four numbers, left, top, width and height in pixels, got {annotation.get('bbox')!r}")
        if segmentation := annotation.get("segmentation"):
            _check_mask(where, segmentation, *sizes[number])
        elif with_masks:
            raise UserError(f"{where} has no segmentation, from which the data set's pipeline makes a mask")


def _check_mask(where: str, segmentation: Any, height: int, width: int) -> None:
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not _numbers(polygon, 2 * max(height, width)):
                raise UserError(f"{where}: a polygon must be numbers in and near the {width} x {height} pixels, got {polygon!r}")
        return
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    valid = isinstance(counts, (list, str)) and segmentation.get("size") == [height, width]
    if valid and isinstance(counts, list):
        valid = all(type(count) is int and count >= 0 for count in counts) and sum(counts) == height * width
    elif valid:
        try:
            mask.decode(segmentation)
        except ValueError:
            valid = False
    if not valid:
        raise UserError(f"{where}: segmentation must be polygons, or run lengths that fill an image of {width} x {height} pixels")


def _number(value: Any, what: str) -> int:
    if type(value) is not int:
        raise UserError(f"{what} must be a whole number, got {value!r}")
    return value


def _numbers(values: Any, largest: int) -> bool:
    """Whether these are numbers in [-largest, largest]."""
    return isinstance(values, list) and all(type(value) in (int, float) and -largest <= value <= largest for value in values)
