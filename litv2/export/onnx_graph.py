# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs, with the deformable convolution as one node or made of operators that every runtime has."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mm_modules.DCN import deform_conv_nodes

from ..errors import MissingPackage, UserError
from .format import Format, Run
from .settings import Network, Settings, example_input

try:
    import numpy as np
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401 (torch.onnx needs it)
    from onnx import helper, numpy_helper
except ImportError as error:
    raise MissingPackage(f"{error}; exports to ONNX need: pip install 'litv2[onnx]'") from error

INPUT = "images"
NODE_OPSET, TRACED_OPSET, STANDARD_OPSET = 19, 18, 17  # DeformConv needs 19; torch's exporter writes at least 18


def write(network: Network, path: Path, settings: Settings) -> None:
    """Writes the graph with ``DeformConv`` nodes, opset 19."""
    with deform_conv_nodes():
        model = _trace(network, settings, NODE_OPSET)
    _save(model, path, settings)


def write_standard(network: Network, path: Path, settings: Settings) -> None:
    """Writes the graph with the deformable convolution as Gather and MatMul, opset 17."""
    _save(lower_opset(_trace(network, settings, TRACED_OPSET)), path, settings)


def _trace(network: Network, settings: Settings, opset: int) -> onnx.ModelProto:
    # Quantization starts from float32.
    dtype = torch.float32 if settings.dtype == "int8" else getattr(torch, settings.dtype)
    dynamic = {}
    if settings.leaves_open("batch"):
        dynamic[0] = "batch"
    if settings.leaves_open("size"):
        dynamic |= {2: "height", 3: "width"}
    network = network.in_dtype(dtype)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            network,
            (example_input(network, settings, dtype),),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=(dynamic,),
            input_names=[INPUT],
            output_names=list(network.outputs),
            verbose=False,
        )
    assert program is not None  # always returned with dynamo=True
    return program.model_proto


@contextlib.contextmanager
def _quiet():
    """Silences the exporter, which logs its progress as warnings."""
    import logging
    import warnings

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _save(model: onnx.ModelProto, path: Path, settings: Settings) -> None:
    check_inputs_used(model)
    onnx.checker.check_model(model, full_check=True)
    if settings.dtype == "int8":
        from .quantize import quantize

        quantize(model, path, settings)
    else:
        onnx.save(model, path)


def check_inputs_used(model: onnx.ModelProto) -> None:
    """Raises UserError if an input does not reach any output, which is how the release's graph lost its image."""
    producers = {output: node for node in model.graph.node for output in node.output}
    seen, front = set(), [output.name for output in model.graph.output]
    while front:
        name = front.pop()
        if name not in seen:
            seen.add(name)
            front += producers[name].input if name in producers else []
    unused = [value.name for value in model.graph.input if value.name not in seen]
    if unused:
        raise UserError(f"export: the graph does not use its inputs {unused}, so its outputs would not depend on the image")


def lower_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Converts opset 18 to 17 for the operators of a LITv2; onnx's own converter cannot downgrade Pad and ReduceMean.

    Raises:
        UserError: an operator uses a feature of opset 18 that is not handled here.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        now = onnx.defs.get_schema(node.op_type, TRACED_OPSET, node.domain)
        if now.since_version < TRACED_OPSET:
            continue
        if node.op_type.startswith("Reduce") and len(node.input) > 1:  # axes were an attribute in opset 17
            axes = numpy_helper.to_array(constants[node.input.pop()]).tolist()
            node.attribute.append(helper.make_attribute("axes", axes))
        before = onnx.defs.get_schema(node.op_type, STANDARD_OPSET, node.domain)
        for attribute in [a for a in node.attribute if a.name not in before.attributes]:
            default = now.attributes[attribute.name].default_value
            if node.op_type == "Split" or helper.get_attribute_value(attribute) == helper.get_attribute_value(default):
                node.attribute.remove(attribute)  # it states the default of opset 17: without num_outputs, Split's parts are equal
        if len(node.input) > len(before.inputs) or not {a.name for a in node.attribute} <= before.attributes.keys():
            raise UserError(f"export: {node.op_type} of opset {TRACED_OPSET}, as used here, cannot be converted to opset {STANDARD_OPSET}")
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = STANDARD_OPSET
    model.ir_version = 8  # the IR version of opset 17, for runtimes of that age
    return model


def load(path: Path, threads: int | None = None) -> Run:
    """Loads the graph in onnxruntime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    # After a run its threads would wait busily for the next one, and take the processor from whatever else runs meanwhile.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    half = session.get_inputs()[0].type == "tensor(float16)"

    def run(images: Tensor) -> tuple[Tensor, ...]:
        array = images.numpy().astype(np.float16) if half else images.numpy()
        return tuple(torch.from_numpy(out) for out in session.run(None, {INPUT: array}))

    return run


FORMAT = Format(write, load, ".onnx", ("float32", "float16", "int8"))
STANDARD = replace(FORMAT, write=write_standard)
