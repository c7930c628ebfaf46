# SPDX-License-Identifier: Apache-2.0
"""Plots the published accuracy against the measured speed, from the two tables of `benchmarks/models.py` in docs/speed.md."""

from __future__ import annotations

from pathlib import Path

from canvas import WIDTH, Canvas
from markdown_tables import tables

HEIGHT = 430
SPEED = Path(__file__).resolve().parents[1] / "speed.md"
TOP, BOTTOM = 62, 340  # of the axes
PANELS = (  # left and right ends; ranges of images/s and of top-1; the title
    (40, 424, (2, 22), (79.9, 84.2), "Models of the paper"),
    (484, 868, (8, 32), (81.4, 84.2), "Newer models"),
)
PLACES = dict(  # position of a name relative to its point: shift in pixels, and anchor
    right=(9, 4, "start"),
    left=(-9, 4, "end"),
    above=(0, -10, "middle"),
    below=(0, 19, "middle"),
    upper=(8, -7, "start"),
    corner=(-4, -9, "end"),
)
PLACE = {  # default: to the right
    "LITv2-S": "below", "LITv2-M": "upper", "LITv2-B": "upper", "ResNet-50": "below", "PVTv2-B2": "corner", "ConvNeXt-T": "above",
    "CoAtNet-0": "left", "CaiT-XS24": "left", "Swin-T": "left", "XCiT-S12/16": "below", "Hiera-T": "left", "RepViT-M1.5": "below",
}  # fmt: skip


def points() -> list[list[tuple[str, float, float]]]:
    """Returns (model, top-1 in percent, images/s) for each table of the document that has these columns."""
    top1, speed = "top-1, published", "images/s"
    return [[(row["model"], float(row[top1]), float(row[speed])) for row in rows] for rows in tables(SPEED, top1, speed)]


def draw(theme: str) -> str:
    canvas = Canvas(theme, HEIGHT, "Top-1 accuracy on ImageNet against images per second of LITv2 and of other models")
    for panel, rows in zip(PANELS, points(), strict=True):
        _panel(canvas, *panel, rows)
    about = "two threads of an AMD EPYC (Zen 3), batch 8, 224 × 224, float32, each model in its fastest mode"
    canvas.text(WIDTH / 2, HEIGHT - 32, f"images/s on {about}", 12, "muted")
    canvas.text(WIDTH / 2, HEIGHT - 13, "the two sides were measured on different days: compare within one of them", 12, "muted")
    return canvas.svg()


def _panel(canvas: Canvas, left: float, right: float, speeds: tuple, accuracies: tuple, title: str, rows: list) -> None:
    def x(speed: float) -> float:
        return left + (speed - speeds[0]) / (speeds[1] - speeds[0]) * (right - left)

    def y(top1: float) -> float:
        return BOTTOM - (top1 - accuracies[0]) / (accuracies[1] - accuracies[0]) * (BOTTOM - TOP)

    canvas.text(left, 24, title, 15, anchor="start", bold=True)
    canvas.text(left, 48, "top-1 on ImageNet, published, %", 12, "muted", "start")
    for top1 in range(80, 85):
        if accuracies[0] <= top1 <= accuracies[1]:
            canvas.line((left, y(top1)), (right, y(top1)), colour="faint", width=1)
            canvas.text(left - 8, y(top1) + 4, str(top1), 12, "muted", "end")
    for speed in range(-(-speeds[0] // 4) * 4, speeds[1] + 1, 4):
        canvas.line((x(speed), BOTTOM), (x(speed), BOTTOM + 5), colour="line", width=1)
        canvas.text(x(speed), BOTTOM + 20, str(speed), 12, "muted")
    canvas.line((left, BOTTOM), (right, BOTTOM), colour="line", width=1)

    ours = [row for row in rows if row[0].startswith("LITv2")]
    if len(ours) > 1:
        canvas.line(*((x(speed), y(top1)) for _, top1, speed in ours), colour="hifi", width=2)
    for name, top1, speed in rows:
        own = name.startswith("LITv2")
        canvas.circle(x(speed), y(top1), 6 if own else 4.5, "hifi" if own else "lofi", "paper", 1)
        dx, dy, anchor = PLACES[PLACE.get(name, "right")]
        canvas.text(x(speed) + dx, y(top1) + dy, name, 13 if own else 12, "hifi" if own else "ink", anchor, bold=own)
