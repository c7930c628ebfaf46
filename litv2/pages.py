# SPDX-License-Identifier: Apache-2.0
"""Pages of results: one HTML file each, which opens without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

__all__ = ["page", "picture", "table"]

STYLE = (
    "body{font-family:sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "td,th{padding:.2em .8em;text-align:left}img{max-width:100%}"
)


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}{style}</style>'
    return f'<!doctype html><html lang="en">{head}{"".join(parts)}</html>\n'


def table(header: list[str], rows: Iterable[Iterable]) -> str:
    cells = [header, *([str(value) for value in row] for row in rows)]
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for row, tag in zip(cells, ["th", *["td"] * len(cells)])]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def picture(content: bytes, title: str, kind: str = "png") -> str:
    """An image whose encoded content is part of the page."""
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'
