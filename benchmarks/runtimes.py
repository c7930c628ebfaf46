"""LITv2 in the runtimes that it exports to, in interleaved runs on the CPU: latency, and the errors that the exports have proven.

    python benchmarks/runtimes.py --batch-sizes 1 8 --threads 2

Weights are random. int8 is calibrated with the images of --images, else with the two photographs that scikit-learn brings:
for its speed any will do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor

from harness import interleaved, positive, table
from litv2 import LITv2, create_model, fuse
from litv2.export import Settings, classifier, export, load, suffix
from litv2.inference.fastest import make_form, why_not

EXPORTS = {  # by name: format, dtype
    "onnxruntime, DeformConv node": ("onnx", "float32"),
    "onnxruntime, standard operators": ("onnx-standard", "float32"),
    "OpenVINO": ("openvino", "float32"),
    "onnxruntime, int8": ("onnx", "int8"),
    "OpenVINO, int8": ("openvino", "int8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="litv2_small")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 8])
    parser.add_argument("--img-size", type=positive, default=224)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--only", default="", metavar="TEXT", help="of the rows after eager's only those whose name has it")
    parser.add_argument("--images", type=Path, help="folder of images for int8's calibration")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.freezing = True  # weights are constants: they are packed once
    torch.manual_seed(0)
    model = create_model(args.model).eval()

    rows = {}
    for batch in args.batch_sizes:
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            functions, errors = cases(model, batch, args.img_size, args.images or scikit_learn_images(), Path(folder), args.only)
            seconds = interleaved(functions, args.rounds)
        for name, value in seconds.items():
            row = rows.setdefault(name, [name, errors[name]])
            row += [f"{1e3 * value:.1f}", f"{batch / value:.1f}", f"{seconds['eager'] / value:.2f}"]
    header = ["", "largest error"]
    for batch in args.batch_sizes:
        header += [f"batch {batch}, ms", "images/s", "times eager"]
    print(f"{args.model}, {args.img_size} x {args.img_size}, {args.threads} threads, torch {torch.__version__}, "
          f"medians of {args.rounds} interleaved rounds")  # fmt: skip
    print(table(header, list(rows.values())))
    if not bfloat16_is_native():
        print("\nbfloat16 is not listed: this processor has no instructions for it.")


def cases(
    model: LITv2, batch: int, size: int, images: Path, folder: Path, only: str
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What is timed, by name, and the largest difference from the eager model's logits of each."""
    x = torch.randn(batch, 3, size, size)
    fused = fuse(model)
    modules = {"eager": model, "eager, fuse()": fused, "compiled, fuse()": torch.compile(fused)}
    if not why_not("native", x):
        modules["native"] = make_form(model, "native", torch.float32)
    if bfloat16_is_native():
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
    return functions, {name: f"{_error(function(), exact):.0e}" for name, function in functions.items()}


def _error(result: Tensor | tuple[Tensor, ...], exact: Tensor) -> float:
    logits = result if isinstance(result, Tensor) else result[0]
    return (logits.float() - exact).abs().max().item()


def bfloat16_is_native() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def scikit_learn_images() -> Path:
    from sklearn.datasets import _base

    return Path(_base.__file__).parent / "images"


if __name__ == "__main__":
    main()
