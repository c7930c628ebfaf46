# SPDX-License-Identifier: Apache-2.0
"""The page of a check: counts, and pictures of what was found."""

from __future__ import annotations

import html
import io

from ..pages import page, picture, table
from ..preprocess import read_image
from .findings import Findings

__all__ = ["findings_page"]

SHOWN = 100  # lines, groups or labels under a heading
PER_GROUP = 12
SIDE = 144  # pixels
STYLE = """
section{border-top:1px solid #ccc} figure{display:inline-block;margin:.4em;vertical-align:top;width:150px}
figcaption{font-size:.7em;overflow-wrap:anywhere}
"""


def findings_page(findings: Findings) -> str:
    """Returns the HTML. The images that are shown are read once more."""
    parts = [f"<h1>{html.escape(str(findings.listing.root))}</h1>", table(["", ""], findings.overview()), "<h2>Found</h2>"]
    parts.append(table(["", "number"], ((kind, len(lines)) for kind, lines in findings.kinds.items())))
    parts += map(_line, findings.class_problems)
    parts += _headed("Unreadable", [_line(f"{name}: {reason}") for name, reason in findings.unreadable[:SHOWN]], len(findings.unreadable))
    for title, groups in findings.topics.items():
        sections = []
        for group in groups[:SHOWN]:
            captions = ["", *("equal pixels" if group.exact else f"{bits} bits of 256 differ" for bits in group.bits[1:])]
            figures = [_figure(findings, i, caption) for i, caption in zip(group.members[:PER_GROUP], captions)]
            sections.append(f"<section>{''.join(figures)}{_more(len(group.members) - PER_GROUP)}</section>")
        parts += _headed(title, sections, len(groups))
    suspicions = findings.suspicions or []
    figures = [_figure(findings, suspicion.image, str(suspicion)) for suspicion in suspicions[:SHOWN]]
    parts += _headed("Suspicious labels, the least supported first", figures, len(suspicions))
    heading, *classes = findings.class_table()
    parts += ["<h2>Images by class</h2>", table(heading, classes)]
    return page(f"Check of {findings.listing.root}", parts, STYLE)


def _headed(title: str, parts: list[str], count: int = 0) -> list[str]:
    """A heading, the parts and how many of ``count`` are left out; nothing if there are none."""
    return [f"<h2>{title}</h2>", *parts, _more(count - SHOWN)] if parts else []


def _line(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _more(count: int) -> str:
    return f"<p>... and {count} more</p>" if count > 0 else ""


def _figure(findings: Findings, number: int, caption: str) -> str:
    """An image with its path and a caption."""
    reading = findings.readings[number]
    image = read_image(reading.entry.path)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG")
    name = findings.name(number)
    text = f"{html.escape(name)}<br>{html.escape(caption)}"
    return f"<figure>{picture(file.getvalue(), name, 'jpeg')}<figcaption>{text}</figcaption></figure>"
