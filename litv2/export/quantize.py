# SPDX-License-Identifier: Apache-2.0
"""Static int8 of an ONNX graph: QuantizeLinear and DequantizeLinear nodes, with ranges from real images.

Linear layers and convolutions are quantized, weights per channel, everything symmetrically as TensorRT requires. Attention with
its softmax and the norms stay in float, and so do two kinds of modules: the deformable convolutions, whose offsets are positions
in pixels, and the patch embedding, whose quantization error is amplified by the norm after it to five times that of all the rest.
"""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)

from ..errors import UserError
from .images import read_images
from .settings import Settings

CALIBRATION_IMAGES = 32
IN_FLOAT = {"dconv", "patch_embed"}  # names of modules
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata that the exporter adds to each node: the modules it comes from


class _Images(CalibrationDataReader):
    """Yields the calibration images in batches of the size that the graph takes; one by one if that is dynamic."""

    def __init__(self, model: onnx.ModelProto, settings: Settings):
        assert settings.images is not None  # checked by export()
        images = read_images(settings.images, settings.image_size, CALIBRATION_IMAGES)
        size = 1 if settings.leaves_open("batch") else settings.batch_size
        if len(images) < size:
            raise UserError(f"export: {settings.images} has {len(images)} images, but int8 calibration needs at least one batch of {size}")
        name = model.graph.input[0].name
        self.batches = ({name: batch.numpy()} for batch in images.split(size) if len(batch) == size)

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def quantize(model: onnx.ModelProto, path: Path, settings: Settings) -> None:
    """Writes the quantized form of ``model``.

    Raises:
        UserError: there are too few images for the calibration.
    """
    products = ["Conv", "Gemm", "MatMul"]
    weights = {tensor.name for tensor in model.graph.initializer}
    in_float = [node.name for node in model.graph.node if _modules(node) & IN_FLOAT or not weights & set(node.input)]
    quantize_static(
        model,
        str(path),
        _Images(model, settings),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=products,
        nodes_to_exclude=in_float,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        # Only the inputs of products are rounded: outputs read by attention, a norm or a residual sum stay in float.
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": products},
    )


def _modules(node: onnx.NodeProto) -> set[str]:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return {part for scope in ast.literal_eval(scopes) for part in scope.split(".")}


def activation_ranges(graph: Path, settings: Settings) -> dict[str, float]:
    """Returns the largest absolute value of each float activation on the calibration images, by its name in the graph."""
    augmented = graph.with_suffix(".augmented.onnx")
    try:
        calibrator = create_calibrator(
            str(graph), augmented_model_path=str(augmented), calibrate_method=CalibrationMethod.MinMax, extra_options={"symmetric": True}
        )
        calibrator.collect_data(_Images(onnx.load(graph), settings))
        ranges = {name: float(data.range_value[1].max()) for name, data in calibrator.compute_data().data.items()}
    finally:
        augmented.unlink(missing_ok=True)
    return ranges
