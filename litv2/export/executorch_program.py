# SPDX-License-Identifier: Apache-2.0
"""ExecuTorch programs (.pte) for phones and small devices, with XNNPACK on the CPU. Sizes are fixed: memory is planned ahead of time."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..errors import MissingPackage
from .format import Format, Run
from .settings import Network, Settings
from .torch_program import program

try:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime
except ImportError as error:
    raise MissingPackage(f"{error}; this format needs: pip install 'litv2[executorch]'") from error


def write(network: Network, path: Path, settings: Settings) -> None:
    lowered = to_edge_transform_and_lower(program(network, settings), partitioner=[XnnpackPartitioner()])
    path.write_bytes(lowered.to_executorch().buffer)


def load(path: Path) -> Run:
    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.clone() for out in method.execute([images.contiguous()]))

    return run


FORMAT = Format(write, load, ".pte", dynamic=())
