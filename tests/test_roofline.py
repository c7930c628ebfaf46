# SPDX-License-Identifier: Apache-2.0
"""The bounds of roofline.py: bytes and operations by hand, for what a model is made of, and of whole models."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from command_helpers import run
from document_helpers import documented, table
from helpers import ROOT
from litv2 import LITv2, litv2_small
from mm_modules.DCN import DeformConv2d

sys.path.append(str(ROOT / "benchmarks"))
from models import CANDIDATES  # noqa: E402
from roofline import GPUS, Ceilings, Kernel, on_fake_gpu, trace, trace_module  # noqa: E402


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def traced(module: nn.Module, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> dict[str, tuple[int, int]]:
    """Bytes and operations by operator."""
    module = module.to(dtype)
    with FakeTensorMode(), torch.no_grad():
        inputs = [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]
        kernels = trace_module(on_fake_gpu(module), *inputs)
    assert len({kernel.operator for kernel in kernels}) == len(kernels)
    return {kernel.operator: (kernel.bytes, kernel.operations) for kernel in kernels}


@pytest.mark.parametrize("dtype, size", [(torch.float16, 2), (torch.float32, 4)])
def test_linear(dtype, size):
    expected = {"addmm": (size * (7 * 3 + 3 * 5 + 5 + 7 * 5), 2 * 7 * 3 * 5)}
    assert traced(nn.Linear(3, 5), (7, 3), dtype=dtype) == expected


@pytest.mark.parametrize("bias", [False, True])
def test_convolution(bias):
    """Depthwise, 3 x 3, stride 2; a bias is a second pass over the output."""
    read, out = 2 * 6 * 9 * 7, 2 * 6 * 5 * 4
    expected = {"convolution": (2 * (read + 6 * 9 + 6 * bias + out), 2 * out * 9)}
    expected |= {"convolution bias": (2 * 2 * out, 0)} if bias else {}
    assert traced(nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6, bias=bias), (2, 6, 9, 7)) == expected


def test_attention():
    """One kernel, which writes no scores: 5 queries and 7 keys in 2 x 3 heads of 4 channels."""
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 4)]
    assert traced(Call(F.scaled_dot_product_attention), *shapes) == {"attention": (2 * 6 * 4 * (5 + 7 + 7 + 5), 2 * 6 * 5 * 7 * (4 + 4))}


def test_deformable_convolution():
    """Offsets are float32 and so are the gathered positions; the columns are written and read."""
    layer = DeformConv2d(8, 6, kernel_size=2, stride=2)
    found = traced(layer, (3, 8, 4, 10), (3, 8, 2, 5))
    input, offset, columns, weight, out = 3 * 8 * 40, 3 * 8 * 10, 3 * 10 * 8 * 4, 6 * 8 * 4, 3 * 6 * 10
    assert found["_to_copy"] == ((2 + 4) * offset, 0)
    assert found["deform_conv2d, gather"] == (2 * input + 4 * offset + 2 * columns, 0)
    assert found["deform_conv2d, product"] == (2 * (columns + weight + out), 2 * columns * 6)


def test_views_and_expanded_tensors_are_free():
    def function(x):
        return x.view(4, 3).t()[1:].unsqueeze(0) + x[:1].expand(2, 4)

    assert traced(Call(function), (12,)) == {"add": (2 * (8 + 1 + 8), 0)}


def test_the_longer_of_both():
    kernels = [Kernel("copy", 8, 0, "int64"), Kernel("mm", 2, 30, "float16"), Kernel("mm", 20, 30, "float32")]
    assert Ceilings(4.0, dict(float16=10.0, float32=5.0)).seconds(kernels) == 2 + 3 + 6
    with pytest.raises(KeyError, match="float32"):
        Ceilings(4.0, dict(float16=10.0)).seconds(kernels)


def test_litv2():
    """Multiply-adds as the model counts them, but for what is sampled; the same kernels for every batch."""
    kernels = trace("litv2_small", 2, 64)
    products = sum(kernel.operations for kernel in kernels) / 2 / 2
    assert products == pytest.approx(litv2_small().flops(64, 64), rel=0.01)
    assert [kernel.operator for kernel in kernels] == [kernel.operator for kernel in trace("litv2_small", 3, 64)]
    assert sum(kernel.operator == "attention" for kernel in kernels) >= 6 + 2  # Lo-Fi of stage 3, all of stage 4
    assert sum(kernel.operator.startswith("deform_conv2d") for kernel in kernels) == 3 * 2


def test_nothing_remains_of_a_trace():
    """The operators that it takes the place of compute again."""
    trace("litv2_small", 1, 32)
    model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.extra
def test_documented_bounds():
    """Within 5 %, so that small changes of a model need no new table; and the share of the measured time."""
    names = {candidate.name: candidate.timm for candidate in CANDIDATES}
    for row in table("docs/gpu.md", "model", "bound, ms", "share"):
        bound = 1e3 * GPUS["H200"].seconds(trace(names[row["model"]], 64))
        assert float(row["bound, ms"]) == pytest.approx(bound, rel=0.05)
        assert float(row["share"]) == pytest.approx(float(row["bound, ms"]) / float(row["ms"]), abs=0.006)
        assert float(row["images/s"]) == pytest.approx(64e3 / float(row["ms"]), rel=0.01)


@pytest.mark.extra
@pytest.mark.parametrize("command", documented("benchmarks/README.md", r"python benchmarks/roofline\.py"), ids=str)
def test_command(command, tmp_path):
    done = run(command, "--models", "litv2_small", "--by-operator", "--batch-size", 2, "--img-size", 64, "--out", tmp_path / "bounds")
    rows = json.loads((tmp_path / "bounds.json").read_text())["rows"]
    assert {"addmm", "gelu", "convolution bias"} < {row["operator"] for row in rows} and "| litv2_small | addmm |" in done.stdout
    assert sum(row["RTX3090_ms"] for row in rows) == pytest.approx(1e3 * GPUS["RTX3090"].seconds(trace("litv2_small", 2, 64)), abs=0.02)
