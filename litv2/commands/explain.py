# SPDX-License-Identifier: Apache-2.0
"""python -m litv2 explain IMAGE... --checkpoint FILE: pictures and arrays of what a model does inside."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MissingPackage, UserError, printable
from ..files import atomic_write, free_stem
from ..image_list import image_list
from ..preprocess import read_image
from . import or_small, print_notes, print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..explain.subjects import Subject, View

WHAT = ("spectrum", "attention", "offsets", "cam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path, help="images, or folders of images")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights: a file, a URL or a zoo name; default: the small one of examples/")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="default: all")
    parser.add_argument(
        "--at",
        type=float,
        nargs=2,
        action="append",
        metavar=("X", "Y"),
        help="position, in pixels of the image, for attention and offsets; may be repeated; default: the strongest response",
    )
    parser.add_argument("--out", default=Path("explained"), type=Path, metavar="DIR", help="folder for the pictures; default: explained")
    parser.add_argument("--model", metavar="NAME", help="a classifier's name in the zoo; default: inferred from the shapes of the weights")
    parser.add_argument("--config", metavar="FILE", help="configuration of a detector or segmenter; default: that in the file's name")
    parser.add_argument("--img-size", type=int, metavar="N", help="side of a classifier's images in pixels; default: the checkpoint's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> int:
    try:
        from ..explain.loading import load_subject
    except ImportError as error:
        raise MissingPackage(f"{error}; explain needs: pip install 'litv2[explain]'") from error
    subject = load_subject(or_small(args.checkpoint), args.model, args.config, args.img_size, args.device)
    print_notes(subject.notes)
    paths, unreadable = image_list(args.images), set[Path]()
    args.out.mkdir(parents=True, exist_ok=True)
    if "spectrum" in args.what:
        _spectrum(subject, _views(subject, paths, unreadable), args.out)
    per_image = [what for what in args.what if what != "spectrum"]
    used: set[str] = set()
    for path, view in _views(subject, paths, unreadable) if per_image else ():
        stem, pictures = free_stem(path.stem, used), []
        arrays: dict[str, Tensor] = {}
        for what in per_image:
            explained = _EXPLAINED[what](subject, view, args.at)
            for number, (figure, found) in enumerate(explained, start=1):
                name = what if len(explained) == 1 else f"{what}-{number}"
                pictures.append(args.out / f"{stem}-{name}.png")
                _save_picture(pictures[-1], figure)
                arrays |= {f"{name}.{key}": value for key, value in found.items()}
        _save_arrays(args.out / f"{stem}.npz", arrays)
        print(printable(f"{path} -> {', '.join(map(str, pictures))}"))
    return int(bool(unreadable))


def _views(subject: Subject, paths: list[Path], unreadable: set[Path]) -> Iterator[tuple[Path, View]]:
    """Yields the images; those that cannot be read are reported once, and noted in ``unreadable``."""
    for path in paths:
        if path not in unreadable:
            try:
                image = read_image(path)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                unreadable.add(path)
                continue
            yield path, subject.view(image)


def _spectrum(subject: Subject, views: Iterator[tuple[Path, View]], out: Path) -> None:
    """Draws spectrum.png and prints, per block, the mean over images of the share of energy above half of the Nyquist frequency."""
    from ..explain import spectrum
    from ..explain.drawing import draw_spectrum
    from ..explain.frequencies import mean_with_interval

    spectra = spectrum(subject.model, (view.tensor for _, view in views))
    _save_picture(out / "spectrum.png", draw_spectrum(spectra))
    arrays: dict[str, Tensor] = {}
    shares: dict[str, dict[str, Tensor]] = {}
    for part in spectra:
        arrays |= {f"{part.block}.{part.branch}.magnitude": part.magnitude, f"{part.block}.{part.branch}.high": part.high}
        shares.setdefault(part.block, {})[part.branch] = part.high
    _save_arrays(out / "spectrum.npz", arrays)
    rows: list[tuple] = [("block", "Hi-Fi", "Lo-Fi", "Hi-Fi - Lo-Fi")]
    for block, high in shares.items():
        difference = high["hifi"] - high["lofi"] if len(high) == 2 else None
        columns = [high.get("hifi"), high.get("lofi"), *([] if difference is None else [difference])]
        cells = ["no heads" if x is None else _share(*mean_with_interval(x)) for x in columns]
        rows.append((block, *cells, *[""] * (3 - len(cells))))
    print(f"share of the energy above half of the Nyquist frequency: mean over {len(spectra[0].high)} images, 95 % interval")
    print_table(rows)
    print(f"-> {out / 'spectrum.png'}")


def _share(mean: float, low: float, high: float) -> str:
    return f"{mean:.1%}" + ("" if math.isnan(low) else f" [{low:.1%}, {high:.1%}]")  # a single image has no interval


Explained = list[tuple["Figure", dict[str, Tensor]]]  # pictures and the arrays that they show


def _attention(subject: Subject, view: View, at: list[list[float]] | None) -> Explained:
    from ..explain import attention
    from ..explain.drawing import draw_attention

    found = [attention(subject.model, view.tensor, place) for place in _places(view, at)]
    return [(draw_attention(view, result), _arrays([result, *result.blocks])) for result in found]


def _offsets(subject: Subject, view: View, at: list[list[float]] | None) -> Explained:
    from ..explain import offsets
    from ..explain.drawing import draw_offsets

    found = [offsets(subject.model, view.tensor, place) for place in _places(view, at)]
    return [(draw_offsets(view, result), _arrays(result)) for result in found]


def _cam(subject: Subject, view: View, at: list[list[float]] | None) -> Explained:
    """Of what the model finds, wherever that is."""
    from ..explain.activation import cams_of_finding
    from ..explain.drawing import draw_cam

    maps, what = cams_of_finding(subject, view)
    return [(draw_cam(view, maps, what), maps)]


_EXPLAINED = {"attention": _attention, "offsets": _offsets, "cam": _cam}


def _places(view: View, at: list[list[float]] | None) -> list[tuple[float, float] | None]:
    """Positions in the image -> positions in the tensor; None stands for the strongest response."""
    return [None] if at is None else [view.to_tensor(x, y) for x, y in at]


def _arrays(results: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors among the attributes of results, by their names; those of a part begin with the name of its block or merging."""
    arrays: dict[str, Tensor] = {}
    for result in results:
        values = vars(result)
        of = next((f"{values[key]}." for key in ("block", "merging") if key in values), "")
        arrays |= {f"{of}{key}": value for key, value in values.items() if isinstance(value, Tensor)}
    return arrays


def _save_picture(path: Path, figure: Figure) -> None:
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png")


def _save_arrays(path: Path, arrays: dict[str, Tensor]) -> None:
    with atomic_write(path) as draft, open(draft, "wb") as file:
        np.savez_compressed(file, **{key: value.cpu().numpy() for key, value in arrays.items()})  # type: ignore[arg-type]
