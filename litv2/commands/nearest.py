# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 nearest FEATURES.npz IMAGE --checkpoint FILE: the images with the most similar features, listed and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, printable
from ..features import fingerprint, read_features
from ..files import atomic_write
from ..preprocess import read_image
from ..probes import nearest
from .images import add_classifier, check_target, load_classifier, shortened

if TYPE_CHECKING:
    from PIL import Image

SIDE = 180  # pixels of a picture in the strip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("features", type=Path, metavar="FEATURES.npz", help="features of the images to search, by `embed`")
    parser.add_argument("image", type=Path, metavar="IMAGE")
    add_classifier(parser)
    parser.add_argument("--top", type=int, default=8, metavar="K", help="images to show; default: %(default)s")
    parser.add_argument("--out", type=Path, default="nearest.png", metavar="FILE", help="picture of them; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    check_target(args.out)
    content = read_features(args.features)
    image = read_image(args.image)
    classifier = load_classifier(args)
    if content.model != fingerprint(classifier.network, (classifier.size, classifier.crop)):
        raise UserError(f"{args.features} has features of another checkpoint or image size than {args.checkpoint}'s; run `embed` with it")
    query = classifier.features(classifier.view(image).tensor)[0].numpy()
    found = nearest(content, query, args.top)
    for i, similarity in found:
        print(printable(f"{similarity:.4f}  {content.images[i]}"))
    captions = [f"{similarity:.3f} {content.classes[i]}" for i, similarity in found]
    pictures = [read_image(Path(content.images[i])) for i, _ in found]  # where `embed` found them, from the same folder
    with atomic_write(args.out) as draft:
        _strip([image, *pictures], ["searched", *captions]).save(draft, format="PNG")
    print(f"-> {args.out}")


def _strip(pictures: list[Image.Image], captions: list[str]) -> Image.Image:
    """Draws pictures in a row, with a caption below each."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    margin, line = 6, 20
    canvas = Image.new("RGB", (margin + (SIDE + margin) * len(pictures), SIDE + 2 * margin + line), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i, (picture, caption) in enumerate(zip(pictures, captions)):
        left = margin + (SIDE + margin) * i
        canvas.paste(ImageOps.pad(picture, (SIDE, SIDE), color="white"), (left, margin))
        draw.text((left, SIDE + margin + 2), shortened(caption, lambda text: draw.textlength(text, font=font), SIDE), "black", font)
    return canvas
