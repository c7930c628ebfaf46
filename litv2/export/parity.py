# SPDX-License-Identifier: Apache-2.0
"""Compares the outputs of an export with the model's, on random and on real images, and reports the errors."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_write
from .format import Run
from .images import photographs, read_images
from .settings import Network, Settings

__all__ = ["TOLERANCES", "ParityError", "compare", "print_report", "write_report"]

# Tolerances. Floats: largest error, relative to the largest absolute value (or to 1 if that is larger). int8: mean error, relative
# to the mean absolute value, since single values may be far off in eight bits.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "int8": 0.15}
REAL_IMAGES = 32


class ParityError(UserError):
    """The outputs of an export differ from the model's by more than the tolerance."""


def compare(network: Network, run: Run, settings: Settings, smallest: int) -> dict:
    """Returns the report: the errors of each output on each batch, and the top-1 agreement of outputs with classes.

    ``smallest`` is the smallest image side that the export accepts, in pixels.

    Raises:
        ParityError: the number or the shapes of the outputs differ.
    """
    rows = []
    for name, batches in _inputs(network, settings, smallest):
        pairs = []
        for images in batches:
            expected, actual = network.reference(images), run(images)
            if [out.shape for out in actual] != [out.shape for out in expected]:
                shapes = [[tuple(out.shape) for out in outs] for outs in (actual, expected)]
                raise ParityError(f"export: on {name} images the outputs have shapes {shapes[0]}, but the model's have {shapes[1]}")
            pairs.append((expected, actual))
        for i, output in enumerate(network.outputs):
            exact, other = (torch.cat([pair[side][i].float() for pair in pairs]) for side in (0, 1))
            rows.append(_row(name, output, exact, other, settings.dtype, output in network.classes))
    return dict(
        dtype=settings.dtype,
        dynamic=list(settings.dynamic or ()),
        tolerance=TOLERANCES[settings.dtype],
        passed=all(row["passed"] for row in rows),
        torch=str(torch.__version__),
        machine=f"{platform.system()} {platform.machine()}",
        rows=rows,
    )


def _inputs(network: Network, settings: Settings, smallest: int) -> list[tuple[str, list[Tensor]]]:
    """Random batches of 1, 3 and 5 and real images, at the requested size and an odd one, as far as the dynamic dimensions allow."""
    H, W = settings.image_size
    sizes = [(H, W)]
    if settings.leaves_open("size"):  # odd, with another aspect ratio
        sizes += [(max(smallest, H // 2) | 1, max(smallest, 3 * W // 4) | 1)]
    sizes_of_batches = (1, 3, 5) if settings.leaves_open("batch") else (settings.batch_size,)
    inputs = []
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        large = size[0] * size[1] > 400 * 400  # a detector's image: fewer are tried
        # int8 ranges are calibrated on real images; noise lies outside them.
        for batch in () if settings.dtype == "int8" else sizes_of_batches[:1] if large else sizes_of_batches:
            images = torch.randn(batch, network.channels, *size, generator=generator)
            inputs.append((f"{batch} random {size[0]} x {size[1]}", [images]))
        real = _real_images(settings, size, 2 if large else REAL_IMAGES) if network.channels == 3 else torch.empty(0)
        batches = real.split(sizes_of_batches[0 if large else -1])
        if not settings.leaves_open("batch"):
            batches = [images for images in batches if len(images) == settings.batch_size]
        if count := sum(map(len, batches)):
            inputs.append((f"{count} real {size[0]} x {size[1]}", list(batches)))
    if not inputs:
        raise UserError(f"export: {settings.images} has too few images for the comparison, which needs a batch of {settings.batch_size}")
    return inputs


def _real_images(settings: Settings, size: tuple[int, int], count: int) -> Tensor:
    """Reads images from the folder in the settings, else scikit-learn's two sample photographs if it is installed."""
    folder = settings.images or photographs()
    return torch.empty(0) if folder is None else read_images(folder, size, count, shift=0.5)


def _row(inputs: str, output: str, exact: Tensor, other: Tensor, dtype: str, has_classes: bool) -> dict:
    error = (other.double() - exact.double()).abs()
    size = exact.double().abs()
    measured = (error.mean() / size.mean() if dtype == "int8" else error.max() / size.max().clamp(min=1)).item()
    return dict(
        inputs=inputs,
        output=output,
        max_error=error.max().item(),
        mean_error=error.mean().item(),
        largest=size.max().item(),
        relative_error=measured,
        agreement=(exact.argmax(1) == other.argmax(1)).double().mean().item() if has_classes else None,
        passed=measured <= TOLERANCES[dtype],  # false for NaN
    )


def print_report(report: dict) -> None:
    widths = [max(len(str(row[key])) for row in (*report["rows"], {key: key})) for key in ("inputs", "output")]
    print(f"{'inputs':{widths[0]}}  {'output':{widths[1]}}  max error  mean error   largest  relative  top-1 agreement")
    for row in report["rows"]:
        agreement = "" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
        print(
            f"{row['inputs']:{widths[0]}}  {row['output']:{widths[1]}}  {row['max_error']:9.2e}  {row['mean_error']:10.2e}  "
            f"{row['largest']:8.3g}  {row['relative_error']:8.1e}  {agreement}{'' if row['passed'] else '  <- too large'}"
        )
    if not any("real" in row["inputs"] for row in report["rows"]):
        print("no real images were compared; pass a folder with --images")


def write_report(report: dict, path: Path) -> None:
    """Writes the report as JSON and raises ParityError if the comparison failed."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(report, indent=2) + "\n")
    failed = [row for row in report["rows"] if not row["passed"]]
    if failed:
        worst = max(failed, key=lambda row: row["relative_error"] if row["relative_error"] == row["relative_error"] else float("inf"))
        raise ParityError(
            f"export: output {worst['output']!r} on {worst['inputs']} images differs from the model's by {worst['relative_error']:.1e} "
            f"(largest error {worst['max_error']:.1e}), above the tolerance of {report['tolerance']:.0e} for {report['dtype']}; see {path}"
        )
