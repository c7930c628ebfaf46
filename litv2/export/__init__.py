"""LITv2 in other programs: one function per format, and a proof of the numbers with each file.

from litv2 import create_model
from litv2.export import Settings, classifier, export
export(classifier(create_model("litv2_small", pretrained=True)), "onnx", "litv2_s.onnx", Settings(image_size=(224, 224)))
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import tempfile
from pathlib import Path

from ..errors import UserError
from .format import Format, Run
from .networks import classifier, pyramid
from .parity import ParityError, compare, print_report, write_report
from .settings import Network, Settings

__all__ = ["FORMATS", "Network", "ParityError", "Settings", "classifier", "export", "load", "pyramid", "suffix"]

# The module of each format, and its name there. Imported when asked for: each needs packages of its own.
FORMATS = {
    "torch-export": ("torch_program", "FORMAT"),
    "onnx": ("onnx_graph", "FORMAT"),
    "onnx-standard": ("onnx_graph", "STANDARD"),
    "openvino": ("openvino_ir", "FORMAT"),
    "tensorrt": ("tensorrt", "FORMAT"),
    "executorch": ("executorch_program", "FORMAT"),
}


def export(network: Network, format: str, path: str | Path, settings: Settings | None = None) -> dict:
    """Writes a file that other programs run, after its results were compared with the model's; returns the report.

    The report is printed and written to ``path`` + ``.parity.json``. Files appear whole or, when anything fails, not at all.

    Raises:
        UserError: a format, dtype, size or suffix that is not supported, or a graph that does not use the image.
        ParityError: results beyond the tolerance; the message says which and by how much, and the report stays.
        MissingPackage: a package is missing; the message names the extra.
    """
    settings = settings or Settings()
    known = _format(format)
    if settings.dynamic is None:
        settings = dataclasses.replace(settings, dynamic=known.dynamic)
    path = Path(path)
    if settings.dtype not in known.dtypes:
        raise UserError(f"export: {format} has {', '.join(known.dtypes)}, not dtype={settings.dtype!r}")
    if not set(settings.dynamic) <= set(known.dynamic):
        raise UserError(f"export: {format} fixes its sizes: dynamic={tuple(settings.dynamic)} must be left out, or be empty")
    smallest = network.smallest * (known.min_cells if "size" in settings.dynamic else 1)
    if min(settings.image_size) < smallest:
        raise UserError(f"export: image_size={settings.image_size}: each side must be at least {smallest}")
    if settings.images is not None and not Path(settings.images).is_dir():
        raise UserError(f"export: --images {settings.images}: there is no such folder")
    if settings.dtype == "int8" and settings.images is None:
        raise UserError("export: int8 needs real images to find the ranges of activations: give a folder with --images")
    if path.suffix != known.suffix:
        raise UserError(f"export: {path}: files of {format} end in {known.suffix}")

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        draft = Path(folder) / path.name
        known.write(network, draft, settings)
        report = dict(format=format, file=path.name, bytes=draft.stat().st_size, image_size=list(settings.image_size))
        report |= compare(network, known.load(draft), settings, smallest)
        print_report(report)
        write_report(report, path.with_name(path.name + ".parity.json"))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, path.parent / file.name)
    return report


def suffix(format: str) -> str:
    """What files of a format end in."""
    return _format(format).suffix


def load(format: str, path: str | Path) -> Run:
    """The exported file in its runtime on the CPU, as a function: images (B, C, H, W) -> tuple of tensors."""
    return _format(format).load(Path(path))


def _format(format: str) -> Format:
    if format not in FORMATS:
        raise UserError(f"export: format={format!r} must be one of {', '.join(FORMATS)}")
    module, name = FORMATS[format]
    return getattr(importlib.import_module(f".{module}", __package__), name)
