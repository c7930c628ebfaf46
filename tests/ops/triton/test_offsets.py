# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of token merging's offsets: interpreted, against torch; compiled, within its ceilings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_helpers import on_gpu
from helpers import fill, normal
from litv2.layers import DeformableTokenMerging
from litv2.ops.merging.triton import predict_offset
from litv2.ops.triton import offsets
from mm_modules.DCN import DeformConv2dPackMore
from triton_helpers import CAPABILITIES, compile_for

SIZES = [(2, 2), (2, 6), (5, 7), (7, 5), (14, 32)]  # the last has more pixels than a program takes
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def exact(x: Tensor, conv: nn.Conv2d) -> Tensor:
    weight, bias = conv.weight.double(), conv.bias.double()
    return F.conv2d(x.double().permute(0, 3, 1, 2), weight, bias, stride=2).permute(0, 2, 3, 1)


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    return (ours.double() - exact).norm() / exact.norm()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("of_weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, of_x, of_weights):
    """In float32 whatever x and the weights have: as they are under autocast, and where the weights are channels-last."""
    conv = fill(DeformableTokenMerging(96, 48)).dconv.to(of_weights)
    x = normal(5, 2, H, W, 96).to(of_x)
    assert error(predict_offset(x, conv), exact(x, conv.conv_offset)) < 1e-6
    channels_first = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(predict_offset(channels_first, conv.to(memory_format=torch.channels_last)), predict_offset(x, conv))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_wild_values_reach_what_they_do_in_torch(value):
    """A pixel's own offsets, and none from the last column, which no patch has."""
    conv, x = fill(DeformableTokenMerging(32, 48)).dconv, normal(5, 2, 4, 7, 32)
    conv.conv_offset.weight[3] = 0
    x[0, 2, 3, 5] = x[1, 1, 6, 0] = value
    ours, theirs = predict_offset(x, conv), conv.predict_offset(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert ours.isfinite().all(-1).logical_not().sum() == (0 if value == 1e30 else 1)


@pytest.mark.usefixtures("interpreter")
def test_other_layers_predict_their_own(monkeypatch):
    """A network instead of a convolution, another convolution, and precision that the kernel lacks."""
    monkeypatch.setattr(offsets, "predict_offset", None)  # not called
    x = normal(5, 2, 5, 7, 32)
    more = fill(DeformConv2dPackMore(32, 48, 2, stride=2)).eval()
    other = fill(DeformableTokenMerging(32, 48)).dconv
    other.conv_offset = fill(nn.Conv2d(32, 8, 2, stride=2, padding=1))
    double = fill(DeformableTokenMerging(32, 48)).dconv.double()
    for conv, input in ((more, x), (other, x), (double, x.double())):
        assert torch.equal(predict_offset(input, conv), conv.predict_offset(input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors; also of an empty batch."""
    for batch in (1, 0):
        tensors = normal(0, batch, 5, 4, 32).half(), normal(2, 8, 128), normal(3, 8)
        torch.library.opcheck(torch.ops.litv2.triton_predict_offset, tensors)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype):
    """As precise as float32 without TF32, at the sizes of LITv2-S and odd ones; infinite values, too."""
    for H, W, C in ((56, 56, 96), (15, 28, 192), (13, 14, 384)):
        conv = fill(DeformableTokenMerging(C, 48)).dconv.to("cuda")
        x = normal(5, 3, H, W, C).to("cuda", dtype)
        assert error(predict_offset(x, conv), exact(x, conv.conv_offset)) < 1e-6
        x[1, 4, 3, 5], x[0, 2, 2, 1], x[2, 7, 7, 7] = float("inf"), float("nan"), -float("inf")
        ours, true = predict_offset(x, conv), exact(x, conv.conv_offset).float()
        assert torch.allclose(ours, true, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.extra
@pytest.mark.parametrize("of_x, of_weights", [("float16", "float16"), ("float32", "float32")])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability, of_x, of_weights):
    """Three products by the tensor cores, x copied 128 bits at once, nothing spilled."""
    types = dict(x=of_x, weight=of_weights, bias=of_weights, y="float32")
    types |= dict.fromkeys(("pixels", "H", "W", "rows", "columns"), "i32")
    sizes = dict(offsets.TILE, N=8)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    found = compile_for(offsets.forward_kernel, types, sizes, capability, **options)
    assert found.stack == 0 and found.registers <= (184 if of_x == "float32" else 168)
    assert found.count(r"HMMA[.\w]*TF32[.\w]*") == 3 * 16  # of a warp: 2 x 2 tiles of the result, 4 steps of 8 inputs
    assert found.count(r"LDGSTS[.\w]*128[.\w]*") and not found.count("LDG.E.U16")
