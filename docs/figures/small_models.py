# SPDX-License-Identifier: Apache-2.0
"""Plots the accuracy of small models that were trained alike against the time of their inference, from the table of `benchmarks/proxies.py`
in docs/results.md."""

from __future__ import annotations

import math
from pathlib import Path

from canvas import WIDTH, Canvas
from markdown_tables import tables

HEIGHT = 400
DOCUMENT = Path(__file__).resolve().parents[1] / "results.md"
LEFT, RIGHT, TOP, BOTTOM = 56, 840, 62, 320  # of the axes
BEFORE = ("ResNet-50-D",)  # names that stand before their points, where there is room
TOP1, TIME, INTERVAL = "top-1 (%)", "8 images (ms)", "95 % interval"


def points() -> list[tuple[str, float, float, float, float]]:
    """Returns (model, milliseconds, mean top-1 in percent, and the ends of its interval)."""
    (rows,) = tables(DOCUMENT, TOP1, TIME)
    return [(row["model"], float(row[TIME]), float(row[TOP1]), *map(float, row[INTERVAL].split(" to "))) for row in rows]


def draw(theme: str) -> str:
    canvas = Canvas(theme, HEIGHT, "Top-1 accuracy of small models trained alike against the time of their inference")
    found = points()
    fastest, slowest = math.floor(0.9 * min(time for _, time, *_ in found)), 1.1 * max(time for _, time, *_ in found)
    low, high = 5 * math.floor(min(row[3] for row in found) / 5), 5 * math.ceil(max(row[4] for row in found) / 5)

    def x(time: float) -> float:
        return LEFT + (time - fastest) / (slowest - fastest) * (RIGHT - LEFT)

    def y(top1: float) -> float:
        return BOTTOM - (top1 - low) / (high - low) * (BOTTOM - TOP)

    canvas.text(LEFT, 24, "Small models trained alike, of as many multiply-adds", 15, anchor="start", bold=True)
    canvas.text(LEFT, 48, "top-1 of 500 photographs of ten classes, %: mean of the seeds and its 95 % interval", 12, "muted", "start")
    for top1 in range(low, high + 1, 5):
        canvas.line((LEFT, y(top1)), (RIGHT, y(top1)), colour="faint", width=1)
        canvas.text(LEFT - 8, y(top1) + 4, str(top1), 12, "muted", "end")
    for time in range(fastest, math.floor(slowest) + 1):
        canvas.line((x(time), BOTTOM), (x(time), BOTTOM + 5), colour="line", width=1)
        canvas.text(x(time), BOTTOM + 20, str(time), 12, "muted")
    canvas.line((LEFT, BOTTOM), (RIGHT, BOTTOM), colour="line", width=1)
    for name, time, top1, least, most in found:
        own = name == "LITv2"
        colour = "hifi" if own else "lofi"
        canvas.line((x(time), y(least)), (x(time), y(most)), colour=colour, width=2 if own else 1.5)
        canvas.circle(x(time), y(top1), 6 if own else 4.5, colour, "paper", 1)
        shift, anchor = (-10, "end") if name in BEFORE else (10, "start")
        canvas.text(x(time) + shift, y(top1) + 4, name, 13 if own else 12, "hifi" if own else "ink", anchor, bold=own)
    canvas.text(WIDTH / 2, HEIGHT - 32, "ms for 8 images of 48 × 48 pixels, eager, one thread of an AMD EPYC with AVX-512", 12, "muted")
    canvas.text(WIDTH / 2, HEIGHT - 13, "trained on 1000 photographs by a recipe that was chosen for LITv2", 12, "muted")
    return canvas.svg()
