# SPDX-License-Identifier: Apache-2.0
"""Export for TensorRT: the ONNX graph of standard operators, a trtexec script that builds the engine, and a calibration cache.

TensorRT itself needs a GPU and is not run here: the graph is checked against its list of supported operators and compared with
the model in onnxruntime. Up to TensorRT 10 the script takes ``fp16`` and ``int8`` (with the cache); TensorRT 11 uses the dtypes
of the graph, so export with ``float16`` or ``int8`` for it.
"""

from __future__ import annotations

import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from . import onnx_graph
from .quantize import activation_ranges
from .settings import Network, Settings

if TYPE_CHECKING:
    import onnx

__all__ = ["FORMAT", "unsupported_operators", "write", "write_calibration_cache"]

# The operators that github.com/onnx/onnx-tensorrt lists as supported (docs/operators.md of 8.5, LayerNormalization since 8.6)
# and that may occur in a graph of LITv2.
OPERATORS = set(
    """
    Abs Add And AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND
    Gemm GlobalAveragePool Greater GreaterOrEqual GridSample Identity If IsNaN LayerNormalization Less LessOrEqual Log MatMul
    Max MaxPool Mean Min Mod Mul Neg Not Or Pad Pow QuantizeLinear Range Reciprocal ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum Relu Reshape Resize Round Shape Sigmoid Sign Size Slice Softmax SpaceToDepth Split Sqrt Squeeze
    Sub Sum Tanh Tile TopK Transpose Unsqueeze Where Xor
    """.split()
)
LARGEST_BATCH = 64


def write(network: Network, path: Path, settings: Settings) -> None:
    """Writes ``path`` and, beside it, ``build_engine.sh`` and (given images and a float32 graph) ``calibration.cache``."""
    onnx_graph.write_standard(network, path, settings)
    missing = unsupported_operators(onnx_graph.onnx.load(path))
    if missing:
        raise UserError(f"export: the graph has operators that TensorRT does not list as supported: {', '.join(missing)}")
    script = path.with_name(f"{path.stem}.build_engine.sh")
    script.write_text(_script(network, path.name, settings))
    script.chmod(0o755)
    if settings.images is not None and settings.dtype == "float32":
        write_calibration_cache(path, path.with_name(f"{path.stem}.calibration.cache"), settings)


def unsupported_operators(model: onnx.ModelProto) -> list[str]:
    return sorted({node.op_type for node in model.graph.node} - OPERATORS)


def write_calibration_cache(graph: Path, cache: Path, settings: Settings, version: str = "8601") -> None:
    """Writes the ranges of all activations on real images in the text format of TensorRT's calibrators.

    The header has TensorRT's version and the algorithm of trtexec's calibrator, which rejects others. Then follows a line per
    tensor: its name and its scale, largest absolute value / 127, as the hexadecimal digits of a big-endian float32.
    ``trtexec --int8 --calib=FILE`` and IInt8EntropyCalibrator2.read_calibration_cache read it.
    """
    ranges = activation_ranges(graph, settings)
    lines = [f"{name}: {struct.pack('>f', largest / 127).hex()}" for name, largest in ranges.items()]
    cache.write_text("\n".join([f"TRT-{version}-EntropyCalibration2", *lines]) + "\n")


def _script(network: Network, graph: str, settings: Settings) -> str:
    H, W = settings.image_size
    batches = (1, 8, LARGEST_BATCH) if settings.leaves_open("batch") else (settings.batch_size,) * 3
    sizes = ((H, W),) * 3
    if settings.leaves_open("size"):
        least = network.smallest
        sizes = ((min(H, max(least, H // 2)), min(W, max(least, W // 2))), (H, W), (2 * H, 2 * W))
    names = ("minShapes", "optShapes", "maxShapes")
    shapes = [f"--{name}=images:{b}x{network.channels}x{h}x{w}" for name, b, (h, w) in zip(names, batches, sizes)]
    flags = " ".join(shapes if settings.dynamic else [])
    stem = graph.removesuffix(".onnx")
    onnx, engine, cache = (shlex.quote(name) for name in (graph, f"{stem}.engine", f"{stem}.calibration.cache"))
    to_int8 = "flags+=(--int8 --fp16)"  # the graph's own ranges
    if settings.dtype != "int8":
        to_int8 = f"""[ -f {cache} ] || {{ echo "no "{cache}": export float32 with --images DIR" >&2; exit 1; }}
        flags+=(--int8 --fp16 --calib={cache})"""
    return f"""#!/usr/bin/env bash
# Builds an engine of {onnx} with TensorRT's trtexec (8.6 or newer), on the GPU that will run it.
# The graph is in {settings.dtype}. Up to TensorRT 10 the arguments fp16 and int8 allow lower precision; TensorRT 11 uses the graph's.
set -euo pipefail
cd "$(dirname "$0")"
flags=({flags})
case ${{1:-}} in
  "") ;;
  fp16) flags+=(--fp16) ;;
  int8) {to_int8} ;;
  *) echo "usage: $(basename "$0") [fp16|int8]" >&2; exit 1 ;;
esac
trtexec --onnx={onnx} --saveEngine={engine} "${{flags[@]}}"
"""


FORMAT = replace(onnx_graph.STANDARD, write=write)
