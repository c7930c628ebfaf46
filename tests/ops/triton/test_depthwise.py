# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ``depthwise_gelu``: interpreted, against torch in float64; compiled, within their ceilings; and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from gpu_helpers import on_gpu
from helpers import fill, max_difference, normal
from litv2.layers import Mlp
from litv2.ops import OPERATORS, use
from litv2.ops.triton import depthwise
from triton_helpers import CAPABILITIES, compile_for, interpreted

interpreter = pytest.mark.usefixtures("interpreter")
operator = OPERATORS["depthwise_gelu"]
SIZES = [(2, 1, 1, 1), (1, 1, 6, 28), (1, 6, 1, 2), (1, 5, 7, 1), (2, 7, 5, 28)]  # B, H, W, rows of a program
CASES = [
    *((*size, torch.float32) for size in (*SIZES, (1, 17, 3, 4))),
    pytest.param(1, 14, 14, 7, torch.float32, marks=pytest.mark.extra),
    *(pytest.param(*size, torch.bfloat16, marks=pytest.mark.extra) for size in SIZES),
]


def case(B: int, H: int, W: int, C: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, nn.Conv2d]:
    conv = nn.Conv2d(C, C, 3, padding=1, groups=C)
    return normal(1, B, H, W, C).to(device, dtype).requires_grad_(), conv.to(device, dtype)


def results(backend: str, x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    """The output and the gradients of x, weight and bias."""
    y = operator.backends[backend].run(x, conv)
    return [y, *torch.autograd.grad(y, (x, *conv.parameters()), normal(2, *y.shape).to(y))]


def in_float64(x: Tensor, conv: nn.Conv2d) -> list[Tensor]:
    return results("torch", x.detach().double().requires_grad_(), copy.deepcopy(conv).double())


def error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@interpreter
@pytest.mark.parametrize("B, H, W, rows, dtype", CASES)
def test_the_output_and_the_gradients(B, H, W, rows, dtype, monkeypatch):
    """As precise as torch's, whatever was in the memory and how many rows a program of the forward pass has."""
    monkeypatch.setattr(interpreted()["depthwise"], "ROWS", rows)
    arguments = case(B, H, W, 24, dtype)
    factor = 4 if dtype == torch.bfloat16 else 2  # the interpreter does not round to bfloat16, it truncates
    assert torch.empty(3).isnan().all()
    for ours, theirs, exact in zip(results("triton", *arguments), results("torch", *arguments), in_float64(*arguments)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.is_contiguous()
        assert error(ours, exact) <= max(factor * error(theirs, exact), 1e-6)


@pytest.mark.extra
@interpreter
def test_more_strips_than_programs_and_more_channels_than_a_block(monkeypatch):
    """The second block of channels is not full; strides are any."""
    monkeypatch.setattr(interpreted()["depthwise"], "PROGRAMS", 6)
    x, conv = case(3, 2, 9, 136)
    x = x.detach().permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1).requires_grad_()
    assert not x.is_contiguous()
    for ours, exact in zip(results("triton", x, conv), in_float64(x, conv)):
        assert error(ours, exact) <= 1e-6


@interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite(value):
    """It is where torch has it: in the neighbours of its channel, and nothing else changes."""
    x, conv = case(1, 4, 7, 16)
    with torch.no_grad():
        x[0, 1, 5, 3] = value
    for ours, theirs in zip(results("triton", x, conv), results("torch", x, conv)):
        assert torch.equal(ours.isfinite(), theirs.isfinite()) and not theirs.isfinite().all()
        assert torch.allclose(ours[ours.isfinite()], theirs[ours.isfinite()], atol=1e-5)


@interpreter
def test_gelu():
    """By a convolution that keeps its input: as precise as float32 allows, and so is its slope."""
    conv, x = nn.Conv2d(2001, 2001, 3, padding=1, groups=2001), torch.linspace(-30, 30, 2001).view(1, 1, 1, -1).requires_grad_()
    nn.init.dirac_(conv.weight, groups=2001)
    nn.init.zeros_(conv.bias)
    y, slope, *_ = (t.double().flatten() for t in results("triton", x, conv))
    exact = x.detach().double().flatten().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    expected.backward(normal(2, *x.shape).double().flatten())
    scale = 1 + exact.detach().abs()
    assert ((y - expected).abs() / scale).max() <= 1e-7 and ((slope - exact.grad).abs() / scale).max() <= 2e-6


@interpreter
def test_no_images():
    x, conv = case(0, 5, 7, 16)
    y, of_x, of_weight, of_bias = results("triton", x, conv)
    assert y.shape == of_x.shape == x.shape and not of_weight.any() and not of_bias.any()


@pytest.mark.extra
@interpreter
@pytest.mark.parametrize("trained", [True, False])
def test_opcheck(trained):
    """Shapes, strides and dtypes of fake tensors, autograd, and AOTAutograd's tracing."""
    x, conv = case(1, 2, 3, 16)
    arguments = [t.detach().requires_grad_(trained) for t in (x, conv.weight, conv.bias)]
    torch.library.opcheck(torch.ops.litv2.triton_depthwise_gelu, arguments)


@pytest.mark.extra
@interpreter
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_training(autocast):
    """torch.compile keeps the operator, and its gradients."""
    mlp, x = fill(Mlp(8, 16)), normal(0, 1, 3, 5, 8).requires_grad_()
    compiled = torch.compile(mlp, backend="aot_eager", fullgraph=True)
    found = []
    for function, backend in ((compiled, "triton"), (mlp, "triton"), (mlp, "torch")):
        with use(depthwise_gelu=backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, *mlp.parameters()))])
    for ours, eager, plain in zip(*found):
        assert ours.dtype == plain.dtype and torch.equal(ours, eager)
        assert error(ours, plain.double()) <= (5e-2 if autocast else 1e-5)


@pytest.mark.extra
@interpreter
def test_data_parallel_training():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mlp, x = fill(Mlp(8, 16)), normal(0, 1, 3, 5, 8)
        with use(depthwise_gelu="triton"):
            DistributedDataParallel(mlp)(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    expected = torch.autograd.grad(mlp(x).square().sum(), tuple(mlp.parameters()))
    assert all(error(p.grad, theirs.double()) <= 1e-5 for p, theirs in zip(mlp.parameters(), expected))


@interpreter
def test_no_second_derivatives():
    x, conv = case(1, 2, 3, 16)
    (gradient,) = torch.autograd.grad(operator.backends["triton"].run(x, conv).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="the triton backend has no second derivatives; LITV2_OPS=depthwise_gelu=torch"):
        gradient.sum().backward()


@interpreter
def test_exported_programs_have_no_kernels():
    program = torch.export.export(fill(Mlp(8, 16)).eval(), (normal(0, 1, 3, 5, 8),))
    names = [str(node.target) for node in program.graph.nodes]
    assert any("conv2d" in name for name in names) and not any("litv2" in name for name in names)


def chosen(**settings) -> tuple[str, str | None]:
    """The backend for a fake tensor on CUDA, and the reason if it is not this one."""
    settings = dict(dtype=torch.float16, weight=torch.float16, bias=True) | settings
    with FakeTensorMode():
        conv = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=settings["bias"], device="cuda", dtype=settings["weight"])
        arguments = torch.empty(2, 5, 7, 16, device="cuda", dtype=settings["dtype"]), conv
        return operator.choose(*arguments).name, operator.explain(*arguments)["triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fake tensors are for a machine without a GPU")
@pytest.mark.parametrize(
    "settings, reason",
    [
        ({}, None),
        (dict(dtype=torch.float64, weight=torch.float64), "it has no kernel for torch.float64"),
        (dict(weight=torch.float32), "x is torch.float16, but the weights are torch.float32"),
        (dict(bias=False), "the convolution has no bias"),
    ],
)
def test_reasons(settings, reason):
    assert chosen(**settings) == ("torch" if reason else "triton", reason)


def test_the_cpu_is_not_served():
    assert operator.explain(*case(1, 2, 3, 16))["triton"] == "it supports CUDA only, got cpu"


POINTERS = ("x", "weight", "bias", "y", "gradient", "before_gelu")
KERNELS = {
    "forward": (depthwise.forward_kernel, dict(depthwise.FORWARD, FINISH=True)),
    "gradient of the input": (depthwise.forward_kernel, dict(depthwise.FORWARD, FINISH=False)),
    "backward": (depthwise.backward_kernel, dict(depthwise.BACKWARD)),
}


@pytest.mark.extra
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "name, width, reads, writes", [("forward", ".128", 9, 2), ("gradient of the input", ".128", 9, 2), ("backward", "", 7, 11)]
)
def test_machine_code(name, width, reads, writes, capability):
    """Nothing is spilled; a thread reads and writes all its channels at once: eight, and for the many sums of the backward pass two.

    Three reads are of a row, the one of the backward pass that is left of the gradient: before the loop, and in it, where the forward
    pass has two rows.
    """
    kernel, constexprs = KERNELS[name]
    types = dict.fromkeys(POINTERS, "float16") | dict(sums="float32", H="i32", W="i32", items="i32")
    types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
    warps = constexprs["num_warps"]
    found = compile_for(kernel, types, {k: v for k, v in constexprs.items() if k != "num_warps"}, capability, num_warps=warps)
    assert found.registers <= 168 and found.stack == 0
    assert found.count(rf"LDG\.E{width}(\.CONSTANT)?(?= )") == reads and found.count(rf"STG\.E{width}(?= )") == writes


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_repeatable(dtype):
    """Bit by bit: no sum depends on which program is the first."""
    arguments = case(8, 28, 20, 384, dtype, "cuda")
    first, second = results("triton", *arguments), results("triton", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@on_gpu
def test_a_large_map():
    """More than 2**31 values."""
    x, conv = case(1, 1, 1, 1024, torch.float16, "cuda")
    x = x.detach().expand(4, 1030, 520, 1024).contiguous()
    with torch.no_grad():
        y = operator.backends["triton"].run(x, conv)
        for part in (slice(0, 1), slice(3, 4)):
            assert max_difference(y[part], operator.backends["torch"].run(x[part], conv)) < 1e-2


@on_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode):
    """Where it is forced, and in CUDA graphs."""
    mlp, x = fill(Mlp(64, 256)).cuda(), normal(0, 2, 9, 5, 64).cuda().requires_grad_()
    compiled = torch.compile(mlp, mode=mode, fullgraph=True)
    for _ in range(3):
        with use(depthwise_gelu="triton"):
            y = compiled(x)
            ours = [t.clone() for t in (y, *torch.autograd.grad(y.square().sum(), (x, *mlp.parameters())))]
    with use(depthwise_gelu="torch"):
        y = mlp(x)
    expected = [y, *torch.autograd.grad(y.square().sum(), (x, *mlp.parameters()))]
    assert all(error(a, b.double()) <= 1e-3 for a, b in zip(ours, expected))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_a_gpu(dtype):
    """As precise as torch's, forward and backward."""
    x, conv = case(2, 9, 5, 64, device="cuda")
    found = {}
    for backend in ("triton", "torch"):
        with torch.autocast("cuda", dtype):
            found[backend] = results(backend, x, conv)
    for ours, theirs, exact in zip(*found.values(), in_float64(x, conv)):
        assert ours.dtype == theirs.dtype and error(ours, exact) <= 2 * error(theirs, exact)
