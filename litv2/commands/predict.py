# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 predict FOLDER --checkpoint FILE: the most likely classes of images, or of a multi-label classifier those
that it finds, printed and drawn, or as a table."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import UserError, printable
from ..files import atomic_write, free_stem
from ..image_list import image_list
from ..inference.fastest import optimize, why_not
from ..preprocess import read_image
from . import or_small, print_notes
from .images import add_classifier, add_loading, check_loading, check_target, load_classifier, over_images, report_unreadable, shortened

if TYPE_CHECKING:
    from PIL import Image

    from ..explain.subjects import Classifier

FORMS = "native", "graph", "fused"  # of litv2.optimize: those that are built in seconds
Best = list[tuple[str, float]]  # classes and their shares, the most likely first
Write = Callable[[Path, Best], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="images, folders, patterns in quotes, or - for paths on the standard input, one per line"
    )
    add_classifier(parser, required=False, otherwise="; default: the small one of examples/")
    add_loading(parser)
    parser.add_argument("--fast", action="store_true", help="compute with the fastest form of the model that needs no compilation")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image; default: %(default)s")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table with the columns image, class1, share1, class2, ...")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write JSON lines: a JSON object per image")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the annotated pictures; default: predictions, and none with --csv or --json"
    )


def run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise UserError(f"--top {args.top}: expected at least 1")
    for target in (args.csv, args.json):
        check_target(target)
    if args.csv is not None and args.csv == args.json:
        raise UserError(f"--csv and --json are both {args.csv}; expected two files")
    paths = image_list(args.images)
    check_loading(args)
    args.checkpoint = or_small(args.checkpoint)
    classifier = load_classifier(args)
    if args.fast:
        use_fastest(classifier, min(args.batch_size, len(paths)))
    top = min(args.top, len(classifier.names))
    unreadable: list[str] = []
    with ExitStack() as files:
        writers = []
        if args.csv is not None:
            writers.append(files.enter_context(_csv(args.csv, top)))
        if args.json is not None:
            writers.append(files.enter_context(_json(args.json)))
        tables_alone = bool(writers) and args.out is None
        draw = None if tables_alone else _pictures(args.out or Path("predictions"))
        for path, confidence in over_images(paths, classifier, classifier.confidences, args, unreadable, progress=tables_alone):
            order = confidence.argsort(descending=True).tolist()
            shown = order[:top] if classifier.thresholds is None else classifier.found(confidence)
            for write in writers:
                write(path, [(classifier.names[i], confidence[i].item()) for i in order[:top]])
            if draw is not None:
                draw(path, [(classifier.names[i], confidence[i].item()) for i in shown])
    for table in filter(None, (args.csv, args.json)):
        print(f"{len(paths) - len(unreadable)} images -> {table}")
    return report_unreadable(unreadable, len(paths))


def use_fastest(classifier: Classifier, batch: int) -> None:
    """Has the fastest form of ``FORMS`` for so many images at once compute the predictions."""
    side, channels = classifier.size, classifier.network.in_chans
    example = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(classifier.device)
    forms = [form for form in FORMS if not why_not(form, example)]
    fast = optimize(classifier.network, example, forms=forms, report=None)
    error, gain = fast.errors[fast.form], fast.seconds["plain"] / fast.seconds[fast.form]
    print_notes([f"--fast: the form {fast.form} is {gain:.1f} times as fast as the model; its error is {error:.0e} of the largest output"])
    classifier.model = fast


@contextmanager
def _csv(target: Path, top: int) -> Iterator[Write]:
    # Names of files that are no text are written as the bytes that they are.
    with atomic_write(target) as draft, open(draft, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["image", *(f"{what}{i + 1}" for i in range(top) for what in ("class", "share"))])
        yield lambda path, best: table.writerow([path, *(value for name, share in best for value in (name, f"{share:.6f}"))])


@contextmanager
def _json(target: Path) -> Iterator[Write]:
    with atomic_write(target) as draft, open(draft, "w", encoding="utf-8") as file:

        def write(path: Path, best: Best) -> None:
            classes = [{"class": name, "share": round(share, 6)} for name, share in best]
            file.write(json.dumps({"image": str(path), "classes": classes}) + "\n")

        yield write


def _pictures(folder: Path) -> Write:
    """Prints the classes and draws a picture of each image."""
    folder.mkdir(parents=True, exist_ok=True)
    used: set[str] = set()

    def write(path: Path, best: Best) -> None:
        target = folder / f"{free_stem(path.stem, used)}.png"
        with atomic_write(target) as draft:
            _annotated(read_image(path), best).save(draft, format="PNG")
        print(printable(f"{path} -> {target}"))
        for name, share in best:
            print(printable(f"  {share:7.2%}  {name}"))
        if not best:
            print("  no class reaches its threshold")

    return write


def _annotated(image: Image.Image, best: Best) -> Image.Image:
    """Draws the image and, to its right, a bar per class with its name and confidence."""
    from PIL import Image, ImageDraw, ImageFont

    height, panel, margin, row = 360, 420, 16, 64
    picture = image.resize((min(960, max(1, round(image.width * height / image.height))), height))
    whole = max(height, row * len(best))
    canvas = Image.new("RGB", (picture.width + panel, whole), "white")
    canvas.paste(picture, (0, (whole - height) // 2))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(18)
    left, width = picture.width + margin, panel - 2 * margin
    top = (whole - row * len(best)) // 2
    for i, (name, share) in enumerate(best):
        y, figure = top + row * i, f"{share:.1%}"
        figure_width = draw.textlength(figure, font=font)
        draw.text((left, y), shortened(name, lambda text: draw.textlength(text, font=font), width - figure_width - 12), "black", font)
        draw.text((left + width - figure_width, y), figure, "black", font)
        draw.rectangle((left, y + 28, left + width, y + 40), fill="#e6e6e6")
        draw.rectangle((left, y + 28, left + max(1, round(width * share)), y + 40), fill="#2a7de1" if i == 0 else "#8fb8ec")
    return canvas
