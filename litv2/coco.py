# SPDX-License-Identifier: Apache-2.0
"""COCO's annotation files."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError

__all__ = ["read_annotations"]


def read_annotations(path: str | Path) -> dict:
    """Returns the content of a COCO file, whose images, annotations and categories are lists of dictionaries.

    Raises:
        UserError: it is not such a file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path} is not a COCO annotation file: its {key!r} are not a list of dictionaries")
    return content
