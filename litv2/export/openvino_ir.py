# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's intermediate representation (.xml and .bin), converted from the ONNX graph of standard operators."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MissingPackage
from . import onnx_graph
from .format import Format, Run
from .settings import Network, Settings

try:
    import openvino
except ImportError as error:
    raise MissingPackage(f"{error}; this format needs: pip install 'litv2[openvino]'") from error


def write(network: Network, path: Path, settings: Settings) -> None:
    graph = path.with_suffix(".onnx")
    half = settings.dtype == "float16"
    onnx_graph.write_standard(network, graph, replace(settings, dtype="float32") if half else settings)
    # Not by convert_model, which would report its use to a server.
    openvino.save_model(openvino.Core().read_model(graph), path, compress_to_fp16=half)
    graph.unlink()


def load(path: Path, threads: int | None = None, precision: str = "f32") -> Run:
    """Loads the model on the CPU. Without an explicit ``precision``, OpenVINO would use bfloat16 where the processor supports it."""
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        results = compiled(images.numpy())
        return tuple(torch.from_numpy(results[output].copy()) for output in compiled.outputs)

    return run


FORMAT = Format(write, load, ".xml", ("float32", "float16", "int8"))  # float16 is the dtype of the weights in the file
