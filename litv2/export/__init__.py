# SPDX-License-Identifier: Apache-2.0
"""Exports LITv2 to other runtimes and compares the outputs of every file with the model's.

from litv2 import create_model
from litv2.export import Settings, classifier, export
export(classifier(create_model("litv2_small", pretrained=True)), "onnx", "litv2_s.onnx", Settings(image_size=(224, 224)))
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from .format import Format, Run
from .networks import classifier, pyramid
from .parity import ParityError, compare, print_report, write_report
from .settings import Network, Settings

__all__ = ["FORMATS", "Network", "ParityError", "Settings", "classifier", "export", "load", "pyramid", "suffix"]

# Two runtimes report their use, and what they load, to servers of their makers, from their import on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # as if it were not installed

# The module of each format and its name there. Modules are imported on demand, since each needs its own packages.
FORMATS = {
    "torch-export": ("torch_program", "FORMAT"),
    "onnx": ("onnx_graph", "FORMAT"),
    "onnx-standard": ("onnx_graph", "STANDARD"),
    "openvino": ("openvino_ir", "FORMAT"),
    "tensorrt": ("tensorrt", "FORMAT"),
    "executorch": ("executorch_program", "FORMAT"),
}


def export(network: Network, format: str, path: str | Path, settings: Settings | None = None) -> dict:
    """Exports a network to ``path``, compares its outputs with the model's and returns the report of the comparison.

    The report is printed and written to ``path`` + ``.parity.json``. The exported file appears only if everything succeeds.

    Raises:
        UserError: a format, dtype, size or suffix is not supported, or the graph does not use the image.
        ParityError: an output exceeds the tolerance; the message says which one and by how much, and the report is kept.
        MissingPackage: a package is missing; the message names the extra to install.
    """
    settings = settings or Settings()
    known = _format(format)
    dynamic = known.dynamic if settings.dynamic is None else tuple(settings.dynamic)
    settings = dataclasses.replace(settings, dynamic=dynamic)
    path = Path(path)
    if settings.dtype not in known.dtypes:
        raise UserError(f"export: dtype={settings.dtype!r} is not supported by {format}; use {', '.join(known.dtypes)}")
    if not set(dynamic) <= set(known.dynamic):
        raise UserError(f"export: {format} supports fixed sizes only, got dynamic={dynamic}; leave it out or empty")
    smallest = network.smallest * (known.min_cells if settings.leaves_open("size") else 1)
    if min(settings.image_size) < smallest:
        raise UserError(f"export: image_size={settings.image_size} is too small: each side must be at least {smallest}")
    if settings.images is not None and not Path(settings.images).is_dir():
        raise UserError(f"export: --images {settings.images}: the folder does not exist")
    if settings.dtype == "int8" and settings.images is None:
        raise UserError("export: int8 needs real images to calibrate the activation ranges; pass a folder with --images")
    if path.suffix != known.suffix:
        raise UserError(f"export: {path}: the file name must end in {known.suffix} for {format}")

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
    """Returns the file suffix of a format."""
    return _format(format).suffix


def load(format: str, path: str | Path) -> Run:
    """Loads an exported file in its runtime on the CPU, as a function: images (B, C, H, W) -> tuple of tensors.

    A file is a program for its runtime, and one of ``torch-export`` may run any code: load only those that you trust.

    Raises:
        UserError: the file cannot be loaded, or not be run on these images.
    """
    loader = _format(format).load
    with _reported(f"{path} cannot be loaded as {format}"):
        run = loader(Path(path))

    def checked(images: Tensor) -> tuple[Tensor, ...]:
        with _reported(f"{path} cannot be run on images of shape {tuple(images.shape)}"):
            return run(images)

    return checked


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Reports whatever a runtime raises, of a type of its own, in one line."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _format(format: str) -> Format:
    if format not in FORMATS:
        raise UserError(f"export: format={format!r} must be one of {', '.join(FORMATS)}")
    module, name = FORMATS[format]
    return getattr(importlib.import_module(f".{module}", __package__), name)
