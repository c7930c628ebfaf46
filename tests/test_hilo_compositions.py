# SPDX-License-Identifier: Apache-2.0
"""HiLo's options under what torch puts around a layer: compilation, exports, autocast, checkpointing, DDP, counting."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers import max_difference
from hilo import HiLo, HiLo2d, HiLoWeights
from test_hilo_options import DIM, HEADS, OPTIONS, B, H, W, first, layer_for, numbers, options

X = numbers(0, B, H, W, DIM).float()


def results(out: Any) -> list[Tensor]:
    """The output and, if it has any, the weights."""
    return [y for y in (out[0], *out[1]) if y is not None] if isinstance(out, tuple) else [out]


def assert_close(ours: Any, expected: Any, tolerance: float = 1e-5) -> None:
    assert len(results(ours)) == len(results(expected))
    assert all(max_difference(a, b) < tolerance for a, b in zip(results(ours), results(expected)))


@pytest.fixture(autouse=True)
def _forget_compiled_graphs():
    torch.compiler.reset()


@pytest.mark.parametrize("option", OPTIONS)
def test_compiles_as_one_graph(option):
    layer, kwargs = layer_for(option), options()[option][1]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected, ours = layer(x, **kwargs), compiled(y, **kwargs)
    assert_close(ours, expected)
    first(expected).sum().backward(), first(ours).sum().backward()
    assert max_difference(x.grad, y.grad) < 1e-4


def test_compiles_extra_tokens_and_maps():
    layer, maps = layer_for("mask"), layer_for("all", HiLo2d)
    mask, x = options()["mask"][1]["mask"], numbers(0, B, 2 + H * W, DIM).float()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, H, W, extra_tokens=2, mask=mask), layer(x, H, W, extra_tokens=2, mask=mask))
    x = X.permute(0, 3, 1, 2)
    kwargs = dict(context=x.flip(0), pos=x[:1], mask=mask, need_weights=True)
    assert_close(torch.compile(maps, fullgraph=True, backend="aot_eager")(x, **kwargs), maps(x, **kwargs))


@pytest.mark.extra  # compiles C++
@torch.no_grad()
def test_inductor():
    for option in ("plain", "all"):
        layer, kwargs = layer_for(option), options()[option][1]
        assert_close(torch.compile(layer, fullgraph=True)(X, **kwargs), layer(X, **kwargs), 1e-4)


def resized(kwargs: dict, batch: int, rows: int, columns: int) -> dict:
    """Tensors of a call for another batch and size."""
    result = dict(kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            samples = len(value) if len(value) == 1 else batch
            result[name] = numbers(7, samples, rows, columns, DIM).float() if value.dim() == 4 else numbers(7, samples, rows, columns) > -1
    return result


def dynamic_sizes(value: Any) -> dict[int, Any] | None:
    """Of a map or its mask: the batch, unless it is 1 for all samples, and the size."""
    return {dim: Dim.DYNAMIC for dim in (0, 1, 2) if value.shape[dim] > 1} if isinstance(value, Tensor) else None


@pytest.mark.parametrize("option", OPTIONS)
def test_exports_with_dynamic_sizes(option):
    layer, kwargs = layer_for(option).eval(), options()[option][1]
    sizes = {name: dynamic_sizes(value) for name, value in {"x": X, **kwargs}.items()}
    run = export(layer, (X,), kwargs, dynamic_shapes=sizes).module()
    for samples, height, width in ((3, 8, 8), (1, 7, 12), (5, 13, 6)):
        x = numbers(3, samples, height, width, DIM).float()
        other = resized(kwargs, samples, *((9, 5) if "another" in option else (height, width)))
        assert_close(run(x, **other), layer(x, **other))


def test_exports_extra_tokens():
    layer, mask = layer_for("mask").eval(), options()["mask"][1]["mask"]
    x, dynamic = numbers(0, B, 2 + H * W, DIM).float(), Dim.DYNAMIC
    sizes = dict(x={0: dynamic, 1: dynamic}, H=dynamic, W=dynamic, mask=dynamic_sizes(mask), extra_tokens=None)
    program = export(layer, (x, H, W), dict(mask=mask, extra_tokens=2), dynamic_shapes=sizes).module()
    for samples, height, width in ((2, 7, 9), (3, 8, 8), (5, 13, 6)):
        x, mask = numbers(3, samples, 2 + height * width, DIM).float(), numbers(4, samples, height, width) > -1
        assert_close(program(x, height, width, mask=mask, extra_tokens=2), layer(x, height, width, mask=mask, extra_tokens=2))


@pytest.mark.extra
def test_onnx_with_all_options(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, kwargs = layer_for("all").eval(), options()["all"][1]
    names = ["context", "pos", "context_pos", "mask"]

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, context: Tensor, pos: Tensor, context_pos: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
            out, weights = self.layer(x, context=context, pos=pos, context_pos=context_pos, mask=mask, need_weights=True)
            return out, weights.hifi, weights.lofi

    sizes = tuple(map(dynamic_sizes, (X, *(kwargs[name] for name in names))))
    path = tmp_path / "hilo.onnx"
    torch.onnx.export(Positional().eval(), (X, *(kwargs[name] for name in names)), path, dynamo=True, dynamic_shapes=sizes, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for samples, height, width in ((2, 7, 9), (3, 8, 8), (1, 13, 6)):
        x, other = numbers(3, samples, height, width, DIM).float(), resized(kwargs, samples, height, width)
        tensors = [x, *(other[name] for name in names)]
        outputs = session.run(None, {entry.name: y.numpy() for entry, y in zip(session.get_inputs(), tensors)})
        out, weights = layer(x, **other)
        for ours, expected in zip(outputs, (out, *weights)):
            assert max_difference(torch.from_numpy(ours), expected) < 1e-4


def test_jit_trace():
    layer = layer_for("plain").eval()
    layer.requires_grad_(False)
    traced = torch.jit.trace(lambda x: layer(x.flatten(1, 2), H, W), X)
    assert torch.equal(traced(X.flip(0)), layer(X.flip(0).flatten(1, 2), H, W))


@pytest.mark.parametrize("option", OPTIONS)
def test_autocast(option):
    layer, kwargs = layer_for(option), options()[option][1]
    expected = first(layer(X, **kwargs))
    with torch.autocast("cpu", torch.bfloat16):
        out = first(layer(X, **kwargs))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and (out - expected).norm() < 0.05 * expected.norm()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_checkpointing(option):
    layer, kwargs = layer_for(option, attn_drop=0.3, proj_drop=0.3), options()[option][1]
    gradients = []
    for call in (layer, lambda *args, **kwargs: checkpoint(layer, *args, use_reentrant=False, **kwargs)):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        out = first(call(x, **kwargs))
        gradients.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    assert all(map(torch.equal, *gradients))


def test_ddp():
    """Every parameter of every option has a gradient, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for option in OPTIONS:
            layer, kwargs = layer_for(option), options()[option][1]
            wrapped = DistributedDataParallel(copy.deepcopy(layer))
            for call in (wrapped, wrapped, layer, layer):  # a second pass finds what the first left unused
                first(call(X, **kwargs)).sum().backward()
            for parameter, expected in zip(wrapped.parameters(), layer.parameters()):
                assert torch.equal(parameter.grad, expected.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("option", [*OPTIONS, "extra tokens"])
@pytest.mark.parametrize("size", [(12, 12), (7, 9)])
@torch.no_grad()
def test_flops_are_those_of_torch(option, size):
    """Torch's count, whose padded cells are fewer: as in the paper, flops() projects them and lets their queries attend."""
    E, (H, W) = 2 * (option == "extra tokens"), size
    layer, kwargs = layer_for("plain" if E else option), {} if E else resized(options()[option][1], 1, *size)
    x = numbers(0, 1, E + H * W, DIM).float() if E else numbers(0, 1, H, W, DIM).float()
    kwargs = kwargs | (dict(H=H, W=W, extra_tokens=E) if E else {})
    context_size = tuple(kwargs["context"].shape[1:3]) if "context" in kwargs else None
    with FlopCounterMode(display=False) as counter:
        layer(x, **kwargs | dict(need_weights=True))
    (sh, sw), (ph, pw), (rows, columns) = layer.window, layer.pool, context_size or size
    padded = -(-H // sh) * sh * -(-W // sw) * sw - H * W
    M, D, Dh, Dl = E + -(-rows // ph) * -(-columns // pw), layer.dim, layer.h_dim, layer.l_dim
    not_computed = padded * (Dh**2 + D * Dl + 2 * M * Dl + Dl**2)
    not_counted = 2 * E**2 * Dh  # Hi-Fi among the extra tokens is a fused kernel that torch does not count
    assert counter.get_total_flops() // 2 == layer.flops(H, W, context_size, E) - not_computed - not_counted
    assert padded == 0 or size == (7, 9)


def test_weights_are_named():
    out, weights = HiLo(DIM, HEADS, alpha=1.0)(X, need_weights=True)
    assert isinstance(weights, HiLoWeights) and weights.hifi is None and weights.lofi.shape == (B, HEADS, H * W, 20)
