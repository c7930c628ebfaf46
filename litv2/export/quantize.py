"""Static int8 of an ONNX graph: QuantizeLinear and DequantizeLinear nodes, with ranges from real images.

Products with weights (linear layers and convolutions) are quantized, weights per channel, everything symmetric as TensorRT
wants it. In float stay attention with its softmax, norms, and two kinds of modules: the deformable convolutions, whose
offsets are positions in pixels, and the patch embedding, since the norm after it enlarges the error: eight bits there cost
five times as much as in all the rest.
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
SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note at each node: the modules that it comes from


class _Images(CalibrationDataReader):
    """The calibration images one by one, or two by two where the graph is for batches of two, and so on."""

    def __init__(self, model: onnx.ModelProto, settings: Settings):
        images = read_images(settings.images, settings.image_size, CALIBRATION_IMAGES)
        size = 1 if "batch" in settings.dynamic else settings.batch_size
        if len(images) < size:
            raise UserError(f"export: {settings.images} has {len(images)} images, a batch of {size} needs more to calibrate int8")
        name = model.graph.input[0].name
        self.batches = ({name: batch.numpy()} for batch in images.split(size) if len(batch) == size)

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def quantize(model: onnx.ModelProto, path: Path, settings: Settings) -> None:
    """Writes the quantized form of ``model``.

    Raises:
        UserError: too few images to calibrate with.
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
        # Only what enters a product is rounded: a result that attention, a norm or a residual sum reads is float.
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": products},
    )


def _modules(node: onnx.NodeProto) -> set[str]:
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    return {part for scope in ast.literal_eval(scopes) for part in scope.split(".")}


def activation_ranges(graph: Path, settings: Settings) -> dict[str, float]:
    """The largest absolute value of each float activation of a graph on the calibration images, by its name."""
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
