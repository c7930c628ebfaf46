# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 demo: a page on this machine where a person tries a model and looks inside it."""

from __future__ import annotations

import argparse
import ipaddress
import sys
from pathlib import Path

import torch

from ..errors import MissingPackage, UserError
from . import or_small, print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="FILE", help="weights: a file, a URL or a zoo name; default: the small one of examples/")
    parser.add_argument("--model", metavar="NAME", help="a classifier's name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--config", metavar="FILE", help="configuration of a detector or segmenter; default: that in the file's name")
    parser.add_argument("--img-size", type=int, metavar="N", help="side of a classifier's images in pixels; default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: %(default)s, which only this machine reaches")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--max-mb", type=int, default=20, metavar="N", help="size of an uploaded file at most; default: %(default)s")


def run(args: argparse.Namespace) -> None:
    try:
        from ..explain import page
        from ..explain.loading import load_subject
    except MissingPackage:
        raise
    except ImportError as error:
        raise MissingPackage(f"{error}; the page needs: pip install 'litv2[demo]'") from error
    if args.max_mb < 1 or not (args.port is None or 0 < args.port < 65536):
        raise UserError(f"--max-mb {args.max_mb} must be at least 1, and --port {args.port} one of 1 to 65535")
    checkpoint = or_small(args.checkpoint)
    subject = load_subject(checkpoint, args.model, args.config, args.img_size, args.device)
    print_notes(subject.notes)
    if not _is_loopback(args.host):
        print(f"warning: everyone who can reach {args.host} can use the page and upload images; it has no password", file=sys.stderr)
    page.serve(subject, f"LITv2: {Path(checkpoint).stem}", args.host, args.port, args.max_mb)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
