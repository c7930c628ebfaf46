# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 convert IN OUT: writes the weights of a checkpoint as .pth or .safetensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackage, UserError
from ..files import atomic_write
from ..weights.reading import read_checkpoint
from ..weights.state_dict import find_weights
from . import read, which_weights

KEPT = ("class_names", "thresholds", "epoch", "max_accuracy", "config")  # entries that are kept along with the weights
# Keys of the trainer's configuration that hold paths of the machine that it ran on, which are nobody else's business.
PATHS = (("DATA", "DATA_PATH"), ("MODEL", "RESUME"), ("MODEL", "PRETRAINED"), ("OUTPUT",), ("BASE",))
LARGEST_ENTRY = 1 << 20  # characters; an entry of a hostile file may expand without end when it is written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="checkpoint in any supported format: a file, a URL or a zoo name")
    parser.add_argument("target", metavar="OUT", type=Path, help="NAME.pth or NAME.safetensors")
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="moving average (ema) or plain weights (model); default: ema if the checkpoint has one"
    )
    parser.add_argument(
        "--head", choices=("keep", "drop"), default="keep", help="drop: leave out the classifier; for a detector, keep only the backbone"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights; default: the checkpoint's")
    parser.add_argument("--force", action="store_true", help="overwrite OUT")


def run(args: argparse.Namespace) -> None:
    target = args.target
    if target.suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"{target} must end in .pth, .pt or .safetensors, which selects the format")
    if target.exists() and not args.force:
        raise UserError(f"{target} already exists; use --force to overwrite it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist")
    path, content = read(args.source)
    weights = find_weights(content, args.weights, backbone_only=args.head == "drop")
    if args.head == "drop":
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
    weights = {key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.items()}
    if args.dtype is not None:
        weights = {key: _cast(key, value, getattr(torch, args.dtype)) for key, value in weights.items()}
    entries, notes = _entries(content)

    with atomic_write(target) as draft:
        if target.suffix == ".safetensors":
            _write_safetensors(draft, weights, entries)
        else:
            # OpenMMLab's programs look for a detector's weights under this name.
            key = "state_dict" if any(name.startswith("backbone.") for name in weights) else "model"
            torch.save({key: weights, "meta": {}, **entries} if key == "state_dict" else {key: weights, **entries}, draft)
        _compare(find_weights(read_checkpoint(draft), backbone_only=False), weights)
    values = sum(value.numel() for value in weights.values())
    print(f"{path} -> {target}: {len(weights)} tensors, {values / 1e6:.3f} M values, {target.stat().st_size / 1e6:.1f} MB")
    print(f"weights: {which_weights(content) if args.weights is None else args.weights}; other entries: {', '.join(entries) or 'none'}")
    for note in notes:
        print(note)


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    cast = value.to(dtype) if value.is_floating_point() else value
    if cast.isinf().sum() > value.isinf().sum():
        raise UserError(f"{key} has values up to {value.abs().max().item():.3g}, too large for {dtype}; choose another --dtype")
    return cast


def _entries(content: dict) -> tuple[dict, list[str]]:
    """Returns the entries to keep, and a note on each one that cannot be kept."""
    meta = content.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    described = meta.get("dataset_meta")
    described = described if isinstance(described, dict) else meta
    names = next((described[key] for key in ("classes", "CLASSES") if key in described), None)
    found = {"class_names": names, "epoch": meta.get("epoch"), **content}
    kept, notes = {}, []
    for key in KEPT:
        if found.get(key) is None:
            continue
        try:
            kept[key] = json.loads(_json(found[key]))  # a copy
        except (TypeError, ValueError, RecursionError) as error:
            notes.append(f"not kept: {key} ({error})")
    for *groups, key in PATHS:
        place = kept.get("config")
        for group in groups:
            place = place.get(group) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place.pop(key, None)
    return kept, notes


def _json(value) -> str:
    text, length = [], 0
    for part in json.JSONEncoder().iterencode(value):
        text.append(part)
        length += len(part)
        if length > LARGEST_ENTRY:
            raise ValueError(f"longer than {LARGEST_ENTRY} characters")
    return "".join(text)


def _write_safetensors(path: Path, weights: dict[str, Tensor], entries: dict) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise MissingPackage("writing .safetensors needs the package safetensors: pip install safetensors") from error
    metadata = {"format": "pt", **{key: json.dumps(value) for key, value in entries.items()}}
    try:
        save_file(weights, path, metadata=metadata)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that it does not know
        kinds = ", ".join(sorted({str(value.dtype) for value in weights.values()}))
        raise UserError(f"safetensors cannot store weights of dtype {kinds}: {error}") from error


def _compare(written: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    for key, value in weights.items():
        again = written.get(key)
        if again is None or (again.shape, again.dtype) != (value.shape, value.dtype) or not torch.equal(_bytes(again), _bytes(value)):
            raise OSError(f"{key} differs when it is read back from the disk")


def _bytes(tensor: Tensor) -> Tensor:
    """Returns a tensor as bytes, in which NaN equals itself."""
    return tensor.flatten().view(torch.uint8)
