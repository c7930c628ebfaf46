# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 info FILE: describes a checkpoint from its content alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..factory import VARIANTS
from ..weights.architecture import infer_arguments
from ..weights.formats import check_format
from ..weights.releases import ZOO, Release
from ..weights.state_dict import find_weights
from . import print_table, read, which_weights

FORMATS = {"zip": "torch.save", "legacy": "torch.save, before torch 1.6", "safetensors": "safetensors"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
HEADS = {  # a weight that only this kind of model has
    "bbox_head.retina_cls.weight": "RetinaNet",
    "roi_head.mask_head.conv_logits.weight": "Mask R-CNN",
    "decode_head.conv_seg.weight": "Semantic FPN",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="a file, a URL or a zoo name")


def run(args: argparse.Namespace) -> None:
    path, content = read(args.source)
    everything = find_weights(content, backbone_only=False)
    weights = find_weights(content)
    parameters = sum(value.numel() for key, value in everything.items() if not key.endswith(BUFFERS))
    rows = [
        ("file", f"{path}, {path.stat().st_size / 1e6:.1f} MB"),
        ("format", FORMATS[check_format(path)]),
        ("entries", ", ".join(sorted(str(key)[:50] for key in content)[:20])),
    ]
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}
    for key, value in (("epoch", content.get("epoch", meta.get("epoch"))), ("accuracy", content.get("max_accuracy"))):
        if isinstance(value, (int, float)):
            rows.append((key, str(value)))
    if isinstance(content.get("class_names"), list):
        names = [str(name)[:30] for name in content["class_names"][:5]]
        rows.append(("classes", f"{len(content['class_names'])}: {', '.join(names)}" + (" ..." if len(names) == 5 else "")))
    rows += [
        ("weights", f"{len(everything)} tensors, {which_weights(content)}"),
        ("parameters", f"{parameters / 1e6:.3f} M"),
        ("dtype", ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in everything.values()}))),
        *_model(path, content, everything, weights),
    ]
    print_table(rows)


def _model(path: Path, content: dict, everything: dict[str, Tensor], weights: dict[str, Tensor]) -> list[tuple]:
    try:
        arguments, guessed = infer_arguments(weights, content.get("config"))
    except ValueError as error:
        return [("model", f"unknown: {error}")]
    head = next((name for key, name in HEADS.items() if key in everything), None)
    variant = _variant(arguments)
    shape = f"{arguments['embed_dim']} channels, blocks {' '.join(map(str, arguments['depths']))}"
    entries = [entry for entry in ZOO.values() if _fits(entry, arguments, variant, everything)]
    named = [entry for entry in entries if entry.file == path.name]
    windows, source = arguments["local_ws"], "assumed: the shapes do not determine them" if guessed else "from the file's configuration"
    if named:
        windows, source = named[0].window, "as published"
    heads = " ".join(map(str, arguments["num_heads"]))
    attention = [("heads", f"{heads}; alpha {arguments['alpha']:.3g}"), ("windows", f"{' '.join(map(str, windows))} ({source})")]
    if arguments["attention"] != "hilo":
        attention = [("heads", heads), ("attention", arguments["attention"])]
    rows = [
        ("model", f"LITv2-{variant[0].upper()} ({shape})" if variant else f"a custom LITv2 ({shape})"),
        *attention,
        ("image", "RGB" if arguments["in_chans"] == 3 else f"{arguments['in_chans']} channels"),
        ("classifier", f"{arguments['num_classes']} classes" if arguments["num_classes"] else head or "none"),
    ]
    for entry in named or entries:
        figures = ", ".join(f"{metric} {figure}" for metric, figure in entry.figures.items())
        rows.append(("published" if named else "shaped like", f"{entry.name}: {figures} at {'x'.join(map(str, entry.image_size))}"))
    return rows


def _variant(arguments: dict) -> str | None:
    with torch.device("meta"):  # only shapes are needed
        shapes = {name: infer_arguments(make().state_dict())[0] for name, make in VARIANTS.items()}
    same = ("embed_dim", "depths", "num_heads", "attention", "conv_ffn")
    return next((name for name, shape in shapes.items() if all(shape[key] == arguments[key] for key in same)), None)


def _fits(entry: Release, arguments: dict, variant: str | None, everything: dict[str, Tensor]) -> bool:
    if entry.variant != variant or int(arguments["num_heads"][2] * entry.alpha) != int(arguments["num_heads"][2] * arguments["alpha"]):
        return False
    if entry.task == "classification":
        return arguments["num_classes"] == 1000
    heads = {"retinanet": "RetinaNet", "mask_rcnn": "Mask R-CNN"}
    head = next((name for start, name in heads.items() if entry.name.startswith(start)), "Semantic FPN")
    return any(key in everything for key, name in HEADS.items() if name == head)
