# SPDX-License-Identifier: Apache-2.0
"""What the commands that run a classifier on many images share: their flags, the loop over the images, and how the run ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..explain.subjects import Classifier
from ..image_batches import batches, usual_workers
from ..runs.failures import in_one_line
from . import print_notes

__all__ = [
    "add_classifier", "add_loading", "check_loading", "check_target", "load_classifier", "over_images", "report_unreadable", "shortened",
]  # fmt: skip


def add_classifier(parser: argparse._ActionsContainer, required: bool = True, otherwise: str = "") -> None:
    """``otherwise`` says what happens without a checkpoint."""
    parser.add_argument("--checkpoint", required=required, metavar="FILE", help=f"weights: a file, a URL or a zoo name{otherwise}")
    parser.add_argument("--model", metavar="NAME", help="model name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--img-size", type=int, metavar="N", help="image side in pixels; default: the checkpoint's, else 224")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images that are computed at once; default: %(default)s")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images, 0 for none; default: one per core up to 8, none for one batch"
    )


def check_loading(args: argparse.Namespace) -> None:
    """Raises UserError if --batch-size or --workers is wrong."""
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: expected at least 0")


def load_classifier(args: argparse.Namespace) -> Classifier:
    classifier = Classifier(args.checkpoint, args.model, args.img_size)
    print_notes(classifier.notes)
    classifier.to(args.device)
    return classifier


def check_target(path: Path | None) -> None:
    """Raises OSError if a file that is to be written at the end could not be: hours of work would be lost."""
    if path is not None and not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of {path} does not exist")
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")


def over_images(
    paths: list[Path],
    classifier: Classifier,
    compute: Callable[[Tensor], Tensor],
    args: argparse.Namespace,
    unreadable: list[str],
    progress: bool = True,
) -> Iterator[tuple[Path, Tensor]]:
    """Yields each image that can be read, in order, and its row of what ``compute`` makes of a batch.

    Args:
        unreadable: gets a line on each of the others.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        UserError: --batch-size or --workers is wrong, or the machine lacks something.
    """
    from tqdm import tqdm

    check_loading(args)
    workers = usual_workers(len(paths), args.batch_size) if args.workers is None else args.workers
    with in_one_line(), tqdm(total=len(paths), unit=" images", leave=False, disable=None if progress else True) as bar:
        for readable, images in batches(paths, classifier.transform, args.batch_size, workers, unreadable):
            yield from zip(readable, compute(images))
            bar.update(len(images))


def report_unreadable(unreadable: list[str], of: int) -> int:
    """Says which images could not be read, and returns the exit status: 1 if there are any."""
    for report in unreadable:
        print(f"error: {report}", file=sys.stderr)
    if unreadable and of > 1:
        print(f"{len(unreadable)} of {of} images cannot be read and are left out", file=sys.stderr)
    return int(bool(unreadable))


def shortened(text: str, length: Callable[[str], float], room: float) -> str:
    """Returns the text on one line, without its end where its ``length`` in a picture would be more than ``room``."""
    text = " ".join(text.split())
    if length(text) <= room:
        return text
    while text and length(text + "...") > room:
        text = text[:-1]
    return text.rstrip(" ,") + "..."
