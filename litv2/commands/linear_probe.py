# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 linear-probe TRAIN.npz VAL.npz: the accuracy in VAL of a linear classifier that is fitted to the features in TRAIN."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..features import read_features
from ..probes import CS, FOLDS, accuracy, check_labelled, linear_probe
from . import print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=Path, metavar="TRAIN.npz", help="features of images to fit the classifier to, by `embed`")
    parser.add_argument("val", type=Path, metavar="VAL.npz", help="features of images to classify, by `embed` with the same checkpoint")
    parser.add_argument(
        "--C",
        type=float,
        help=f"inverse strength of the regularisation; default: by {FOLDS}-fold cross-validation in TRAIN, {CS[0]:g} to {CS[-1]:g}",
    )


def run(args: argparse.Namespace) -> None:
    train, val = read_features(args.train), read_features(args.val)
    print_notes(check_labelled(train, val))
    predicted, C, notes = linear_probe(train, val, args.C)
    print_notes(notes)
    print(f"C = {C:g}{' by cross-validation' if args.C is None else ''}: {accuracy(predicted, val)}")
