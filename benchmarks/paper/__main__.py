# SPDX-License-Identifier: Apache-2.0
"""Prints tables and figures of the paper: what it states beside what is counted and measured here.

    python -m benchmarks.paper                            # counts all of them
    python -m benchmarks.paper attention --measure        # one, and the images/s and memory of its models on this machine
    python -m benchmarks.paper --quick                    # measures all of them with few rounds and images
    python -m benchmarks.paper figure5 --images DIR       # from images of the classes that the checkpoint is for

* main: LITv2-S, M, B, and B at 384 x 384 pixels: parameters and multiply-adds;
* attention: other attention layers in the place of HiLo in LITv2-S (table 4);
* lit: from the predecessor LIT to LITv2 (table 5), and all of LIT's sizes;
* figure2: multiply-adds of Hi-Fi and Lo-Fi, with equally many heads, and of HiLo, by resolution and window;
* figure3: one attention layer against resolution: multiply-adds, images/s and memory in inference and in training;
* alpha: LITv2-S over the share of Lo-Fi heads (figure 4);
* figure5: the spectra of Hi-Fi and Lo-Fi;
* windows: window size in detectors;
* layers: one attention layer of fourteen kinds, on the CPU and, with --device cuda, on a GPU;
* detection, segmentation: parameters, multiply-adds and images/s; like windows they need OpenMMLab's packages.

Columns that start with "paper", "published", "release" or "RTX3090" are published, all others are counted, or with --measure measured,
here: parameters in M and multiply-adds in G, with the digits that the paper prints, and with more where they differ. Accuracies are the
published ones. Nothing is trained here. Writes JSON, CSV, Markdown and plots, and STEM.md, a page of all tables that are there.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import torch

from harness import ROOT, device_name, parser, positive, publish, say
from litv2.errors import UserError, run_program

from .measuring import Setting
from .tables import TABLES, write_page

QUICK = dict(measure=True, rounds=3, warm_up=1, batch_size=2)


def main() -> None:
    flags = parser(__doc__, "paper")
    flags.prog = "python -m benchmarks.paper"
    flags.add_argument("names", nargs="*", type=table_name, metavar="NAME", help=f"{', '.join(TABLES)} (default: all that are possible)")
    flags.add_argument("--measure", action="store_true", help="also measure images/s and memory, which takes long on a CPU")
    flags.add_argument("--quick", action="store_true", help="measure with batches of 2, 1 + 3 rounds, and maps of up to 56 x 56 in figure3")
    flags.add_argument("--device", type=device_name, default="cpu", help="of the measurements and of figure5")
    flags.add_argument("--batch-size", type=positive, default=8, help="of classifiers and of the table of layers (default: 8)")
    flags.add_argument(
        "--checkpoint",
        default=str(ROOT / "examples/litv2_imagenette.safetensors"),
        metavar="FILE",
        help="of figure5 (default: examples/litv2_imagenette.safetensors)",
    )
    flags.add_argument("--images", nargs="+", type=Path, default=[], metavar="IMAGE", help="of figure5: images, or folders of images")
    args = flags.parse_args()
    if args.quick:
        flags.set_defaults(**QUICK)  # a flag that is given counts
        args = flags.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    args.images = tuple(args.images)
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    left_out = {}
    for name in args.names or TABLES:
        table = TABLES[name]
        try:
            rows, draw = table.make(setting)
        except UserError as reason:
            if args.names:
                raise
            left_out[name] = str(reason)
            say(f"left out: {name}: {reason}")
            continue
        about = dict(batch_size=args.batch_size, rounds=args.rounds) if args.measure else {}
        publish(rows, args.out.with_name(f"{args.out.name}-{name}"), table.title, draw, table.text(setting), device=args.device, **about)
    print(f"collected in {write_page(args.out, left_out)}")


def table_name(text: str) -> str:
    """Parses an argument: a name of ``TABLES``."""
    if text not in TABLES:
        raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(TABLES)}")
    return text


if __name__ == "__main__":
    sys.exit(run_program(main))
