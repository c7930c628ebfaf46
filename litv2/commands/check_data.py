# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 check-data DIR: finds unreadable images, duplicates, leaks between the splits and suspicious labels before training."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data_check.duplicates import DISTANCE, LARGEST_DISTANCE, find_groups
from ..data_check.findings import Findings
from ..data_check.labels import suspicious_labels
from ..data_check.listing import find_images
from ..data_check.page import findings_page
from ..data_check.reading import read_images
from ..errors import UserError
from ..factory import load_model
from ..files import atomic_write
from ..preprocess import evaluation_transform
from . import print_notes, print_table

if TYPE_CHECKING:
    from PIL import Image

PAGE = "index.html"

PRINTED = 10  # of each kind
PRINTED_CLASSES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, or DIR/CLASS/IMAGE")
    parser.add_argument("--train-split", metavar="NAME", help="folder of the training images; default: train")
    parser.add_argument("--val-split", metavar="NAME", help="folder of the validation images; default: val")
    parser.add_argument("--checkpoint", metavar="FILE", help="a classifier that finds suspicious labels: a file, a URL or a zoo name")
    parser.add_argument("--model", metavar="NAME", help="model name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--img-size", type=int, metavar="N", help="image side in pixels; default: the checkpoint's, else 224")
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, metavar="BITS",
        help=f"bits of 256 in which near duplicates may differ, 0 to {LARGEST_DISTANCE}; default: {DISTANCE}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a page with pictures of the findings there")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read; 0: this one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.distance <= LARGEST_DISTANCE:
        raise UserError(f"--distance must be 0 to {LARGEST_DISTANCE} bits, got {args.distance}")
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {args.workers}")
    listing = find_images(args.folder, args.train_split, args.val_split)
    model = None if args.checkpoint is None else Features(args.checkpoint, args.model, args.img_size, args.device)
    readings = []
    for batch, images in read_images(listing.entries, args.workers, None if model is None else model.transform):
        readings += batch
        if model is not None and images is not None:
            model.add(images)
    good = [i for i, reading in enumerate(readings) if reading.problem is None]
    groups = find_groups([readings[i].pixels for i in good], [readings[i].bits for i in good], args.distance)
    findings = Findings(listing, readings, [replace(group, members=[good[i] for i in group.members]) for group in groups])
    if model is not None and good:
        found = suspicious_labels(torch.cat(model.found).numpy(), [readings[i].entry.label for i in good])
        findings.suspicions = [replace(suspicion, image=good[suspicion.image]) for suspicion in found]
    _print(findings)
    if args.json is not None:
        with atomic_write(args.json) as draft:
            draft.write_text(json.dumps(findings.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out / PAGE) as draft:
            draft.write_text(findings_page(findings), encoding="utf-8")
        print(f"-> {args.out / PAGE}")
    return int(any(findings.kinds.values()))


class Features:
    """What a classifier computes of images just before its last layer."""

    def __init__(self, checkpoint: str, name: str | None = None, side: int | None = None, device: str = "cpu"):
        loaded = load_model(checkpoint, name)
        print_notes(loaded.notes)
        self.model, self.device = loaded.model.eval().to(device), device
        channels = self.model.in_chans
        evaluation = evaluation_transform(side or loaded.image_size, loaded.crop, channels)
        self.transform = partial(_prepared, evaluation, "RGB" if channels == 3 else "L")
        self.found: list[Tensor] = []

    @torch.inference_mode()
    def add(self, images: Tensor) -> None:
        """Takes a batch (B, C, H, W)."""
        features = self.model.forward_head(self.model.forward_features(images.to(self.device)), pre_logits=True)
        self.found.append(features.float().cpu())


def _prepared(transform: Callable, mode: str, image: Image.Image) -> Tensor:
    return transform(image.convert(mode))


def _print(findings: Findings) -> None:
    print_table([tuple(row) for row in findings.overview()])
    heading, *classes = findings.class_table()
    half = PRINTED_CLASSES // 2
    shown = classes if len(classes) <= PRINTED_CLASSES else [*classes[:half], ["...", *[""] * (len(heading) - 1)], *classes[-half:]]
    print()
    print_table([tuple(row) for row in (heading, *shown)])
    print()
    for kind, lines in findings.kinds.items():
        print(f"{kind}: {len(lines)}")
        for line in lines[:PRINTED]:
            print(f"  {line}")
        if len(lines) > PRINTED:
            print(f"  ... and {len(lines) - PRINTED} more")
