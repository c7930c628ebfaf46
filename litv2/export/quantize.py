"""Static int8 of an ONNX graph: QuantizeLinear and DequantizeLinear nodes, with ranges from real images.

Products with weights (linear layers and convolutions) are quantized, weights per channel, everything symmetric as TensorRT
wants it. In float stay: attention and its softmax, norms, the patch embedding (the norm after it enlarges what rounding it
costs: five times the error of all the rest), and what leads to the offsets of a deformable convolution, which are
positions in pixels.
"""

from __future__ import annotations

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
from onnxruntime.quantization.shape_inference import quant_pre_process

from .images import read_images
from .settings import Settings

CALIBRATION_IMAGES = 32
IN_FLOAT = ("conv_offset", "patch_embed")  # in the names of their weights


class _Images(CalibrationDataReader):
    """The calibration images one by one, or two by two where the graph is for batches of two, and so on."""

    def __init__(self, model: onnx.ModelProto, settings: Settings):
        if settings.images is None:
            raise ValueError("export: int8 needs real images to find the ranges of activations: give a folder with --images")
        images = read_images(settings.images, settings.image_size, CALIBRATION_IMAGES)
        size = 1 if "batch" in settings.dynamic else settings.batch_size
        if len(images) < size:
            raise ValueError(f"export: {settings.images} has {len(images)} images, a batch of {size} needs more to calibrate int8")
        name = model.graph.input[0].name
        self.batches = ({name: batch.numpy()} for batch in images.split(size) if len(batch) == size)

    def get_next(self) -> dict | None:
        return next(self.batches, None)


def quantize(model: onnx.ModelProto, path: Path, settings: Settings) -> None:
    """Writes the quantized form of ``model``.

    Raises:
        ValueError: no images to calibrate with.
    """
    images = _Images(model, settings)
    prepared = path.with_suffix(".prepared.onnx")
    onnx.save(model, prepared)
    try:
        quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
        excluded = [node.name for node in onnx.load(prepared).graph.node if any(part in name for name in node.input for part in IN_FLOAT)]
        quantize_static(
            str(prepared),
            str(path),
            images,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            nodes_to_exclude=excluded,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
        )
    finally:
        prepared.unlink()


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
