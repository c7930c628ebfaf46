# SPDX-License-Identifier: Apache-2.0
"""A small SVG canvas: shapes in the colours of a theme. Text stays text, so files are small and browsers use their own font."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape

FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"  # GitHub's own
WIDTH = 880  # width of a README on GitHub in pixels

# Okabe and Ito's colour-blind safe palette, lighter on dark pages. `paper` is the colour of the page, since pictures are transparent.
THEMES = {
    "light": dict(
        ink="#1f2328", muted="#59636e", line="#818b98", faint="#d1d9e0", panel="#f6f8fa", paper="#ffffff",
        hifi="#d55e00", lofi="#0072b2", conv="#00825f", merge="#8250a0",
    ),
    "dark": dict(
        ink="#f0f6fc", muted="#9da7b3", line="#7d8590", faint="#3d444d", panel="#151b23", paper="#0d1117",
        hifi="#f28e2b", lofi="#56b4e9", conv="#2fbf96", merge="#c79ae0",
    ),
}  # fmt: skip


class Canvas:
    """A canvas with coordinates in pixels from the top left corner and colours named as in the palette."""

    def __init__(self, theme: str, height: int, title: str):
        self.palette = THEMES[theme]
        self.height = height
        self.parts = [f"<title>{escape(title)}</title>"]

    def rect(self, x, y, width, height, fill="none", stroke="none", *, radius=0, opacity=1.0, line=1.0) -> None:
        self._add(
            "rect", x=x, y=y, width=width, height=height, rx=radius, fill=self._colour(fill), fill_opacity=opacity,
            stroke=self._colour(stroke), stroke_width=line,
        )  # fmt: skip

    def circle(self, x, y, radius, fill, stroke="none", line=1.0) -> None:
        self._add("circle", cx=x, cy=y, r=radius, fill=self._colour(fill), stroke=self._colour(stroke), stroke_width=line)

    def polygon(self, points: Iterable[tuple[float, float]], fill, opacity=1.0, stroke="none") -> None:
        self._add("polygon", points=_points(points), fill=self._colour(fill), fill_opacity=opacity, stroke=self._colour(stroke))

    def line(self, *points: tuple[float, float], colour="line", width=1.5, opacity=1.0, dashes="", arrow=False) -> None:
        """Draws straight segments through the points, with ``arrow`` an arrowhead at the last one."""
        optional = dict(stroke_dasharray=dashes) if dashes else {}
        self._add(
            "polyline", points=_points(points), fill="none", stroke=self._colour(colour), stroke_width=width, stroke_opacity=opacity,
            stroke_linejoin="round", **optional,
        )  # fmt: skip
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
            dx, dy = (x - x0) / length, (y - y0) / length
            base = x - 7 * dx, y - 7 * dy
            self.polygon([(x + dx, y + dy), (base[0] - 4 * dy, base[1] + 4 * dx), (base[0] + 4 * dy, base[1] - 4 * dx)], fill=colour)

    def text(self, x, y, words: str, size=14, colour="ink", anchor="middle", bold=False) -> None:
        """Draws text with the baseline at ``y``; ``anchor`` is start, middle or end."""
        optional = dict(font_weight=600) if bold else {}
        self._add("text", escape(words), x=x, y=y, font_size=size, fill=self._colour(colour), text_anchor=anchor, **optional)

    def svg(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" height="{self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" role="img">'
        return "\n".join([head, *self.parts, "</svg>", ""])

    def _colour(self, name: str) -> str:
        return self.palette.get(name, name) if name == "none" else self.palette[name]

    def _add(self, tag: str, content: str = "", **attributes) -> None:
        words = " ".join(f'{key.replace("_", "-")}="{_number(value)}"' for key, value in attributes.items())
        self.parts.append(f"<{tag} {words}>{content}</{tag}>" if content else f"<{tag} {words}/>")


def _number(value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_number(float(x))},{_number(float(y))}" for x, y in points)
