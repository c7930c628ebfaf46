# SPDX-License-Identifier: Apache-2.0
"""Draws LITv2-S: image, patch embedding, four stages with deformable token merging in between, head; below, the blocks of the stages."""

from __future__ import annotations

from canvas import WIDTH, Canvas

HEIGHT = 492
# Of LITv2-S at 224 x 224 pixels; tests/docs compares them with the model.
CHANNELS, DEPTHS, WINDOWS = (96, 192, 384, 768), (2, 2, 6, 2), (0, 0, 2, 1)
STRIDES, SIDES = (4, 8, 16, 32), (56, 28, 14, 7)
MIDDLE = 124  # y coordinate of the row of maps
STAGES = (246, 396, 546, 692)  # x coordinates of their centres
SIZES = (96, 72, 52, 36)  # sides of the drawn maps
DEPTH = (10, 16, 24, 34)  # of the drawn maps: channels
FACES = (("conv", "conv"), ("conv", "conv"), ("hifi", "lofi"), ("lofi", "lofi"))  # window 1: all heads are Lo-Fi


def draw(theme: str) -> str:
    canvas = Canvas(theme, HEIGHT, "LITv2: patch embedding, two stages of ConvFFN blocks, two stages of HiLo and ConvFFN blocks, head")
    _image(canvas, 58)
    canvas.line((112, MIDDLE), (186, MIDDLE), arrow=True)
    canvas.text(149, MIDDLE - 27, "4 × 4", 12, "muted")
    canvas.text(149, MIDDLE - 12, "patches", 12, "muted")
    for number, x in enumerate(STAGES):
        _stage(canvas, number, x)
    for first, second in zip(range(3), range(1, 4)):
        start = STAGES[first] + (SIZES[first] + DEPTH[first]) / 2 + 6
        end = STAGES[second] - (SIZES[second] + DEPTH[second]) / 2 - 6
        canvas.line((start, MIDDLE), (end, MIDDLE), colour="merge", width=2, arrow=True)
        canvas.text((start + end) / 2, MIDDLE - 12, "DTM", 12, "merge", bold=True)
    canvas.line((STAGES[3] + 42, MIDDLE), (774, MIDDLE), arrow=True)
    canvas.rect(778, MIDDLE - 38, 90, 76, "panel", "line", radius=6)
    for i, words in enumerate(("LayerNorm", "mean", "linear")):
        canvas.text(823, MIDDLE - 15 + 21 * i, words, 13)
    canvas.text(823, 222, "classes", 14, bold=True)
    canvas.line((16, 284), (WIDTH - 16, 284), colour="faint", width=1)
    _block(canvas, 16, "conv", "Block of stages 1 and 2", attention=False)
    _block(canvas, 310, "lofi", "Block of stages 3 and 4", attention=True)
    _parts(canvas)
    return canvas.svg()


def _image(canvas: Canvas, x: float) -> None:
    left, top = x - 48, MIDDLE - 48
    canvas.rect(left, top, 96, 96, "panel", "line", radius=4)
    canvas.circle(left + 70, top + 26, 11, "hifi")
    canvas.polygon([(left + 1, top + 95), (left + 36, top + 40), (left + 68, top + 95)], "line", 0.75)
    canvas.polygon([(left + 44, top + 95), (left + 72, top + 58), (left + 95, top + 88), (left + 95, top + 95)], "line", 1.0)
    canvas.text(x, 222, "image", 14, bold=True)
    canvas.text(x, 241, "224 × 224 × 3", 13, "muted")


def _stage(canvas: Canvas, number: int, x: float) -> None:
    """Draws a map as a box whose side shrinks and whose depth grows; orange and blue are the shares of the Hi-Fi and Lo-Fi heads."""
    size, depth = SIZES[number], DEPTH[number]
    left, top = x - (size + depth) / 2, MIDDLE - (size - depth) / 2
    right, bottom = left + size, top + size
    upper, lower = FACES[number]
    canvas.polygon([(left, top), (left + depth, top - depth), (right + depth, top - depth), (right, top)], upper, 0.35)
    canvas.polygon([(right, top), (right + depth, top - depth), (right + depth, bottom - depth), (right, bottom)], lower, 0.55)
    canvas.rect(left, top, size, size, lower, opacity=0.9)
    if upper != lower:
        canvas.rect(left, top, size, size * 2 / 12, upper)  # 2 of 12 heads
    canvas.text(x, 26, f"stage {number + 1}", 14, bold=True)
    canvas.text(x, 45, "HiLo + ConvFFN" if WINDOWS[number] else "ConvFFN", 13, lower, bold=True)
    window = f", s = {WINDOWS[number]}" if WINDOWS[number] else ""
    canvas.text(x, 222, f"{DEPTHS[number]} blocks{window}", 14, bold=True)
    canvas.text(x, 242, f"{SIDES[number]} × {SIDES[number]} × {CHANNELS[number]}", 13, "muted")
    canvas.text(x, 261, f"stride {STRIDES[number]}", 13, "muted")


def _block(canvas: Canvas, x: float, colour: str, title: str, attention: bool) -> None:
    """Draws the residual branches from left to right, with the skip connection above each."""
    y = 374
    canvas.text(x, 316, title, 15, colour, "start", bold=True)
    for name, width, fill in ([("HiLo", 54, "lofi")] if attention else []) + [("ConvFFN", 74, "conv")]:
        norm, layer, plus = x + 26, x + 26 + 46 + 16, x + 26 + 46 + 16 + width + 20
        for start, end in ((x, norm - 2), (norm + 46, layer - 2), (layer + width, plus - 10)):
            canvas.line((start, y), (end, y), arrow=True)
        canvas.line((x + 10, y), (x + 10, y - 34), (plus, y - 34), (plus, y - 10), arrow=True)
        canvas.rect(norm, y - 17, 46, 34, "panel", "line", radius=5)
        canvas.text(norm + 23, y + 5, "norm", 13)
        canvas.rect(layer, y - 17, width, 34, fill, radius=5)
        canvas.text(layer + width / 2, y + 5, name, 13, "paper", bold=True)
        canvas.circle(plus, y, 8, "paper", "line", 1.5)
        canvas.text(plus, y + 5, "+", 15)
        x = plus + 8
    canvas.line((x, y), (x + 18, y), arrow=True)


def _parts(canvas: Canvas) -> None:
    parts = (
        (16, "conv", "ConvFFN", ("linear C → 4C, depthwise 3 × 3", "convolution, GELU, linear 4C → C")),
        (310, "lofi", "HiLo", ("windows of s × s tokens; s = 1 is", "plain attention over the small map")),
        (604, "merge", "DTM: deformable token merging", ("deformable 2 × 2 convolution with", "stride 2, batch norm, GELU")),
    )
    for x, colour, name, lines in parts:
        canvas.text(x, 440, name, 14, colour, "start", bold=True)
        for i, line in enumerate(lines):
            canvas.text(x, 460 + 18 * i, line, 13, "muted", "start")
