# SPDX-License-Identifier: Apache-2.0
"""Reads the tables of a document."""

from __future__ import annotations

import re
from pathlib import Path


def tables(document: Path, *headings: str) -> list[list[dict[str, str]]]:
    """Returns the rows, cell by heading, of each table that has these headings."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", document.read_text(encoding="utf-8"), re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        if set(headings) <= set(header):
            found.append([dict(zip(header, row)) for row in rows])
    return found
