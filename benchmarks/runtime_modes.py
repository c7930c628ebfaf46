# SPDX-License-Identifier: Apache-2.0
"""The ways in which one model runs on one batch: torch's, ours, and other runtimes.

Each is a function of a ``Case`` that returns what is timed. Whatever it raises is the reason why this model does not have it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from litv2 import LITv2
from litv2.errors import MissingPackage
from litv2.export import Settings, classifier, export
from litv2.inference import fastest
from litv2.inference.compiled import CUDA_OPTIONS
from litv2.preprocess import MEAN, STD

Run = Callable[[], Tensor]  # -> logits, which a GPU may still be computing
RIVAL_OPTIONS = {**CUDA_OPTIONS, "layout_optimization": True}  # on a GPU; LITv2's, but for what its tokens ask for


@dataclass(frozen=True)
class Case:
    """A model and its images, both of the computation's dtype and in the memory format that is best for it; of int8 both are float32.

    Attributes:
        folder: for files that the runtimes write and read.
        activations: of a rival in int8, onnxruntime's name of their type.
    """

    model: nn.Module
    images: Tensor
    dtype: str
    folder: Path
    activations: str = "QUInt8"

    def variants(self) -> list[Case]:
        """In int8 a rival's faster type of activations depends on the model and the runtime, and OpenVINO refuses some graphs."""
        both = self.dtype == "int8" and not isinstance(self.model, LITv2)
        return [self, replace(self, activations="QInt8")] if both else [self]


def inferred(function: Callable[..., Tensor], *tensors: Tensor) -> Run:
    return torch.inference_mode()(partial(function, *tensors))


def eager(case: Case) -> Run:
    return inferred(case.model, case.images)


def graph(case: Case) -> Run:
    """A CUDA graph, which launches what the eager model launches without the time that Python takes for it."""
    if isinstance(case.model, LITv2):
        return inferred(fastest.make_form(case.model, "graph", case.images.dtype), case.images)
    return captured(eager(case))


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function's CUDA graph. All calls return the same tensor, which each of them overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries allocate and choose their algorithms now, which a capture cannot hold
            run()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        result = run()

    def replay() -> Tensor:
        recording.replay()
        return result

    return replay


def compiled(case: Case) -> Run:
    if isinstance(case.model, LITv2):
        module = fastest.make_form(case.model, "compiled", case.images.dtype)
    else:
        options = RIVAL_OPTIONS if case.images.is_cuda else None
        module = torch.compile(copy.deepcopy(case.model).to(memory_format=torch.channels_last), options=options)
    return inferred(module, case.images.to(memory_format=torch.channels_last))


def native(case: Case) -> Run:
    """With products of the dtype, where the processor has them; else, in bfloat16, of float32."""
    forms = {"bfloat16": ["native-bfloat16", "native"], "int8": ["native-int8"]}.get(case.dtype, ["native"])
    reasons = [fastest.why_not(form, case.images) for form in forms]
    if None not in reasons:
        raise RuntimeError(reasons[-1])
    form = forms[reasons.index(None)]
    return inferred(fastest.make_form(case.model, form, case.images.dtype), case.images)


def openvino(case: Case) -> Run:
    from litv2.export import openvino_ir

    path = _export(case, "openvino", ".xml") if isinstance(case.model, LITv2) else _rival_graph(case)
    # In int8 the rest is in bfloat16 where the processor has it, which is OpenVINO's own choice there.
    precision = "f32" if case.dtype == "float32" else "bf16"
    return _on_arrays(openvino_ir.load(path, precision=precision), case)


def onnxruntime(case: Case) -> Run:
    from litv2.export import onnx_graph

    path = _export(case, "onnx", ".onnx") if isinstance(case.model, LITv2) else _rival_graph(case)
    return _on_arrays(onnx_graph.load(path), case)


MODES: dict[str, Callable[[Case], Run]] = dict(
    eager=eager, graph=graph, compiled=compiled, native=native, openvino=openvino, onnxruntime=onnxruntime
)
TORCH_MODES = ("eager", "graph", "compiled")


def why_not(mode: str, dtype: str, device: str) -> str | None:
    """Returns the reason why a mode is not available here for any model, or None."""
    if device != "cpu" and mode not in TORCH_MODES:
        return f"it supports the CPU only, got {device}"
    if dtype == "int8" and mode in TORCH_MODES:
        return "torch has no int8 for these models"
    if mode == "graph" and device == "cpu":
        return "it needs a GPU, got cpu"
    if mode == "native":
        return fastest.why_not("native-int8" if dtype == "int8" else "native", torch.empty(0))
    if mode in ("openvino", "onnxruntime"):
        try:
            runtime = _module(mode)
        except MissingPackage as error:
            return str(error)
        if dtype == "float16" or (mode, dtype) == ("onnxruntime", "bfloat16"):
            return f"it has no {dtype} on a CPU"
        if dtype == "bfloat16" and "BF16" not in runtime.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return "it does not compute in bfloat16 on this processor"
    return None


def _module(mode: str) -> ModuleType:
    """The export's module of a runtime; without the runtime it cannot be imported."""
    return importlib.import_module(f"litv2.export.{dict(openvino='openvino_ir', onnxruntime='onnx_graph')[mode]}")


def _on_arrays(run: Callable[[Tensor], tuple[Tensor, ...]], case: Case) -> Run:
    images = case.images.float().contiguous()
    return lambda: run(images)[0]


def _export(case: Case, format: str, suffix: str) -> Path:
    """A LITv2 by its own export; int8 is calibrated with the benchmark's images, since for its speed any will do."""
    path = case.folder / f"{format}{suffix}"
    batch, _, height, width = case.images.shape
    settings = Settings((height, width), batch, ())
    if case.dtype == "int8":
        settings = replace(settings, dtype="int8", images=case.folder / "images")
        _save_images(case.images, case.folder / "images")
    with contextlib.redirect_stdout(io.StringIO()), _quiet():
        export(classifier(copy.deepcopy(case.model).float()), format, path, settings)
    return path


def _save_images(images: Tensor, folder: Path) -> None:
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir(exist_ok=True)
    for i, image in enumerate(images):
        pixels = image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        to_pil_image(pixels.clamp(0, 1)).save(folder / f"{i}.png")


def _rival_graph(case: Case) -> Path:
    """Another model as an ONNX graph of this batch; each is written once for all runtimes."""
    if case.dtype == "int8":
        path = case.folder / f"{case.activations}.onnx"
        if not path.exists():
            _quantize(_rival_graph(replace(case, dtype="float32")), path, case)
        return path
    path, draft = case.folder / "rival.onnx", case.folder / "draft.onnx"
    if not path.exists():
        model, images = copy.deepcopy(case.model).float(), case.images.float().contiguous()
        words = dict(input_names=["images"], output_names=["logits"], opset_version=18)
        with contextlib.redirect_stdout(io.StringIO()), _quiet():
            try:  # the older exporter's graphs are as fast, and it needs a third of the time
                torch.onnx.export(model, (images,), draft, dynamo=False, **words)
            except Exception:  # it raises anything for what it does not know; the other one's error is the reason then
                torch.onnx.export(model, (images,), draft, dynamo=True, verbose=False, external_data=False, **words)
        draft.rename(path)
    return path


def _quantize(graph: Path, path: Path, case: Case) -> None:
    """Products with weights in int8, by channel, and what follows them in convolutional networks."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        batches = iter([{"images": case.images.contiguous().numpy()}])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    model, draft = onnx.load(graph), path.with_name("draft.onnx")
    products, weights = ["Conv", "Gemm", "MatMul"], {tensor.name for tensor in model.graph.initializer}
    with _quiet():
        quantize_static(
            model,
            str(draft),
            Images(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*products, "Relu", "MaxPool"],
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type in products and not weights & {*node.input}],
            per_channel=True,
            activation_type=QuantType[case.activations],
            weight_type=QuantType.QInt8,
            extra_options=dict(ActivationSymmetric=case.activations == "QInt8", WeightSymmetric=True),
        )
    draft.rename(path)


@contextlib.contextmanager
def _quiet():
    """The exporters log what they do at the level of warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
