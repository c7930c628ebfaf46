# SPDX-License-Identifier: Apache-2.0
"""Measures LITv2 in the runtimes that it exports to, in interleaved runs on the CPU: latency, and the errors of the exports.

    python benchmarks/runtimes.py --batch-sizes 1 8 --threads 2

Weights are random. int8 is calibrated with --images, or with scikit-learn's two sample photographs, since its speed does not depend
on the images. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor

from harness import COLOURS, figure, milliseconds, parser, positive, publish, samples
from litv2 import LITv2, create_model, fuse
from litv2.errors import run_program
from litv2.export import Settings, classifier, export, load, suffix
from litv2.export.images import photographs
from litv2.inference.fastest import make_form, why_not
from mm_modules.torch_state import bfloat16_is_emulated

EXPORTS = {  # by name: format, dtype
    "onnxruntime, DeformConv node": ("onnx", "float32"),
    "onnxruntime, standard operators": ("onnx-standard", "float32"),
    "OpenVINO": ("openvino", "float32"),
    "onnxruntime, int8": ("onnx", "int8"),
    "OpenVINO, int8": ("openvino", "int8"),
}


def main() -> None:
    flags = parser(__doc__, "runtimes")
    flags.add_argument("--model", default="litv2_small")
    flags.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8])
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--only", default="", metavar="TEXT", help="besides eager, only the rows whose name contains TEXT")
    flags.add_argument("--images", type=Path, help="folder of images for int8 calibration")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = True  # weights are constants and are packed once
    torch.manual_seed(0)
    model = create_model(args.model).eval()

    rows = []
    for batch in args.batch_sizes:
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            functions, errors = cases(model, batch, args.img_size, args.images or photographs(), Path(folder), args.only)
            seconds = samples(functions, args.rounds, args.warm_up)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            row = dict(runtime=name, batch_size=batch, **milliseconds(values), images_per_s=round(batch / medians[name], 1))
            rows.append(row | dict(times_eager=round(medians["eager"] / medians[name], 2), largest_error=float(f"{errors[name]:.0e}")))
    title = f"{args.model}, {args.img_size} x {args.img_size}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, plot, model=args.model, img_size=args.img_size)
    if bfloat16_is_emulated():
        print("bfloat16 is not listed: this processor has no bfloat16 instructions")


def cases(
    model: LITv2, batch: int, size: int, images: Path | None, folder: Path, only: str
) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """Returns the functions to time, by name, and the largest difference of each one's logits from the eager model's."""
    x = torch.randn(batch, 3, size, size)
    fused = fuse(model)
    modules = {"eager": model, "eager, fuse()": fused, "compiled, fuse()": torch.compile(fused)}
    if not why_not("native", x):
        modules["native"] = make_form(model, "native", torch.float32)
    if not bfloat16_is_emulated():
        half = fuse(model).bfloat16()
        modules |= {"eager, fuse(), bfloat16": half, "compiled, fuse(), bfloat16": torch.compile(half)}
    functions = {name: partial(module, x.bfloat16() if "bfloat16" in name else x) for name, module in modules.items() if only in name}
    functions = {"eager": partial(model, x)} | functions
    for name, (format, dtype) in EXPORTS.items():
        if only in name:
            path = folder / f"{format}-{dtype}{suffix(format)}"
            settings = Settings((size, size), batch, (), dtype, images if dtype == "int8" else None)
            with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode(False):
                export(classifier(model), format, path, settings)
            functions[name] = partial(load(format, path), x)
    exact = model(x)
    return functions, {name: _error(function(), exact) for name, function in functions.items()}


def _error(result: Tensor | tuple[Tensor, ...], exact: Tensor) -> float:
    logits = result if isinstance(result, Tensor) else result[0]
    return (logits.float() - exact).abs().max().item()


def plot(rows: list[dict], path: Path) -> None:
    """Plots the images/s of each runtime, with a bar per batch size."""
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    height = 0.8 / len(batches)
    with figure(path, size=(8, 1.2 + 0.4 * len(names))) as axes:
        for i, (batch, colour) in enumerate(zip(batches, itertools.cycle(COLOURS.values()))):
            own = {row["runtime"]: row["images_per_s"] for row in rows if row["batch_size"] == batch}
            places = [-names.index(name) - (i - (len(batches) - 1) / 2) * height for name in own]
            axes.barh(places, own.values(), height, color=colour, label=f"batch {batch}", zorder=2)
        axes.set_yticks([-i for i in range(len(names))], names)
        axes.set(xlabel="images/s")
        axes.grid(False, axis="y")
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(run_program(main))
