# SPDX-License-Identifier: Apache-2.0
"""A module as a CUDA graph: its kernels are recorded once and then launched together, without Python between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CudaGraph", "each_tensor"]

WARM_UPS = 3  # calls before the capture, in which libraries choose their kernels and allocate their workspaces


def each_tensor(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    """Applies ``function`` to a result that is a tensor, or to each tensor of a tuple or list."""
    return function(result) if isinstance(result, Tensor) else type(result)(map(function, result))


class CudaGraph(nn.Module):
    """Takes and returns what ``module`` does, which must be for inference, of tensors on one CUDA device and of fixed shapes.

    The first call records the graph. Inputs of another shape, dtype or device than the first are computed by the module itself, so that
    the memory of one graph is held, however many shapes there are. Results are copies, which later calls do not overwrite. Calls may come
    from several threads and streams; as they share the graph's memory, each waits on the device for the one before.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.graph: torch.cuda.CUDAGraph | None = None
        self.lock = threading.Lock()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        with self.lock, torch.cuda.device(x.device):
            if self.graph and (x.shape, x.dtype, x.device) != (self.input.shape, self.input.dtype, self.input.device):
                return self.module(x)
            graph = self.graph or self._capture(x)
            self.free.wait()
            self.input.copy_(x)
            graph.replay()
            result = each_tensor(torch.clone, self.output)
            self.free.record()
            return result

    def _capture(self, x: Tensor) -> torch.cuda.CUDAGraph:
        self.input = x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.module(self.input)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a data loader's that pins memory, may call CUDA meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.output = self.module(self.input)
        self.free = torch.cuda.Event()  # recorded by the last call: the graph's memory may be overwritten
        self.graph = graph
        return graph
