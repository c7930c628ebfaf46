# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 knn TRAIN.npz VAL.npz: how often the nearest images in TRAIN know the class of an image in VAL."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..features import read_features
from ..probes import accuracy, check_labelled, vote
from . import print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("train", type=Path, metavar="TRAIN.npz", help="features of images whose classes are known, by `embed`")
    parser.add_argument("val", type=Path, metavar="VAL.npz", help="features of images to classify, by `embed` with the same checkpoint")
    parser.add_argument("--k", type=int, nargs="+", default=[20], metavar="K", help="neighbours, one or more numbers; default: 20")


def run(args: argparse.Namespace) -> None:
    train, val = read_features(args.train), read_features(args.val)
    print_notes(check_labelled(train, val))
    for k in args.k:
        print(f"k = {k}: {accuracy(vote(train, val, k), val)}")
