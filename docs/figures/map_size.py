# SPDX-License-Identifier: Apache-2.0
"""Plots how long attention layers take, relative to windows, against the side of the map, from the table of `benchmarks/attention.py` in
docs/hilo.md."""

from __future__ import annotations

import math
from pathlib import Path

from canvas import WIDTH, Canvas
from markdown_tables import tables

HEIGHT = 420
DOCUMENT = Path(__file__).resolve().parents[1] / "hilo.md"
LEFT, RIGHT, TOP, BOTTOM = 56, 700, 62, 340  # of the axes
GAP = 17  # at least between two names
WINDOWS = "Local Window"  # what the others are compared with
COLOURS = {"MSA": "ink", "XCA": "merge", WINDOWS: "lofi"}
DASHES = {"HiLo, window 2": "", "HiLo, window 4": "8 4", "HiLo, window 8": "2 4"}


def draw(theme: str) -> str:
    canvas = Canvas(theme, HEIGHT, "Time of HiLo and other attention layers, relative to attention in windows, against the side of the map")
    (rows,) = tables(DOCUMENT, "side", WINDOWS)
    sides = [int(row["side"]) for row in rows]
    ratios = {  # by layer, of the sides at which it was timed
        name: [(int(row["side"]), float(row[name]) / float(row[WINDOWS])) for row in rows if row[name]] for name in (*COLOURS, *DASHES)
    }
    low, high = 0.5, 1.05 * max(ratio for points in ratios.values() for _, ratio in points)

    def x(side: float) -> float:
        return LEFT + math.log(side / sides[0]) / math.log(sides[-1] / sides[0]) * (RIGHT - LEFT)

    def y(ratio: float) -> float:
        return BOTTOM - math.log(ratio / low) / math.log(high / low) * (BOTTOM - TOP)

    canvas.text(LEFT, 24, "Time for a map, relative to attention in windows of 7 × 7", 15, anchor="start", bold=True)
    canvas.text(LEFT, 48, "times as long", 12, "muted", "start")
    for ratio in (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10):
        if ratio <= high:
            canvas.line((LEFT, y(ratio)), (RIGHT, y(ratio)), colour="faint", width=1)
            canvas.text(LEFT - 8, y(ratio) + 4, f"{ratio:g}", 12, "muted", "end")
    for side in sides:
        canvas.line((x(side), BOTTOM), (x(side), BOTTOM + 5), colour="line", width=1)
        canvas.text(x(side), BOTTOM + 20, f"{side} × {side}", 12, "muted")
    place = math.inf
    for name, points in sorted(ratios.items(), key=lambda item: item[1][-1][1]):  # the lowest first
        own = name in DASHES
        colour = "hifi" if own else COLOURS[name]
        places = [(x(side), y(ratio)) for side, ratio in points]
        canvas.line(*places, colour=colour, width=2.5 if own else 1.5, dashes=DASHES.get(name, ""))
        for point in places:
            canvas.circle(*point, 4 if own else 3, colour)
        end, height = places[-1]
        place = min(height + 4, place - GAP) if end == x(sides[-1]) else height + 4
        canvas.text(end + 12, place, name, 13 if own else 12, colour, "start", bold=own)
    canvas.text(WIDTH / 2, HEIGHT - 20, "one thread of an AMD EPYC (Zen 4), one map of 768 channels and 12 heads, float32", 12, "muted")
    return canvas.svg()
