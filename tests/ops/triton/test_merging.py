# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``token_merging``: interpreted, against torch; compiled, within its ceilings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import fill, normal
from litv2.layers import DeformableTokenMerging
from litv2.ops import use
from litv2.ops.merging import compiled, reference, triton
from litv2.ops.triton import merging
from mm_modules.DCN import deform_conv2d
from triton_helpers import CAPABILITIES, Called, compile_for

SIZES = [(2, 2), (2, 6), (5, 7), (7, 5), (14, 14)]  # smaller maps have no patch


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def case(H: int, W: int, reach: float = 2.0) -> tuple[Tensor, DeformableTokenMerging]:
    """More channels than a tile has, offsets of a few pixels, and statistics other than those of a new batch norm."""
    layer = fill(DeformableTokenMerging(32, 272)).eval()
    conv = layer.dconv.conv_offset
    conv.weight.copy_(normal(1, *conv.weight.shape) * reach / 12)
    conv.bias.copy_(normal(2, 8) * reach)
    layer.norm_layer.running_mean.copy_(normal(3, 272) / 4)
    layer.norm_layer.running_var.copy_(normal(4, 272).exp())
    return normal(5, 2, H, W, 32), layer


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape
    return (ours.double() - exact).norm() / exact.norm()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W):
    """Samples inside, between and outside of the map; in bfloat16 as precise as torch with the same offsets."""
    x, layer = case(H, W)
    exact = reference.token_merging(x.double(), copy.deepcopy(layer).double())
    assert error(triton.token_merging(x, layer), exact) < 1e-6
    x, layer = x.bfloat16(), layer.bfloat16()
    exact = reference.token_merging(x.double(), copy.deepcopy(layer).double())
    with use(deform_conv2d="torch"):
        plain = reference.token_merging(x, layer)
    ours = triton.token_merging(x, layer)
    assert ours.dtype == torch.bfloat16 and error(ours, exact) <= 4 * error(plain, exact)  # the interpreter truncates


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("H, W", SIZES)
def test_by_the_compiled_convolution(H, W):
    """With offsets from the kernel; the backend is another one's for the rest."""
    x, layer = case(H, W)
    if reason := compiled.why_not(x, layer):
        pytest.skip(reason)
    exact = reference.token_merging(x.double(), copy.deepcopy(layer).double())
    with Called() as called:
        assert error(compiled.token_merging(x, layer), exact) < 1e-6
    assert called.names == ["predict_offset"]
    x, layer = x.bfloat16(), layer.bfloat16()
    exact = reference.token_merging(x.double(), copy.deepcopy(layer).double())
    ours, plain = compiled.token_merging(x, layer), reference.token_merging(x, layer)
    assert ours.dtype == torch.bfloat16 and error(ours, exact) <= 2 * error(plain, exact)


@pytest.mark.usefixtures("interpreter")
def test_folded():
    """As fuse() leaves the layer: the norm in the weights, which need no copy where they are channels-last."""
    x, layer = case(5, 7)
    exact = reference.token_merging(x.double(), copy.deepcopy(layer).double())
    layer.dconv.weight, layer.dconv.bias = map(nn.Parameter, triton.merging_weights(layer))
    layer.norm_layer = nn.Identity()
    assert error(triton.token_merging(x, layer.to(memory_format=torch.channels_last)), exact) < 1e-6


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, -1.0, 0.5])
def test_wild_offsets(offset):
    """NaN reaches the outputs that use it, what lies outside is 0, and nothing else is read: all as the operator has it."""
    layer = case(5, 7)[1]
    x, offsets = normal(5, 2, 5, 7, 32), normal(6, 2, 2, 3, 8)
    offsets[0, 1, 2, 3] = offsets[1, 0, 0, 4] = offset
    weight, bias = triton.merging_weights(layer)
    with use(deform_conv2d="torch"):
        convolved = deform_conv2d(x.permute(0, 3, 1, 2), offsets.permute(0, 3, 1, 2), weight, bias, stride=2)
        exact = nn.functional.gelu(convolved.permute(0, 2, 3, 1))
    ours = torch.ops.litv2.triton_token_merging(x, offsets, weight.permute(0, 2, 3, 1).flatten(1), bias)
    assert torch.allclose(ours, exact, atol=1e-5, equal_nan=True) and ours.isnan().any() == (offset != offset)


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors."""
    tensors = normal(0, 1, 2, 3, 32), normal(1, 1, 1, 1, 8), normal(2, 24, 128), normal(3, 24)
    torch.library.opcheck(torch.ops.litv2.triton_token_merging, tensors)


def test_reasons(monkeypatch):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    x, layer = case(5, 7)
    assert triton.why_not(x, layer) is None and "in float32" in triton.why_rather_not(x, layer)
    assert triton.why_rather_not(x.half(), layer) is None
    assert triton.why_not(x[:, :1], layer) == "the map must have at least 2 x 2 cells, got 1 x 7"
    assert triton.why_not(x[..., :24], layer) == "the number of channels must be a multiple of 32, got 24"
    assert triton.why_not(x, layer.train()) == "the layer is in training mode"
    handle = layer.eval().dconv.register_forward_hook(lambda *_: None)
    assert triton.why_not(x, layer) == "the layer or a part of it has hooks"
    handle.remove()
    layer.act = nn.ReLU()
    assert triton.why_not(x, layer) == "it knows a batch norm, or none, and GELU alone"
    with torch.enable_grad():
        assert triton.why_not(x, layer).startswith("gradients are enabled")


@pytest.mark.extra
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability):
    """Of the second merging of LITv2-S: 8 values at once to and from memory, products by the tensor cores, nothing spilled."""
    types = dict.fromkeys(("x", "weight", "bias", "y"), "float16") | dict(offset="float32")
    types |= dict.fromkeys(("pixels", "H", "W", "rows", "columns"), "i32")
    sizes = merging.tile(384)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    found = compile_for(merging.forward_kernel, types, sizes, capability, **options)
    assert found.stack == 0 and found.registers <= 184 and found.count(r"(H|HG|UTCH)MMA[.\w]*")
    assert found.count("LDG.E.128") == 32 and found.count("STG.E.128") == 8 and found.count("LDG.E.U16") == 1  # the bias
