# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 check-data DIR: finds unreadable images, duplicates, leaks between the splits and suspicious labels before training."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ..data_check.duplicates import DISTANCE, LARGEST_DISTANCE, find_groups
from ..data_check.findings import Findings
from ..data_check.labels import suspicious_labels
from ..data_check.listing import find_images
from ..data_check.page import findings_page
from ..data_check.reading import read_images
from ..errors import UserError, printable
from ..files import atomic_write
from . import print_table
from .images import add_classifier, check_target, load_classifier

PAGE = "index.html"

PRINTED = 10  # of each kind
PRINTED_CLASSES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, or DIR/CLASS/IMAGE")
    parser.add_argument("--train-split", metavar="NAME", help="folder of the training images; default: train")
    parser.add_argument("--val-split", metavar="NAME", help="folder of the validation images; default: val")
    add_classifier(parser.add_argument_group("suspicious labels, found by the features of a classifier"), required=False)
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, metavar="BITS",
        help=f"bits of 256 in which near duplicates may differ, 0 to {LARGEST_DISTANCE}; default: {DISTANCE}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write a page with pictures of the findings there")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="processes that read; 0: this one")


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.distance <= LARGEST_DISTANCE:
        raise UserError(f"--distance must be 0 to {LARGEST_DISTANCE} bits, got {args.distance}")
    if args.workers < 0:
        raise UserError(f"--workers must be 0 or more, got {args.workers}")
    check_target(args.json)
    listing = find_images(args.folder, args.train_split, args.val_split)
    classifier = None if args.checkpoint is None else load_classifier(args)
    readings, features = [], []
    for batch, images in read_images(listing.entries, args.workers, None if classifier is None else classifier.transform):
        readings += batch
        if classifier is not None and images is not None:
            features.append(classifier.features(images))
    good = [i for i, reading in enumerate(readings) if reading.problem is None]
    groups = find_groups([readings[i].pixels for i in good], [readings[i].bits for i in good], args.distance)
    findings = Findings(listing, readings, [replace(group, members=[good[i] for i in group.members]) for group in groups])
    if features:
        found = suspicious_labels(torch.cat(features).numpy(), [readings[i].entry.label for i in good])
        findings.suspicions = [replace(suspicion, image=good[suspicion.image]) for suspicion in found]
    _print(findings)
    if args.json is not None:
        with atomic_write(args.json) as draft:
            draft.write_text(json.dumps(findings.to_dict(), indent=1) + "\n", encoding="utf-8")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out / PAGE) as draft:
            draft.write_text(findings_page(findings), encoding="utf-8", errors="replace")  # names of files need not be text
        print(f"-> {args.out / PAGE}")
    return int(any(findings.kinds.values()))


def _printable(rows: Iterable[Iterable]) -> list[tuple]:
    return [tuple(printable(str(cell)) for cell in row) for row in rows]


def _print(findings: Findings) -> None:
    """Names of files may hold anything, and so may those of classes."""
    print_table(_printable(findings.overview()))
    heading, *classes = findings.class_table()
    half = PRINTED_CLASSES // 2
    shown = classes if len(classes) <= PRINTED_CLASSES else [*classes[:half], ["...", *[""] * (len(heading) - 1)], *classes[-half:]]
    print()
    print_table(_printable([heading, *shown]))
    print()
    for kind, lines in findings.kinds.items():
        print(f"{kind}: {len(lines)}")
        for line in lines[:PRINTED]:
            print(printable(f"  {line}"))
        if len(lines) > PRINTED:
            print(f"  ... and {len(lines) - PRINTED} more")
