# SPDX-License-Identifier: Apache-2.0
"""The code that ``torch.compile`` generates for a CUDA device, on a machine without one.

Dynamo and AOTAutograd trace the module on fake tensors, Inductor generates code for a device that is described to it, and the code is
read instead of run. Nothing is known here of time, or of what a library's own kernels do inside.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, config, scheduler
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litv2.inference.compiled import CUDA_OPTIONS

H100 = SimpleNamespace(
    type="cuda", index=0, name="described", major=9, minor=0, cc=90, gcnArchName="", warp_size=32, multi_processor_count=132,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, total_memory=80 << 30,
    L2_cache_size=50 << 20, shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "_reshape_alias"}
OPTIONS = dict(CUDA_OPTIONS)
for name in ("max_autotune_pointwise", "triton.cudagraphs"):  # they need a device
    del OPTIONS[name]


@dataclass
class Kernels:
    """What a call launches, in order, and the bytes that this reads and writes: each tensor once per kernel."""

    names: list[str]  # Triton's begin with triton_, the others are library calls
    bytes: int
    source: str = ""  # the generated code

    def triton(self, pattern: str = "") -> list[str]:
        return [name for name in self.names if name.startswith("triton_") and re.search(pattern, name)]

    def transposed(self) -> list[str]:
        """The generated code's buffers whose channels, the last dimension of tokens or the second of images, are not side by side."""
        allocated = re.findall(r"empty_strided_cuda\((\([\d, ]*\)), (\([\d, ]*\)), ", self.source)
        found = []
        for size, stride in (map(ast.literal_eval, pair) for pair in allocated):
            of_tokens = 1 in (stride[-1], size[-1])
            of_images = len(size) == 4 and stride[1] == 1 and size[1] >= size[-1]
            if not (of_tokens or of_images):
                found.append(f"{size} with strides {stride}")
        return found


def generated(module: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float16, **options: Any) -> Kernels:
    """Compiles ``module`` for inference as the form "compiled" does, on weights and inputs of these shapes and this dtype.

    Args:
        options: Inductor's, in place of the form's.
    """
    found: list[Kernels] = []

    def inner_compile(graph, inputs, **kwargs):
        inputs = _freeze(graph, inputs, kwargs.get("static_input_idxs", ()))
        with _described_device(), mock.patch.object(GraphLowering, "compile_to_module", _read):
            try:
                compile_fx.compile_fx_inner(graph, inputs, **kwargs)
            except _Read as read:
                found.append(read.kernels)
        return _not_run

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner_compile)

    torch._dynamo.reset()
    # Constants would be folded on the device.
    options = {"joint_graph_constant_folding": False, **OPTIONS, **options}
    with _on_fake_cuda(module, inputs, dtype) as (fake, arguments), config.patch(options), pytest.raises(_NotRun):
        torch.compile(fake, backend=backend, fullgraph=True)(*arguments)
    (kernels,) = found
    return kernels


def operators(module: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float16) -> Kernels:
    """What ``module`` calls without compilation, taking each of torch's operators for one kernel."""
    with _on_fake_cuda(module, inputs, dtype) as (fake, arguments), _Log() as log:
        fake(*arguments)
    return Kernels(log.names, log.bytes)


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if tensors and not (name.startswith("prim::") or function.is_view or name in NO_KERNEL):
            self.names.append(name)
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


@contextmanager
def _on_fake_cuda(module: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    def fake(tensor: Tensor) -> Tensor:
        kept = tensor.dtype if not tensor.is_floating_point() else dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kept, device="cuda")

    module = copy.deepcopy(module)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", _flash_attention):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = nn.Parameter(fake(tensor), False) if isinstance(tensor, nn.Parameter) else fake(tensor)
        yield module, [fake(x) for x in inputs]


def _freeze(graph: fx.GraphModule, inputs: Sequence[Tensor], weights: Sequence[int]) -> list[Tensor]:
    """Turns what depends on the weights alone into inputs, as freezing turns it into constants. Returns all inputs."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    constant = {placeholders[i] for i in weights}
    constant.update(node for node in graph.graph.nodes if node.op == "call_function" and constant.issuperset(node.all_input_nodes))
    inputs = list(inputs)
    for node in [node for node in graph.graph.nodes if node in constant and not constant.issuperset(node.users)]:
        if node.op == "call_function":
            with graph.graph.inserting_after(placeholders[-1]):
                placeholders.append(graph.graph.placeholder(f"frozen_{node.name}"))
            placeholders[-1].meta.update(node.meta)
            node.replace_all_uses_with(placeholders[-1])
            inputs.append(node.meta["val"])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return inputs


class _Read(BaseException):
    """Stops Inductor once it has generated the code."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels


class _NotRun(BaseException):
    """Raised where the code would run."""


def _not_run(*args):
    raise _NotRun


def _read(graph: GraphLowering):
    source = graph.codegen()[0].value
    call = source[source.index("def call(") :]
    launches = re.findall(r"(triton_\w+)\.run\(|extern_kernels\.(\w+)\(|torch\.ops\.([\w.]+)\(", call)
    raise _Read(Kernels(["".join(names) for names in launches], graph.count_bytes()[0], source))


def _flash_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None, dropout_p: float = 0.0, scale: float | None = None) -> Tensor:
    """Torch asks the device itself which kernel it has; this one takes no mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, scale=scale)[0]


@contextmanager
def _described_device() -> Iterator[None]:
    import triton
    from triton.backends.compiler import GPUTarget

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", H100.cc, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    cuda = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_properties=lambda device=None: H100,
        get_device_capability=lambda device=None: (H100.major, H100.minor),
        is_initialized=lambda: False,
        synchronize=lambda device=None: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        _lazy_init=lambda: None,
        _exchange_device=lambda index: 0,
        _maybe_exchange_device=lambda index: 0,
    )
    interface = dict(
        is_available=lambda: True,
        get_device_properties=lambda device=None: H100,
        get_compute_capability=lambda device=None: H100.cc,
    )
    worker = dict(get_device_properties=lambda device=None: H100, current_device=lambda: 0)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        for owner, functions in ((CudaInterface, interface), (CudaInterface.Worker, worker)):
            stack.enter_context(mock.patch.multiple(owner, **{name: staticmethod(f) for name, f in functions.items()}))
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda: True))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        yield
