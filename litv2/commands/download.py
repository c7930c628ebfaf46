# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 download NAME...: downloads files of the model zoo into torch.hub's folder."""

from __future__ import annotations

import argparse
import sys

from ..errors import UserError
from ..weights.download import fetch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME", help="a name from `python -m litv2 list`, or a URL")


def run(args: argparse.Namespace) -> int:
    failed = False
    for name in args.names:
        try:
            path = fetch(name)
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
        else:
            print(f"{name}  {path.stat().st_size / 1e6:.1f} MB  {path}")
    return int(failed)
