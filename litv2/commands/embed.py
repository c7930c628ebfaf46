# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 embed FOLDER --checkpoint FILE --out FEATURES.npz: the features of images before the head."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..features import Features, fingerprint, pyarrow, write_features
from ..image_list import image_list
from .images import add_classifier, add_loading, check_target, load_classifier, over_images, report_unreadable

SUFFIXES = (".npz", ".parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of images; the first folder below it is an image's class")
    add_classifier(parser)
    add_loading(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="FILE.npz, or FILE.parquet, which needs pyarrow")


def run(args: argparse.Namespace) -> int:
    if args.out.suffix not in SUFFIXES:
        raise UserError(f"--out {args.out} must end in {' or '.join(SUFFIXES)}, which selects the format")
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: expected a folder of images")
    check_target(args.out)
    if args.out.suffix == ".parquet":
        pyarrow()  # before hours of work
    paths = image_list([args.folder])
    classifier = load_classifier(args)
    unreadable: list[str] = []
    rows = list(over_images(paths, classifier, classifier.features, args, unreadable))
    if not rows:
        report_unreadable(unreadable, len(paths))
        raise UserError(f"{args.folder}: none of the {len(paths)} images can be read")
    content = Features(
        np.stack([row.numpy() for _, row in rows]),
        np.array([str(path) for path, _ in rows]),
        np.array([_class_of(path.relative_to(args.folder)) for path, _ in rows]),
        fingerprint(classifier.network, (classifier.size, classifier.crop)),
    )
    write_features(args.out, content)
    classes = len(set(content.classes.tolist()) - {""})
    images, channels = content.features.shape
    print(f"{images} images of {classes} classes, {channels} features each -> {args.out}")
    return report_unreadable(unreadable, len(paths))


def _class_of(path: Path) -> str:
    return path.parts[0] if len(path.parts) > 1 else ""
