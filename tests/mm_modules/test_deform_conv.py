# SPDX-License-Identifier: Apache-2.0
"""Every backend of the deformable convolution against a slow loop, torchvision and the promises of the docstring."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.export import Dim, export

from helpers import ROOT, assert_as_precise, max_difference
from mm_modules.DCN import DeformConv2dPack, deform_conv, deform_conv2d, reference
from mm_modules.dispatch import use


@pytest.fixture(params=["compiled", "torchvision", "torch"])
def backend(request):
    """``deform_conv2d`` computed by this backend."""
    if problem := deform_conv.operator.backends[request.param].why_not(torch.zeros(1, 1, 1, 1)):
        pytest.skip(f"the backend {request.param}: {problem}")
    with use(deform_conv2d=request.param):
        yield request.param


def slow_deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask):
    """The definition, one sample at a time."""
    B, C, H, W = input.shape
    O, Cg, kh, kw = weight.shape
    Ho, Wo = offset.shape[2:]
    offset_groups, groups = offset.shape[1] // (2 * kh * kw), C // Cg
    out = input.new_zeros(B, O, Ho, Wo)
    for b in range(B):
        for i in range(Ho):
            for j in range(Wo):
                for o in range(O):
                    total = 0.0 if bias is None else bias[o].item()
                    for c in range(Cg):
                        channel = o // (O // groups) * Cg + c
                        g = channel // (C // offset_groups)
                        for tap in range(kh * kw):
                            at = 2 * (g * kh * kw + tap)
                            y = i * stride[0] - padding[0] + tap // kw * dilation[0] + offset[b, at, i, j].item()
                            x = j * stride[1] - padding[1] + tap % kw * dilation[1] + offset[b, at + 1, i, j].item()
                            value = bilinear(input[b, channel], y, x)
                            if mask is not None:
                                value *= mask[b, g * kh * kw + tap, i, j].item()
                            total += value * weight[o, c, tap // kw, tap % kw].item()
                    out[b, o, i, j] = total
    return out


def bilinear(image, y, x):
    H, W = image.shape
    if math.isnan(y) or math.isnan(x):
        return math.nan
    if not (-1 < y < H and -1 < x < W):
        return 0.0
    total = 0.0
    for yy in (math.floor(y), math.floor(y) + 1):
        for xx in (math.floor(x), math.floor(x) + 1):
            if 0 <= yy < H and 0 <= xx < W:
                total += (1 - abs(y - yy)) * (1 - abs(x - xx)) * image[yy, xx].item()
    return total


def case(
    B=2,
    C=4,
    H=6,
    W=5,
    O=6,
    kernel=(3, 2),
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    offset_groups=1,
    masked=False,
    dtype=torch.float64,
):
    """Random arguments of one geometry; offsets reach beyond the image."""
    kh, kw = kernel
    Ho = (H + 2 * padding[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    Wo = (W + 2 * padding[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    torch.manual_seed(0)
    input = torch.randn(B, C, H, W, dtype=dtype)
    offset = torch.randn(B, 2 * offset_groups * kh * kw, Ho, Wo, dtype=dtype) * 2
    weight = torch.randn(O, C // groups, kh, kw, dtype=dtype)
    mask = torch.rand(B, offset_groups * kh * kw, Ho, Wo, dtype=dtype) if masked else None
    return [input, offset, weight, torch.randn(O, dtype=dtype), stride, padding, dilation, mask]


GEOMETRIES = [
    dict(kernel=(2, 2), stride=(2, 2)),  # DTM
    dict(kernel=(2, 2), stride=(2, 2), H=7, W=5),  # odd: the last row and column are not on the grid
    dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), B=3),
    dict(groups=2, offset_groups=2, masked=True, padding=(2, 1)),
    dict(groups=2, offset_groups=4, dilation=(2, 1)),
    dict(kernel=(1, 1), masked=True),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_slow_reference(backend, geometry):
    arguments = case(**geometry)
    exact = slow_deform_conv2d(*arguments)
    assert max_difference(deform_conv2d(*arguments), exact) < 1e-12
    single = [argument.float() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    assert max_difference(deform_conv2d(*single), exact) < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients_equal_torchvisions(backend, geometry):
    arguments = case(**geometry)
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    for tensor in tensors:
        tensor.requires_grad_()
    seed = torch.randn_like(deform_conv2d(*arguments))
    ours = torch.autograd.grad(deform_conv2d(*arguments), tensors, seed)
    theirs = torch.autograd.grad(torchvision.ops.deform_conv2d(*arguments), tensors, seed)
    for a, b in zip(ours, theirs):
        assert max_difference(a, b) < 1e-11


@pytest.mark.parametrize("geometry", GEOMETRIES[:4], ids=str)
def test_gradcheck(backend, geometry):
    arguments = case(**{**geometry, "B": 1, "H": 4, "W": 4, "O": 2, "C": 4})
    # Bilinear interpolation has kinks at whole positions: keep samples away from them.
    arguments[1] = arguments[1].floor() + 0.2 + 0.6 * torch.rand_like(arguments[1])
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    for tensor in tensors:
        tensor.requires_grad_()

    def function(*tensors):
        mask = tensors[4] if len(tensors) == 5 else None
        return deform_conv2d(*tensors[:4], *arguments[4:7], mask)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("batch", [0, 1, 5, 33])
def test_any_batch_and_layout(backend, batch):
    input, *others = case(kernel=(2, 2), stride=(2, 2), B=batch, dtype=torch.float32)
    expected = torchvision.ops.deform_conv2d(input, *others)
    layouts = (input, input.contiguous(memory_format=torch.channels_last), input.mT.contiguous().mT, torch.cat((input, input), 1)[:, :4])
    for layout in layouts:
        assert batch == 0 or max_difference(deform_conv2d(layout, *others), expected) < 1e-4
    assert deform_conv2d(input, *others).shape == expected.shape


def test_default_arguments_are_a_plain_convolution_at_zero_offset(backend):
    input, weight = torch.randn(2, 3, 8, 7), torch.randn(5, 3, 3, 3)
    out = deform_conv2d(input, torch.zeros(2, 18, 6, 5), weight)
    assert max_difference(out, nn.functional.conv2d(input, weight)) < 1e-4


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e9])
@pytest.mark.parametrize("size", [(6, 6), (57, 57)])
def test_wild_offsets(backend, value, size):
    """NaN reaches the outputs that use it and no others; a sample beyond the image is 0. Nothing crashes."""
    arguments = case(kernel=(2, 2), stride=(2, 2), H=size[0], W=size[1], groups=2, offset_groups=2, dtype=torch.float32)
    arguments[0].requires_grad_(), arguments[1].requires_grad_()
    with torch.no_grad():
        arguments[1][0, 3, 1, 2] = value  # image 0, offset group 0, tap 1, x
    out = deform_conv2d(*arguments)
    if math.isnan(value):
        expected = torch.zeros_like(out, dtype=torch.bool)
        expected[0, :3, 1, 2] = True  # the first weight group reads the first offset group's channels
        assert torch.equal(out.isnan(), expected)
    else:
        clean = [argument.detach().clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        clean[1][0, 3, 1, 2] = 500.0
        assert max_difference(out, deform_conv2d(*clean)) < 1e-5
        out.sum().backward()
        assert arguments[1].grad[0, 3, 1, 2] == 0 and arguments[0].grad.isfinite().all() and arguments[1].grad.isfinite().all()


def test_wild_offsets_in_a_process_of_its_own():
    """The input that kills torchvision's operator, and noise of NaN everywhere: a crash here would end pytest itself."""
    code = """
import torch
from mm_modules.DCN.deform_conv import operator
x, offset, weight = torch.randn(1, 3, 57, 57), torch.zeros(1, 8, 28, 28), torch.randn(4, 3, 2, 2)
offset[0, 0, 3, 3] = float("nan")
for noise in (offset, torch.full_like(offset, float("nan")), torch.randn_like(offset) * 1e20):
    for backend in operator.backends.values():
        if backend.name == "onnx" or backend.why_not(x):
            continue
        y = noise.clone().requires_grad_()
        backend.run(x, y, weight, None, (2, 2), (0, 0), (1, 1), None).nansum().backward()
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "alive", (done.returncode, done.stderr[-500:])


def test_offset_gradient_at_the_border():
    """At exactly -1 a sample is outside: no gradient, as in the original operator. Just inside there is one."""
    input, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1)
    for at, gradient in ((-1.0, 0.0), (-0.999, 1.0)):
        offset = torch.zeros(1, 2, 4, 4)
        offset[0, 0, 0, 0] = at
        offset.requires_grad_()
        deform_conv2d(input, offset, weight).sum().backward()
        assert offset.grad[0, 0, 0, 0].item() == gradient


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_float32_positions(backend, dtype):
    """On a wide map, offsets rounded to the input's precision would miss by a pixel: the error stays that of the values."""
    input, offset, weight, *others = case(C=8, H=6, W=600, kernel=(2, 2), stride=(2, 2), dtype=torch.float32)
    input = input.cumsum(dim=3) / 20  # smooth enough to tell positions apart
    exact = deform_conv2d(input, offset, weight, *others)
    bias, *others = others
    low = deform_conv2d(input.to(dtype), offset, weight.to(dtype), bias.to(dtype), *others)
    rounded = deform_conv2d(input.to(dtype), offset.to(dtype), weight.to(dtype), bias.to(dtype), *others)
    assert low.dtype == dtype
    scale = exact.abs().max().item()
    assert max_difference(low, exact) / scale < 4 * torch.finfo(dtype).eps
    assert (low.float() - exact).abs().mean() < (rounded.float() - exact).abs().mean()


def test_autocast(backend):
    module = DeformConv2dPack(8, 16, 2, stride=2)
    nn.init.normal_(module.conv_offset.weight, std=0.1)
    x = torch.randn(3, 8, 9, 9)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        offset = module.predict_offset(x.bfloat16())
        low = module(x)
        assert offset.dtype == torch.float32 and low.dtype == torch.bfloat16
    rounded, weight, bias = (tensor.bfloat16().float() for tensor in (x, module.weight, module.bias))
    plain = deform_conv2d(rounded, offset, weight, bias, stride=2).bfloat16()  # float32 of rounded values, rounded at the end
    assert_as_precise(low, plain, exact)
    low.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traced_gather_equals_the_eager_one(dtype):
    """The gather has a form of one operation and a traceable one; both are the same numbers."""
    rows, index = torch.randn(50, 6).to(dtype), torch.randint(0, 50, (30, 4))
    factor = torch.rand(30, 4)
    exact = (rows.double()[index] * factor.double()[..., None]).sum(1)
    compiled = torch.compile(reference._weighted_gather, fullgraph=True, backend="eager")
    tolerance = 1e-5 if dtype == torch.float32 else 2 * max_difference(exact.to(dtype), exact)
    assert max_difference(reference._weighted_gather(rows, index, factor), exact) < tolerance
    assert max_difference(compiled(rows, index, factor), exact) < tolerance


def test_export_and_compile():
    module = DeformConv2dPack(4, 8, 2, stride=2).eval()
    nn.init.normal_(module.conv_offset.weight, std=0.3)
    sizes = {0: Dim("b"), 2: Dim("h", min=4, max=256), 3: Dim("w", min=4, max=256)}
    exported = export(module, (torch.randn(2, 4, 9, 8),), dynamic_shapes=(sizes,)).module()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for shape in ((2, 4, 9, 8), (1, 4, 13, 6), (5, 4, 8, 8)):
        x = torch.randn(shape)
        assert max_difference(exported(x), module(x)) < 1e-5
        assert max_difference(compiled(x), module(x)) < 1e-5


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(input=torch.zeros(4, 6, 5)), r"input must be a 4-D .*\(4, 6, 5\)"),
        (dict(input=torch.zeros(2, 4, 6, 5, dtype=torch.int64)), "input .*int64"),
        (dict(weight=torch.zeros(6, 3, 3, 2)), r"weight \(6, 3, 3, 2\) does not fit input \(2, 4, 6, 5\)"),
        (dict(weight=torch.zeros(6, 4, 3, 2, dtype=torch.float64)), "weight is torch.float64.*torch.float32"),
        (dict(offset=torch.zeros(2, 10, 4, 4)), "offset has 10 channels"),
        (dict(offset=torch.zeros(2, 12, 4, 5)), r"offset .*\(2, 12, 4, 5\), expected \(2, 12, 4, 4\)"),
        (dict(offset=torch.zeros(3, 12, 4, 4)), r"expected \(2, 12, 4, 4\)"),
        (dict(offset=torch.zeros(2, 12, 4, 4, device="meta")), "offset is on meta"),
        (dict(bias=torch.zeros(5)), r"bias .*\(5,\), expected \(6,\)"),
        (dict(mask=torch.zeros(2, 5, 4, 4)), r"mask .*expected \(2, 6, 4, 4\)"),
        (dict(stride=0), r"stride=\(0, 0\)"),
        (dict(dilation=9), "output would be"),
    ],
)
def test_bad_arguments(change, words):
    good = dict(input=torch.zeros(2, 4, 6, 5), offset=torch.zeros(2, 12, 4, 4), weight=torch.zeros(6, 4, 3, 2))
    assert deform_conv2d(**good).shape == (2, 6, 4, 4)
    with pytest.raises(ValueError, match=words):
        deform_conv2d(**{**good, **change})
