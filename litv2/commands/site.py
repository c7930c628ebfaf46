# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 site --checkpoint FILE: writes a page that classifies images in the browser, without a server of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import MissingPackage
from . import print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="a classifier's weights: a file, a URL or a zoo name")
    parser.add_argument("--model", metavar="NAME", help="model name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--img-size", type=int, metavar="N", help="image side in pixels; default: the checkpoint's, else 224")
    parser.add_argument("--out", default=Path("output/site"), type=Path, metavar="DIR", help="folder of the page; default: output/site")


def run(args: argparse.Namespace) -> None:
    try:
        from ..explain.site import write_site
        from ..explain.subjects import Classifier
    except ImportError as error:
        raise MissingPackage(f"{error}; the page needs: pip install 'litv2[onnx,explain]'") from error
    classifier = Classifier(args.checkpoint, args.model, args.img_size)
    print_notes(classifier.notes)
    write_site(classifier, args.out)
    print(f"written to {args.out}; to see it: python -m http.server --bind 127.0.0.1 --directory {args.out}")
