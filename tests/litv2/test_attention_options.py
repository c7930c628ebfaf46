# SPDX-License-Identifier: Apache-2.0
"""A LITv2 whose attention is not the paper's HiLo gives its own numbers in every form: the fast paths step aside."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import fill, max_difference, normal, timm_model, tiny_model
from hilo import HiLo, HiLo2d
from litv2 import LITv2, fuse, optimize
from litv2.inference import fastest
from litv2.inference.packed import packed_model
from litv2.layers import Block
from litv2.ops import OPERATORS, native
from litv2.ops.folding import is_plain

needs_native = pytest.mark.skipif(native.problem is not None, reason=f"the native operators: {native.problem}")


class Doubled(HiLo):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Mean(nn.Module):
    """An attention of somebody else's."""

    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        return x.mean(dim=1, keepdim=True).expand_as(x)


CHANGES = {
    "rectangular windows": lambda dim, heads: HiLo(dim, heads, qkv_bias=True, window_size=(2, 3)),
    "another pool size": lambda dim, heads: HiLo(dim, heads, qkv_bias=True, window_size=2, pool_size=3),
    "pooling without windows": lambda dim, heads: HiLo(dim, heads, qkv_bias=True, window_size=1, pool_size=2),
    "masked padding": lambda dim, heads: HiLo(dim, heads, qkv_bias=True, window_size=4, mask_padding=True),
    "a subclass": lambda dim, heads: Doubled(dim, heads, window_size=2),
    "no HiLo": lambda dim, heads: Mean(),
}
IMAGES = (2, 3, 72, 200)  # maps of 5 x 13 and 3 x 7 tokens, roughly: neither windows nor pooled cells are whole


def changed(model: LITv2, change: str) -> LITv2:
    """The model with every HiLo replaced, in evaluation mode."""
    for block in model.modules():
        if isinstance(block, Block) and block.attn is not None:
            block.attn = fill(CHANGES[change](block.attn.dim, block.attn.num_heads))
    return model.eval()


@torch.no_grad()
def exact(model: LITv2, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(x.double())


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return max_difference(ours, expected) / expected.abs().max().item()


@pytest.mark.parametrize("change", CHANGES)
def test_the_change_matters(change):
    """Else the other tests would prove nothing."""
    x = normal(0, *IMAGES)
    assert relative_error(exact(changed(tiny_model(alpha=0.5), change), x), exact(tiny_model(alpha=0.5).eval(), x)) > 1e-3


@pytest.mark.parametrize("window", [1, 2, (4, 4)])
def test_plain(window):
    assert is_plain(HiLo(16, 2, window_size=window, pool_size=window, alpha=0.2))


@pytest.mark.parametrize("change", CHANGES)
def test_not_plain(change):
    assert not is_plain(CHANGES[change](16, 2))


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_fused(change):
    model, x = changed(tiny_model(alpha=0.5), change), normal(0, *IMAGES)
    fused = fuse(model)
    assert relative_error(fused(x), exact(model, x)) < 1e-5
    kept = {name for name, module in fused.named_modules() if isinstance(module, nn.LayerNorm) and module.elementwise_affine}
    assert {"layers.2.blocks.0.0.norm1", "layers.3.blocks.0.0.norm1"} <= kept and "layers.2.blocks.0.0.norm2" not in kept
    with pytest.raises(ValueError, match="already fused"):
        fuse(fused)


@needs_native
@pytest.mark.parametrize("products, allowed", [(torch.float32, 2e-5), (torch.bfloat16, 0.03), (torch.int8, 0.1)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_packed(change, products, allowed):
    model, x = changed(tiny_model(alpha=0.5), change), normal(0, *IMAGES)
    assert relative_error(packed_model(model, products)(x), exact(model, x)) < allowed


@needs_native
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_native_block(change):
    """The plain model takes the native operators for whole blocks, but not for these."""
    block = fill(Block(16, 2, 2, 0.5)).eval()
    x = normal(0, 2, 15, 25, 16)
    assert OPERATORS["block"].explain(block, x)["native"] is None
    block.attn = fill(CHANGES[change](16, 2)).eval()
    reason = OPERATORS["block"].explain(block, x)["native"]
    assert reason == f"a {type(block.attn).__name__} is not a module that it supports" or "HiLo has options beyond the paper's" in reason
    assert relative_error(block(x), copy.deepcopy(block).double()(x.double())) < 1e-5


@needs_native
@pytest.mark.parametrize("change", ["rectangular windows", "masked padding"])
def test_optimize(change, monkeypatch):
    monkeypatch.setattr(fastest, "ROUNDS", 1)
    model, x = changed(tiny_model(alpha=0.5), change), normal(0, *IMAGES)
    fast = optimize(model, x, forms=["native", "fused"], report=None)
    assert fast.errors.keys() == {"plain", "native", "fused"} == fast.seconds.keys() and max(fast.errors.values()) < 1e-5


@pytest.mark.extra
def test_compiled(monkeypatch):
    monkeypatch.setattr(fastest, "ROUNDS", 1)
    model = LITv2(num_classes=0, embed_dim=16, depths=(1,), num_heads=(2,), local_ws=(2,), alpha=0.5)
    model, x = changed(fill(model), "rectangular windows"), normal(0, 1, 3, 36, 44)
    assert optimize(model, x, forms=["compiled"], report=None).errors["compiled"] < 1e-5


@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
@torch.no_grad()
def test_timm(feature_cls):
    model = timm_model(features_only=True, alpha=0.5, feature_cls=feature_cls).eval()
    inner = model.model if feature_cls == "getter" else model.body
    changed(fill(inner), "rectangular windows")
    x = normal(0, *IMAGES)
    levels = [level.permute(0, 3, 1, 2) if feature_cls == "hook" else level for level in model(x)]
    expected = changed(tiny_model(alpha=0.5), "rectangular windows").double().forward_pyramid(x.double())
    assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in zip(levels, expected, strict=True))


class Maps(nn.Module):
    """What ``count_flops`` counts: a network with ``_forward``, here an attention alone on a map of 12 x 24 cells."""

    def __init__(self, attn: nn.Module, form: str):
        super().__init__()
        self.attn, self.form = attn, form

    def _forward(self, image: Tensor) -> None:
        B, _, H, W = image.shape
        dim = self.attn.dim
        match self.form:
            case "tokens":
                self.attn(image.new_empty(B, H * W, dim), H, W)
            case "tokens by name":
                self.attn(x=image.new_empty(B, H * W, dim), H=H, W=W)
            case "map":
                self.attn(image.new_empty(B, H, W, dim))
            case "HiLo2d":
                self.attn(image.new_empty(B, dim, H, W))
            case "context":
                self.attn(image.new_empty(B, H, W, dim), context=image.new_empty(B, H, W, dim))
            case "smaller context":
                self.attn(image.new_empty(B, H, W, dim), context=image.new_empty(B, 3, 5, dim))
            case "extra tokens":
                self.attn(image.new_empty(B, 2 + H * W, dim), H, W, extra_tokens=2)


OPTIONS = [dict(), dict(window_size=1), dict(window_size=(2, 3)), dict(window_size=1, pool_size=2), dict(window_size=3, pool_size=(2, 4))]


@pytest.mark.extra
@pytest.mark.parametrize("form", ["tokens", "tokens by name", "map", "HiLo2d", "context"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flops(options, form):
    """Those of torch's counter on the plain products, and of pooling, which is one for each of its inputs."""
    count_flops = pytest.importorskip("litv2.openmmlab.flops", exc_type=ImportError).count_flops
    network = Maps((HiLo2d if form == "HiLo2d" else HiLo)(32, 4, alpha=0.5, **options), form)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network._forward(torch.empty(1, 3, 12, 24))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm] // 2
    pooling = 12 * 24 * 32 if network.attn.pool != (1, 1) else 0
    expected = counter.get_total_flops() // 2 + pooling
    assert count_flops(network, 12, 24) == dict(published=expected, full=expected, products=products)


@pytest.mark.extra
@pytest.mark.parametrize("options", [dict(window_size=4), dict(window_size=(4, 3), pool_size=2)], ids=str)
def test_flops_of_padded_maps(options):
    """Padding is part of the release's count, whether it is computed or not."""
    count_flops = pytest.importorskip("litv2.openmmlab.flops", exc_type=ImportError).count_flops
    attn = HiLo(32, 4, alpha=0.5, **options)
    (ph, pw), (H, W) = attn.pool, (11, 23)
    pooling = -(-H // ph) * ph * -(-W // pw) * pw * 32
    assert count_flops(Maps(attn, "tokens"), H, W)["published"] == attn.flops(H, W) + pooling


@pytest.mark.extra
@pytest.mark.parametrize("form, size, E", [("smaller context", (3, 5), 0), ("extra tokens", (12, 24), 2)])
def test_flops_of_what_else_is_attended_to(form, size, E):
    """As HiLo counts it, and its pooling; the products are those of 12 x 24 cells with the pooled ones, extra tokens among both."""
    count_flops = pytest.importorskip("litv2.openmmlab.flops", exc_type=ImportError).count_flops
    attn, pooled = HiLo(32, 4, alpha=1), math.prod((side + 1) // 2 for side in size)
    total, products = attn.flops(12, 24, size, E) + 4 * pooled * 32, 2 * (12 * 24 + E) * (pooled + E) * 32
    assert count_flops(Maps(attn, form), 12, 24) == dict(published=total, full=total, products=products)
