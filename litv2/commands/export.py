# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 export MODEL --format FORMAT: exports a model to another runtime and checks its outputs against the model's."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..classes import task_in
from ..errors import UserError
from ..export import FORMATS, classifier, export, pyramid, suffix
from ..export.settings import DYNAMIC, Network, Settings
from ..factory import load_model
from ..weights.releases import ZOO
from . import print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a name from `python -m litv2 list`, a classifier's checkpoint, or a configuration of detection/ or segmentation/",
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--checkpoint", metavar="FILE", help="weights: a file, a URL or a zoo name; default: those of MODEL")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: MODEL's name with the format's suffix, in the current folder")
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="image side, or height and width, in pixels; default: as published"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="batch size, unless it is dynamic; default: 1")
    parser.add_argument(
        "--dynamic",
        nargs="*",
        choices=DYNAMIC,
        metavar="WHAT",
        help="dimensions left dynamic: batch, size, both or none; default: all that the format supports",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16", "int8"))
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of real images for the comparison and for int8 calibration")
    parser.add_argument("--backbone", action="store_true", help="export only the backbone's feature maps, at strides 4 to 32")


def run(args: argparse.Namespace) -> None:
    network, size = _network(args.model, args.checkpoint, args.backbone)
    if args.img_size is not None:
        if len(args.img_size) > 2:
            raise UserError(f"--img-size {args.img_size}: expected one number, or height and width")
        size = (args.img_size[0], args.img_size[-1])
    settings = Settings(size, args.batch_size, args.dynamic, args.dtype, args.images)
    out = args.out or Path(Path(args.model).stem + ("_backbone" if args.backbone else "") + suffix(args.format))
    export(network, args.format, out, settings)
    print(f"written to {out}, the report to {out}.parity.json")


def _network(model: str, checkpoint: str | None, backbone: bool) -> tuple[Network, tuple[int, int]]:
    """Returns the network and its published image size."""
    entry = ZOO.get(model)
    if model.endswith(".py") or (entry is not None and entry.config is not None):
        from ..export.dense import from_config

        return from_config(model, checkpoint, backbone)
    if entry is None and checkpoint is not None:
        raise UserError(f"--checkpoint needs a zoo name or a configuration as MODEL, and {model!r} is neither (see python -m litv2 list)")
    loaded = load_model(checkpoint or model, name=model if entry else None)
    print_notes(loaded.notes)
    if not backbone and task_in(loaded.content) == "multi":
        print_notes(["its images have any number of classes: the file gives logits, which need a sigmoid, and not the thresholds"])
    return (pyramid if backbone else classifier)(loaded.model), (loaded.image_size, loaded.image_size)
