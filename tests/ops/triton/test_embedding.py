# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of ``patch_embed``: interpreted, against torch; compiled, within its ceilings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from gpu_helpers import on_gpu
from helpers import assert_as_precise, fill, normal
from litv2.layers import PatchEmbed
from litv2.ops.embedding import reference, triton
from litv2.ops.triton import embedding
from triton_helpers import CAPABILITIES, compile_for

SIZES = [(1, 1), (4, 8), (3, 22), (33, 30), (30, 33), (36, 44)]
LAYERS = [(3, 48, 4), (2, 16, 1), (5, 136, 7), (1, 256, 16)]  # in_chans, dim, patch: several steps of a product, a width of its own


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def exact(x: Tensor, layer: PatchEmbed) -> Tensor:
    return reference.patch_embed(x.double(), copy.deepcopy(layer).double())


def error(ours: Tensor, exact: Tensor) -> Tensor:
    assert ours.shape == exact.shape and ours.is_contiguous()
    return (ours.double() - exact).norm() / exact.norm()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("in_chans, dim, patch", LAYERS)
@pytest.mark.parametrize("H, W", SIZES)
def test_against_torch(H, W, in_chans, dim, patch):
    """Sides that are no multiples of the patch, or smaller than it; channels first and last; a part of a larger image; one for all."""
    layer, x = fill(PatchEmbed(in_chans, dim, patch)), normal(5, 2, in_chans, H, W)
    layer.norm.eps = 0.1
    true, ours = exact(x, layer), triton.patch_embed(x, layer)
    assert error(ours, true) < 1e-5
    if (H, W) == (33, 30):  # how they lie in memory does not depend on their size
        larger = torch.full((2, in_chans, H + 3, W + 5), float("nan"))
        larger[:, :, 1 : H + 1, 2 : W + 2] = x
        last = layer.to(memory_format=torch.channels_last)
        assert torch.equal(triton.patch_embed(x.contiguous(memory_format=torch.channels_last), last), ours)
        assert torch.equal(triton.patch_embed(larger[:, :, 1 : H + 1, 2 : W + 2], last), ours)
        assert torch.equal(triton.patch_embed(x[:1].expand(2, -1, -1, -1), last), ours[:1].expand(2, -1, -1, -1))
    low = layer.bfloat16()
    true, plain, ours = exact(x.bfloat16(), low), reference.patch_embed(x.bfloat16(), low), triton.patch_embed(x.bfloat16(), low)
    assert ours.dtype == torch.bfloat16
    assert_as_precise(ours, plain, true, factor=4)  # the interpreter truncates


@pytest.mark.usefixtures("interpreter")
def test_autocast():
    """The product in bfloat16, the norm and what it returns in float32, as CUDA's autocast has it."""
    layer, x = fill(PatchEmbed(3, 48, 4)), normal(5, 2, 3, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        ours = triton.patch_embed(x, layer)
    layer.proj.weight.copy_(layer.proj.weight.bfloat16())
    assert ours.dtype == torch.float32 and 1e-5 < error(ours, exact(x.bfloat16(), layer)) < 5e-3  # x is truncated by the interpreter


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_token_nan(value):
    layer, x = fill(PatchEmbed(3, 48, 4)), normal(5, 2, 3, 9, 10)
    x[0, 1, 5, 2] = x[1, 2, 8, 9] = value  # the second in a patch that is padded both ways
    ours = triton.patch_embed(x, layer)
    assert torch.allclose(ours, reference.patch_embed(x, layer), atol=1e-5, equal_nan=True)
    assert ours.isnan().all(-1).nonzero().tolist() == [[0, 1, 0], [1, 2, 2]] and ours.isnan().any(-1).sum() == 2


@pytest.mark.usefixtures("interpreter")
def test_opcheck():
    """Shapes, strides and dtypes of fake tensors; also of an empty batch, and of another dtype."""
    for batch, dtype in ((2, torch.float32), (0, torch.float32), (1, torch.bfloat16)):
        tensors = normal(0, batch, 3, 5, 9), normal(1, 24, 48), normal(2, 24), normal(3, 24), normal(4, 24)
        torch.library.opcheck(torch.ops.litv2.triton_patch_embed, (*tensors, 4, 1e-5, dtype))


def test_reasons(monkeypatch):
    monkeypatch.setattr(triton.triton, "why_not", lambda x: None)  # as on a GPU
    layer, x = PatchEmbed(3, 48, 4), normal(0, 2, 3, 9, 10)
    assert triton.why_not(x, layer) is None and "in float32" in triton.why_rather_not(x, layer)
    assert triton.why_rather_not(x.half(), layer) is None
    assert triton.why_not(x.half(), layer) == "x is torch.float16, but the weights are torch.float32 and torch.float32"
    assert triton.why_not(x[:, :2], layer) == "x must be images (B, 3, H, W), got (2, 2, 9, 10)"
    assert triton.why_not(x[0], layer) == "x must be images (B, 3, H, W), got (3, 9, 10)"
    assert triton.why_not(x[..., :0], layer) == "x must be images (B, 3, H, W), got (2, 3, 9, 0)"
    assert triton.why_not(x[:1, :, :1, :1].expand(2**13, 3, 2**9, 2**9), layer).startswith("it supports up to 2147483647 pixels")
    with torch.autocast("cpu", torch.bfloat16):
        assert triton.why_not(x.half(), layer) is None
        assert triton.why_not(x.byte(), layer) == "it has no kernel for torch.uint8"
    limits = "it supports up to 256 channels, of up to 256 values of a patch, got"
    assert triton.why_not(x, PatchEmbed(3, 272, 4)) == f"{limits} 272, of 48"
    assert triton.why_not(x, PatchEmbed(3, 48, 16)) == f"{limits} 48, of 768"
    with torch.enable_grad():
        assert triton.why_not(x, layer).startswith("gradients are enabled")
    handle = layer.proj.register_forward_hook(lambda *_: None)
    assert triton.why_not(x, layer) == "a part of the layer has hooks"
    handle.remove()
    layer.norm = nn.LayerNorm(48, elementwise_affine=False)
    assert triton.why_not(x, layer) == "the norm must be one of all channels, with scale and shift"
    layer.norm = nn.Identity()
    assert triton.why_not(x, layer) == "it knows nn.Conv2d and nn.LayerNorm alone, got Conv2d and Identity"
    layer = PatchEmbed(3, 48, 4)
    layer.proj = nn.Conv2d(3, 48, 4, stride=2)
    assert triton.why_not(x, layer) == "the convolution must be one of whole patches, with a bias"


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype):
    """Images of whole patches and others, in both formats; under autocast and in generated code; values further apart than 2**31."""

    def assert_precise(ours: Tensor, plain: Tensor, true: Tensor) -> None:
        assert ours.dtype == plain.dtype and error(ours, true) <= max(2 * error(plain.contiguous(), true), 1e-6)

    layer = fill(PatchEmbed(3, 96, 4)).to("cuda")
    low = copy.deepcopy(layer).to(dtype)
    for H, W in ((224, 224), (33, 30), (30, 33)):
        x = normal(5, 3, 3, H, W).to("cuda", dtype)
        for images in (x, x.contiguous(memory_format=torch.channels_last)):
            ours = triton.patch_embed(images, low)
            assert_precise(ours, reference.patch_embed(images, low), exact(images, low))
            assert torch.equal(torch.compile(triton.patch_embed)(images, low), ours)
        if dtype != torch.float32:
            with torch.autocast("cuda", dtype):
                ours, plain = triton.patch_embed(x.float(), layer), reference.patch_embed(x.float(), layer)
            assert ours.dtype == torch.float32
            assert_precise(ours, plain, exact(x, layer))
    if dtype == torch.float16:
        x = torch.empty(2**31 + 40 * 40, device="cuda", dtype=dtype).as_strided((1, 3, 40, 40), (0, 2**30, 40, 1))
        x.copy_(normal(6, *x.shape))
        assert torch.equal(triton.patch_embed(x, low), triton.patch_embed(x.contiguous(), low))


@pytest.mark.extra
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code(capability, padded):
    """Of LITv2-S in float16: the product by the tensor cores, tokens written 128 bits at once, nothing spilled."""
    types = dict.fromkeys(("x", "weight", "bias", "scale", "shift", "y"), "float16") | dict(eps="fp32")
    types |= dict.fromkeys(("tokens", "H", "W", "rows", "columns", "of_image", "of_channel", "of_row", "of_column"), "i32")
    sizes = dict(embedding.tile(48, 96), PADDED=padded, P=4, C=3)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    found = compile_for(embedding.forward_kernel, types, sizes, capability, **options)
    assert found.stack == 0 and found.registers <= (232 if padded else 168) and found.count(r"(H|HG|UTCH)MMA[.\w]*")
    assert found.count("STG.E.128") == 8 and found.count("LDG.E.U16") <= 32 + 3


@pytest.mark.extra
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_largest_that_it_takes(capability):
    """256 channels of 192 values of a patch, in four steps: nothing spilled."""
    types = dict.fromkeys(("x", "weight", "bias", "scale", "shift", "y"), "float16") | dict(eps="fp32")
    types |= dict.fromkeys(("tokens", "H", "W", "rows", "columns", "of_image", "of_channel", "of_row", "of_column"), "i32")
    sizes = dict(embedding.tile(192, 256), PADDED=True, P=8, C=3)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    assert compile_for(embedding.forward_kernel, types, sizes, capability, **options).stack == 0
