# SPDX-License-Identifier: Apache-2.0
"""Draws HiLo: the token map, heads that attend inside windows, heads that attend to the pooled map, and their concatenation."""

from __future__ import annotations

import math

from canvas import Canvas

HEIGHT = 452
SIDE, S = 8, 2  # side of the map in tokens; side of a window and of the pooling
HEADS, ALPHA = 12, 0.9  # stage 3 of LITv2-S
LOFI = int(HEADS * ALPHA)
SHADES = [[0.1 + 0.9 * math.exp(-((math.hypot(y - 3.5, x - 3.5) - 3.0) ** 2) / 0.8) for x in range(SIDE)] for y in range(SIDE)]
POOLED = [
    [sum(SHADES[y * S + i][x * S + j] for i in range(S) for j in range(S)) / S**2 for x in range(SIDE // S)] for y in range(SIDE // S)
]
WINDOW, QUERY = (1, 3), (2, 6)  # (row, column) of the enlarged window and of the query position
HIGH, LOW = 24, 232  # top of the two lanes
LANE = 200  # height
LEFT, RIGHT = 272, 724  # of the lanes


def draw(theme: str) -> str:
    canvas = Canvas(theme, HEIGHT, "HiLo attention: Hi-Fi heads attend inside windows, Lo-Fi heads attend to the average-pooled map")
    _tokens(canvas)
    _heads(canvas, 202)
    _hifi(canvas)
    _lofi(canvas)
    _output(canvas)
    return canvas.svg()


def _map(canvas: Canvas, x: float, y: float, cell: float, shades: list[list[float]], colour: str, gap: float = 0, window: int = S) -> None:
    for row, values in enumerate(shades):
        for column, value in enumerate(values):
            left, top = x + column * cell + column // window * gap, y + row * cell + row // window * gap
            canvas.rect(left, top, cell - 1.5, cell - 1.5, colour, radius=2, opacity=0.12 + 0.88 * value)


def _tokens(canvas: Canvas) -> None:
    middle = HEIGHT / 2
    _map(canvas, 12, middle - 68, 17, SHADES, "muted")
    canvas.text(79, middle - 84, "tokens of an image", 14, bold=True)
    canvas.text(79, middle + 92, "H × W, C channels", 13, "muted")
    canvas.line((158, middle), (190, middle), arrow=True)


def _heads(canvas: Canvas, x: float) -> None:
    """Draws a bar per head and an arrow from each group of heads to its lane."""
    top = HEIGHT / 2 - HEADS * 15 / 2
    for head in range(HEADS):
        canvas.rect(x, top + 15 * head, 26, 12, "hifi" if head < HEADS - LOFI else "lofi", radius=2)
    canvas.text(x + 13, top - 12, f"{HEADS} heads", 14, bold=True)
    canvas.text(x + 13, top + HEADS * 15 + 17, f"α = {ALPHA}", 13, "muted")
    high = top + 15 * (HEADS - LOFI) / 2
    low = top + 15 * (HEADS + HEADS - LOFI) / 2
    canvas.line((x + 30, high), (x + 54, high), (x + 54, HIGH + LANE / 2), (LEFT - 3, HIGH + LANE / 2), colour="hifi", width=2, arrow=True)
    canvas.line((x + 30, low), (x + 54, low), (x + 54, LOW + LANE / 2), (LEFT - 3, LOW + LANE / 2), colour="lofi", width=2, arrow=True)


def _lane(canvas: Canvas, y: float, colour: str, title: str, lines: list[str]) -> None:
    canvas.rect(LEFT, y, RIGHT - LEFT, LANE, "panel", "faint", radius=8)
    canvas.text(LEFT + 16, y + 27, title, 16, colour, "start", bold=True)
    for i, line in enumerate(lines):
        canvas.text(RIGHT - 158, y + 82 + 20 * i, line, 13, "muted" if i > 1 else "ink", "start")


def _hifi(canvas: Canvas) -> None:
    lines = ["each s × s window", "attends to itself:", "fine detail nearby,", "exact"]
    _lane(canvas, HIGH, "hifi", "Hi-Fi: (1 − α) of the heads", lines)
    x, y, cell, gap = LEFT + 18, HIGH + 48, 15, 5
    _map(canvas, x, y, cell, SHADES, "hifi", gap)
    # One window, enlarged, with the attention between its tokens.
    left, top, size = x + WINDOW[1] * (S * cell + gap), y + WINDOW[0] * (S * cell + gap), S * cell - 1
    canvas.rect(left - 2, top - 2, size + 3, size + 3, "none", "ink", radius=3, line=1.5)
    big, step = x + 176, 38
    for corner, target in (((left + size + 2, top - 2), (big - 8, y + 20)), ((left + size + 2, top + size + 2), (big - 8, y + 112))):
        canvas.line(corner, target, colour="line", width=1, dashes="3 3")
    canvas.rect(big - 8, y + 20, 92, 92, "none", "ink", radius=5, line=1.5)
    cells = [(i, j) for i in range(S) for j in range(S)]
    centres = [(big + 18 + 40 * j, y + 46 + 40 * i) for i, j in cells]
    for i, first in enumerate(centres):
        for second in centres[:i]:
            canvas.line(first, second, colour="hifi", width=2.5, opacity=0.75)
    for (i, j), (cx, cy) in zip(cells, centres):
        shade = SHADES[WINDOW[0] * S + i][WINDOW[1] * S + j]
        canvas.rect(cx - step / 2 + 5, cy - step / 2 + 5, step - 10, step - 10, "panel", radius=4)
        canvas.rect(cx - step / 2 + 5, cy - step / 2 + 5, step - 10, step - 10, "hifi", "hifi", radius=4, opacity=0.12 + 0.88 * shade)


def _lofi(canvas: Canvas) -> None:
    lines = ["every position attends", "to every pooled cell:", "the whole image, with", "1/s² of the keys"]
    _lane(canvas, LOW, "lofi", "Lo-Fi: α of the heads", lines)
    x, y, cell = LEFT + 18, LOW + 48, 15
    _map(canvas, x, y, cell, SHADES, "lofi")
    canvas.text(x + 4 * cell - 1, y + 138, "queries", 12, "muted")
    pooled, top, big = x + 164, y + 10, 25
    query = x + QUERY[1] * cell + cell / 2 - 1, y + QUERY[0] * cell + cell / 2 - 1
    for i in range(SIDE // S):
        for j in range(SIDE // S):
            canvas.line(query, (pooled + j * big + big / 2, top + i * big + big / 2), colour="lofi", width=1, opacity=0.55)
    for i, values in enumerate(POOLED):
        for j, value in enumerate(values):
            for fill, opacity in (("panel", 1.0), ("lofi", 0.12 + 0.88 * value)):
                canvas.rect(pooled + j * big, top + i * big, big - 2, big - 2, fill, radius=3, opacity=opacity)
    canvas.rect(query[0] - cell / 2, query[1] - cell / 2, cell, cell, "lofi", "ink", radius=3, line=1.5)
    canvas.text(pooled + 2 * big - 1, y + 138, "keys, values: pooled s × s", 12, "muted")


def _output(canvas: Canvas) -> None:
    x, width = 764, 92
    top = HEIGHT / 2 - HEADS * 15 / 2
    for y, colour, heads in ((HIGH, "hifi", (HEADS - LOFI) / 2), (LOW, "lofi", (HEADS + HEADS - LOFI) / 2)):
        end = top + 15 * heads
        turn = RIGHT + 20
        canvas.line((RIGHT + 2, y + LANE / 2), (turn, y + LANE / 2), (turn, end), (x - 5, end), colour=colour, width=2, arrow=True)
    for head in range(HEADS):
        canvas.rect(x, top + 15 * head, width, 12, "hifi" if head < HEADS - LOFI else "lofi", radius=2)
    canvas.text(x + width / 2, top - 12, "concatenation", 14, bold=True)
    canvas.text(x + width / 2, top + HEADS * 15 + 17, "H × W, C channels", 13, "muted")
