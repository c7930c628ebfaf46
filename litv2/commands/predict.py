"""python -m litv2 predict IMAGE... --checkpoint FILE: prints and draws the five most likely classes of each image, or of a multi-label
classifier those that it finds."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..explain.subjects import Classifier
from ..files import atomic_write, free_stem
from ..preprocess import read_image
from . import print_notes

if TYPE_CHECKING:
    from PIL import Image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="weights: a file, a URL or a zoo name")
    parser.add_argument("--model", metavar="NAME", help="model name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--img-size", type=int, metavar="N", help="image side in pixels; default: the checkpoint's, else 224")
    parser.add_argument(
        "--out", default=Path("predictions"), type=Path, metavar="DIR", help="folder for the annotated pictures; default: predictions"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    subject = Classifier(args.checkpoint, args.model, args.img_size)
    print_notes(subject.notes)
    subject.to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    failed = False
    used: set[str] = set()
    for path in args.images:
        try:
            image = read_image(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        confidence = subject.predict(subject.view(image))
        best = [(subject.names[i], confidence[i].item()) for i in subject.found(confidence)]
        target = args.out / f"{free_stem(path.stem, used)}.png"
        with atomic_write(target) as draft:
            _annotated(image, best).save(draft, format="PNG")
        print(f"{path} -> {target}")
        for name, share in best:
            print(f"  {share:7.2%}  {name}")
        if not best:
            print("  no class reaches its threshold")
    return int(failed)


def _annotated(image: Image.Image, best: list[tuple[str, float]]) -> Image.Image:
    """Draws the image and, to its right, a bar per class with its name and confidence."""
    from PIL import Image, ImageDraw, ImageFont

    height, panel, margin, row = 360, 420, 16, 64
    picture = image.resize((min(960, max(1, round(image.width * height / image.height))), height))
    canvas = Image.new("RGB", (picture.width + panel, height), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(18)
    left, width = picture.width + margin, panel - 2 * margin
    top = (height - row * len(best)) // 2
    for i, (name, share) in enumerate(best):
        y, figure = top + row * i, f"{share:.1%}"
        figure_width = draw.textlength(figure, font=font)
        draw.text((left, y), _shortened(name, lambda text: draw.textlength(text, font=font), width - figure_width - 12), "black", font)
        draw.text((left + width - figure_width, y), figure, "black", font)
        draw.rectangle((left, y + 28, left + width, y + 40), fill="#e6e6e6")
        draw.rectangle((left, y + 28, left + max(1, round(width * share)), y + 40), fill="#2a7de1" if i == 0 else "#8fb8ec")
    return canvas


def _shortened(text: str, length, room: float) -> str:
    text = " ".join(text.split())
    if length(text) <= room:
        return text
    while text and length(text + "...") > room:
        text = text[:-1]
    return text.rstrip(" ,") + "..."
