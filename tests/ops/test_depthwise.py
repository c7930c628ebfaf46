# SPDX-License-Identifier: Apache-2.0
"""Depthwise convolution and GELU in one native operator: torch's numbers and gradients, and when it does not serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import fill, max_difference, normal
from litv2 import ops
from litv2.layers import Mlp
from native_helpers import close

pytestmark = pytest.mark.usefixtures("one_thread")


class Conv(nn.Module):
    """A depthwise convolution of these tensors, whatever transform they are in."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1, groups=len(self.weight))


def depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.depthwise_gelu(x, Conv(weight, bias))


def plain_depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1))


def depthwise_case(*shape: int, scale: float = 1.0) -> list[Tensor]:
    """x, weight and bias, leaves with gradients."""
    C = shape[-1]
    return [t.requires_grad_() for t in (scale * normal(0, *shape), 0.4 * normal(1, C, 1, 3, 3), 0.3 * normal(2, C))]


@pytest.mark.parametrize("scale", [1.0, 20.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 16), (2, 1, 6, 48), (3, 5, 1, 16), (1, 2, 2, 384), (2, 2, 1, 32), (1, 1, 2, 16), (3, 7, 5, 48), (2, 14, 14, 384)]
)
def test_depthwise_gelu_and_its_gradients(shape, scale):
    case = depthwise_case(*shape, scale=scale)
    gradient = normal(3, *shape)
    exact = [t.detach().double().requires_grad_() for t in case]
    expected = plain_depthwise_gelu(*exact)
    expected.backward(gradient.double())
    for count in (1, 2, 5):  # 5 may share a map of 7 rows, whose neighbours are another thread's
        torch.set_num_threads(count)
        y = depthwise_gelu(*case)
        assert "native_depthwise_gelu" in y.grad_fn.name() and y.is_contiguous()
        assert close(y, expected)
        for ours, theirs in zip(torch.autograd.grad(y, case, gradient), exact):
            assert ours.shape == theirs.shape and close(ours, theirs.grad, 1e-5)


def test_gelu_from_end_to_end():
    """One tap of 1: x itself, far into both tails, where GELU is exactly 0 and x, its slope 0 and 1."""
    x = torch.cat((torch.linspace(-50, 50, 2001), torch.linspace(-6, 6, 4001), torch.tensor([0.0, 1e-30, -1e-30, 3e4, -3e4, 1e18, -1e18])))
    x = F.pad(x, (0, -len(x) % 16)).view(1, 1, -1, 16).requires_grad_()
    weight = torch.zeros(16, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    y = depthwise_gelu(x, weight, torch.zeros(16))
    (slope,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact)
    expected.sum().backward()
    assert ((y - expected).abs() <= 1e-6 * exact.abs()).all() and max_difference(slope, exact.grad) < 1e-6
    upper, lower = x >= 6, x <= -6
    assert torch.equal(y[upper], x[upper]) and not y[lower].any()
    far = x.abs() > 15
    assert max_difference(slope[far], exact.grad[far]) < 1e-17


def test_depthwise_gelu_of_any_strides():
    x, weight, bias = depthwise_case(2, 6, 5, 32)
    exact = plain_depthwise_gelu(x.double(), weight.double(), bias.double())
    for view in (
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat((x, x), -1)[..., :32],
        F.pad(x, (0, 0, 1, 1))[:, :, 1:-1],
    ):
        assert not view.is_contiguous() and close(depthwise_gelu(view, weight, bias), exact)
    for ours, theirs in zip(
        *(torch.autograd.grad(f(x, weight, bias).sum(), (x, weight, bias)) for f in (depthwise_gelu, plain_depthwise_gelu))
    ):
        assert close(ours, theirs, 1e-5)  # the gradient of a sum has no strides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_depthwise_gelu_where_the_operator_does_not_serve(dtype):
    case = [t.to(dtype) for t in depthwise_case(2, 5, 6, 32 if dtype == torch.float64 else 20)]
    y = depthwise_gelu(*case)
    assert y.dtype == dtype and torch.equal(y, plain_depthwise_gelu(*case))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_depthwise_gelu_under_autocast_where_it_does_not_serve(cast):
    case = depthwise_case(2, 5, 6, 32 if cast == torch.float16 else 20)
    with torch.autocast("cpu", cast):
        y = depthwise_gelu(*case)
        assert y.dtype == cast and torch.equal(y, plain_depthwise_gelu(*case))


@pytest.mark.parametrize("autocast", [False, True])
def test_depthwise_gelu_in_bfloat16(autocast):
    """What float32 gives, rounded, and not further from the truth than torch's."""
    case, gradient = depthwise_case(2, 5, 6, 32), normal(3, 2, 5, 6, 32).bfloat16()
    dtypes = [torch.bfloat16] + 2 * [torch.float32 if autocast else torch.bfloat16]
    case = [t.detach().to(dtype).requires_grad_() for t, dtype in zip(case, dtypes)]
    results = {}
    for function in (depthwise_gelu, plain_depthwise_gelu):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(*case)
        results[function] = y, *torch.autograd.grad(y, case, gradient)
    assert "native_depthwise_gelu" in results[depthwise_gelu][0].grad_fn.name()
    for function, dtype in ((depthwise_gelu, torch.float32), (plain_depthwise_gelu, torch.float64)):
        wider = [t.detach().to(dtype).requires_grad_() for t in case]
        y = function(*wider)
        results[dtype] = y, *torch.autograd.grad(y, wider, gradient.to(dtype))
    for ours, theirs, unrounded, exact in zip(*results.values()):
        assert ours.dtype == theirs.dtype and torch.equal(ours, unrounded.to(ours.dtype))
        assert max_difference(ours, exact) <= max_difference(theirs, exact)


def test_no_second_derivatives():
    x, weight, bias = depthwise_case(1, 3, 3, 16)
    (gradient,) = torch.autograd.grad(depthwise_gelu(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; LITV2_OPS=depthwise_gelu=torch"):
        gradient.sum().backward()


def test_forward_derivatives():
    """The operator has none: torch's, not silently zero."""
    x, weight, bias = depthwise_case(1, 3, 4, 16)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    tangent = normal(5, *x.shape)
    results = [torch.func.jvp(lambda x, f=f: f(x, weight, bias), (x,), (tangent,))[1] for f in (depthwise_gelu, plain_depthwise_gelu)]
    assert close(*results) and results[0].any()
    with torch.autograd.forward_ad.dual_level():
        y = depthwise_gelu(torch.autograd.forward_ad.make_dual(x, tangent), weight, bias)
        assert close(torch.autograd.forward_ad.unpack_dual(y).tangent, results[1])


def test_functional_derivatives():
    x, weight, bias = (t.detach() for t in depthwise_case(2, 2, 2, 16))
    for transform in (torch.func.grad, torch.func.hessian):
        ours, theirs = (
            transform(lambda bias, f=f: f(x, weight, bias).square().sum())(bias) for f in (depthwise_gelu, plain_depthwise_gelu)
        )
        assert close(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, weight, bias = depthwise_case(2, 3, 5, 16)
    x = x.detach().to(dtype).requires_grad_()
    arguments = (x, weight.detach().flatten(1).t().contiguous().requires_grad_(), bias)
    torch.library.opcheck(torch.ops.litv2.native_depthwise_gelu, arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.extra)])
def test_compiled_training(backend, autocast):
    mlp = fill(Mlp(16, 32))
    compiled = torch.compile(mlp, backend=backend, fullgraph=True)
    for shape in ((2, 3, 5, 16), (1, 6, 7, 16)):
        x = normal(0, *shape).requires_grad_()
        results = []
        for f in (compiled, mlp):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = f(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *mlp.parameters()))))
        assert all(close(a, b, 2e-2 if autocast else 1e-5) for a, b in zip(*results))
