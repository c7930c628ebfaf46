# SPDX-License-Identifier: Apache-2.0
"""torch.export programs (.pt2) for torch itself, AOTInductor and ExecuTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..errors import UserError
from .format import Format, Run
from .settings import Network, Settings, example_input


def write(network: Network, path: Path, settings: Settings) -> None:
    torch.export.save(program(network, settings), path)


def program(network: Network, settings: Settings) -> ExportedProgram:
    """Traces the network into plain tensor operations.

    Raises:
        UserError: the graph does not use the image.
    """
    dtype = getattr(torch, settings.dtype)
    dynamic = {}
    if settings.leaves_open("batch"):
        dynamic[0] = Dim.DYNAMIC
    if settings.leaves_open("size"):
        dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    network = network.in_dtype(dtype)
    with torch.no_grad():
        traced = torch.export.export(network, (example_input(network, settings, dtype),), dynamic_shapes=(dynamic,))
    used = {node for node in traced.graph.nodes if node.op == "output"}
    for node in reversed(traced.graph.nodes):
        if node in used:
            used.update(node.all_input_nodes)
    for name in traced.graph_signature.user_inputs:
        if not any(node.name == name for node in used):
            raise UserError(f"export: the graph does not use its input {name!r}, so its outputs would not depend on the image")
    return traced


def load(path: Path) -> Run:
    module = torch.export.load(path).module()
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, ...]:
        return module(images.to(dtype))

    return run


# With dynamic sizes, torch.export rules out maps of a single row.
FORMAT = Format(write, load, ".pt2", ("float32", "bfloat16", "float16"), min_cells=2)
