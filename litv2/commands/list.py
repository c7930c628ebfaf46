# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 list: prints the model zoo as a table."""

from __future__ import annotations

import argparse

from ..weights.download import cache_folder
from ..weights.releases import ZOO
from . import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=("classification", "detection", "segmentation"), help="list only the models of this task")
    parser.add_argument("--urls", action="store_true", help="also show the URL of each file")


def run(args: argparse.Namespace) -> None:
    entries = [entry for entry in ZOO.values() if args.task in (None, entry.task)]
    rows = [("name", "task", "variant", "alpha", "windows", "image", "published", "here", "url" if args.urls else "file")]
    for entry in entries:
        figures = ", ".join(f"{metric} {figure}" for metric, figure in entry.figures.items())
        image, windows = "x".join(map(str, entry.image_size)), " ".join(map(str, entry.window))
        here = "yes" if (cache_folder() / entry.file).exists() else ""
        address = entry.url if args.urls else entry.file
        rows.append((entry.name, entry.task, entry.variant, str(entry.alpha), windows, image, figures, here, address))
    print_table(rows)
    print(f"\n{len(entries)} files. Every command, --pretrained and init_cfg accept these names and download the files to")
    print(f"{cache_folder()}. alpha: share of Lo-Fi heads; windows: side per stage, 0 = no attention; image: height x width.")
