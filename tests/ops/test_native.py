# SPDX-License-Identifier: Apache-2.0
"""The native CPU operators: torch's numbers whatever the shape, and clear errors for what they do not take."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import TINY, fill, golden, golden_arrays, max_difference, normal, tiny_model
from litv2 import litv2_small
from litv2.inference.packed import (
    PackedBlocks,
    PackedClassifier,
    PackedOperator,
    PackedPatchEmbed,
    in_one_call,
    packed_blocks,
    packed_model,
)
from litv2.layers import Block, DeformableTokenMerging, PatchEmbed
from litv2.ops.block_forward.native import infer_block
from litv2.ops.packing import feed_forward_arguments, hilo_arguments, patch_embed_arguments, token_merging_arguments
from native_helpers import close, in_float64

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


@torch.no_grad()
def check(module: nn.Module, forms: list, x: Tensor, tolerance: float = 3e-6, threads: tuple[int, ...] = (1,)) -> None:
    """All forms give the same bits on one thread, and on all numbers of threads they are close to the plain module's numbers."""
    expected = in_float64(module, x)
    for count in threads:
        torch.set_num_threads(count)
        results = []
        for form in forms if count == 1 else forms[-1:]:
            form(torch.full_like(x, NAN))  # whatever then reads scratch memory that it has not written finds a NaN there
            results.append(form(x))
        assert all(torch.equal(results[0], result) for result in results[1:])
        assert close(results[0], expected, tolerance)
    torch.set_num_threads(1)


# Blocks


def make_block(*args, **kwargs) -> Block:
    return fill(Block(*args, **kwargs)).eval().requires_grad_(False)


def forms_of(block: Block) -> list:
    return [lambda x: infer_block(block, x), packed_blocks([block])]


@pytest.mark.parametrize("window, alpha", [(0, 0.5), (1, 0.5), *product((2, 3, 4, 7), (0, 0.3, 0.5, 0.9, 1))])
def test_block(window, alpha):
    block = make_block(32, 4, window, alpha)
    forms = forms_of(block)
    for B, H, W in ((1, 1, 1), (2, 1, 7), (1, 8, 1), (5, 3, 2), (2, 13, 10), (3, 14, 14), (1, 17, 29)):
        check(block, forms, 2 * normal(H, B, H, W, 32), threads=(1, 2, 3))


@pytest.mark.parametrize(
    "dim, heads, window, alpha, mlp_ratio",
    [
        (24, 2, 2, 0.5, 4),  # heads of 12 channels: not a multiple of 8
        (20, 2, 3, 0.5, 4),  # 10; dim and hidden channels not whole panels
        (20, 4, 2, 0.3, 3),
        (12, 4, 1, 0.5, 1),  # 3 channels; few hidden channels
        (8, 8, 2, 0.9, 4),  # 1
        (70, 7, 4, 0.5, 3),
        (48, 1, 2, 0, 2),
        (48, 1, 2, 1, 2),
        (36, 2, 0, 0.5, 4),
        (68, 2, 1, 0.5, 6.5),
        (530, 5, 2, 0.5, 1),  # more inputs than a product takes at once
    ],
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_block_of_any_width(dim, heads, window, alpha, mlp_ratio, qkv_bias):
    block = make_block(dim, heads, window, alpha, mlp_ratio, qkv_bias)
    for B, H, W in ((1, 1, 1), (2, 5, 6), (3, 7, 3)):
        check(block, forms_of(block), normal(dim, B, H, W, dim), threads=(1, 4))


@pytest.mark.parametrize(
    "window, alpha, B, H, W",
    [
        (0, 0, 1, 61, 67),
        (1, 1, 2, 27, 29),  # more keys than a product takes at once
        (2, 0.5, 1, 61, 67),
        (3, 0.5, 3, 40, 41),
        (7, 0.5, 1, 50, 230),  # rows longer than a band
        (4, 0, 1, 3, 300),
        (2, 0.5, 1, 300, 3),
        (0, 0, 5, 99, 3),
    ],
)
def test_block_over_many_bands(window, alpha, B, H, W):
    block = make_block(16, 2, window, alpha)
    check(block, forms_of(block), normal(W, B, H, W, 16), threads=(1, 2))


@pytest.mark.parametrize(
    "dim, heads, window, alpha, mlp_ratio, B, H, W",
    [
        (64, 2, 0, 0.5, 4, 1, 13, 15),  # an odd number of tokens
        (96, 3, 2, 0.9, 4, 2, 14, 14),  # not whole pairs of panels; images that share a band
        (192, 6, 2, 0.5, 4, 1, 20, 18),  # more hidden channels than a product takes at once, in whole parts
        (448, 14, 1, 0.9, 2, 2, 9, 9),  # and not: 448, 896
    ],
)
@torch.no_grad()
def test_block_with_products_by_strassen(dim, heads, window, alpha, mlp_ratio, B, H, W):
    """Tokens and channels enough for it. A token that is not finite does not reach the other images there either."""
    block = make_block(dim, heads, window, alpha, mlp_ratio)
    x = normal(dim, B, H, W, dim)
    check(block, forms_of(block), x, threads=(1, 2, 3))
    x[0, 3, 4, 5] = NAN
    form = packed_blocks([block])
    lost = form(x).isnan()
    assert lost[0].any() and not lost[1:].any()


@pytest.mark.parametrize("window, number", [(2, 3), (0, 2)])
@torch.no_grad()
def test_blocks_in_one_call(window, number):
    blocks = [make_block(32, 4, window, 0.5) for _ in range(number)]
    together, x = packed_blocks(blocks), normal(0, 2, 6, 5, 32)
    assert [type(part) for part in together] == [PackedBlocks]
    expected = x
    for block in blocks:
        expected = packed_blocks([block])(expected)
    assert torch.equal(together(x), expected)
    assert len(packed_blocks([make_block(32, 4, 2, 0.5), make_block(32, 4, 2, 1.0)])) == 4, "of different heads, so one by one"


def test_block_of_any_strides_and_scale():
    block = make_block(32, 4, 2, 0.5)
    block.attn.scale, block.norm1.eps, block.norm2.eps = 0.9, 0.1, 0.2
    x = normal(0, 2, 9, 6, 32)
    for view in (x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), torch.cat((x, x), -1)[..., :32], x.transpose(1, 2)):
        assert not view.is_contiguous()
        check(block, forms_of(block), view)


@pytest.mark.parametrize("scale", [30.0, 3e5])
def test_block_with_hard_attention(scale):
    """Logits by the hundreds: the largest is subtracted; tokens much larger than 1."""
    block = make_block(32, 4, 2, 0.5)
    block.attn.scale *= 40
    check(block, forms_of(block), scale * normal(0, 2, 6, 7, 32), 2e-5)


@pytest.mark.parametrize("window, alpha", [(1, 1), (2, 0), (2, 0.5), (3, 1)])
@torch.no_grad()
def test_nan_is_not_lost(window, alpha):
    """Of a token, and of weights: what has diverged does not look sound. (Torch's softmax drops some of them.)"""
    block = make_block(32, 2, window, alpha)
    x = normal(0, 3, 6, 8, 32)
    bad = x.clone()
    bad[1, 2, 3, 4] = NAN
    ours, theirs = infer_block(block, bad).isnan(), block(bad).isnan()
    assert not (theirs & ~ours).any() and ours[1].any() and not ours[::2].any()
    part = block.attn.h_qkv if block.attn.h_heads else block.attn.l_q
    part.bias[0] = NAN  # of a query
    assert infer_block(block, x).isnan().any(-1).all()


def check_rounded(block: Block, rounded: nn.Module, form: nn.Module, shapes: tuple, share: float) -> None:
    """The form is closer to the rounded block than ``share`` of what rounding changes."""
    dim = block.norm2.normalized_shape[0]
    for B, H, W in shapes:
        x = normal(dim, B, H, W, dim)
        exact, expected = in_float64(block, x), rounded(x.double())
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ours = form(x)
            assert ours.dtype == torch.float32
            assert (ours - expected).abs().mean() < share * (expected - exact).abs().mean()


@pytest.mark.parametrize("window, alpha, dim, heads", [(0, 0.5, 32, 4), (1, 0.5, 32, 4), (2, 0.5, 64, 4), (3, 0.9, 96, 3), (2, 0, 64, 2)])
@torch.no_grad()
def test_block_of_bfloat16_products(window, alpha, dim, heads):
    """The plain block in float64 with both factors of each linear layer rounded: from that, far closer than rounding is from exact."""
    block = make_block(dim, heads, window, alpha)
    if block.attn is not None:
        block.attn.scale = 0.25  # a power of two: it is folded into the weights before these are rounded
    rounded = copy.deepcopy(block).double()
    for linear in [module for module in rounded.modules() if isinstance(module, nn.Linear)]:
        linear.weight.copy_(linear.weight.bfloat16())
        linear.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16().double())
    check_rounded(block, rounded, packed_blocks([block], torch.bfloat16), ((1, 1, 1), (2, 5, 6), (3, 14, 14)), 0.2)


def in_steps(x: Tensor, spread: Tensor, count: float) -> Tensor:
    """Rounded to the nearest of ``count`` equal steps of the spread, zero among them."""
    step = spread / count
    return (x / step.clamp_min(1e-30)).round() * step


@pytest.mark.parametrize("window, alpha, dim, heads", [(0, 0.5, 32, 4), (1, 0.5, 32, 4), (2, 0.5, 64, 4), (3, 0.9, 96, 3), (2, 0, 64, 2)])
@torch.no_grad()
def test_block_of_int8_products(window, alpha, dim, heads):
    """The plain block in float64 with both factors of each linear layer in steps: from that, far closer than that is from exact.
    Not closer: where the last bits, or GELU, turn a rounding, the number is a whole step away."""
    block = make_block(dim, heads, window, alpha)
    rounded = copy.deepcopy(block).double()

    def per_token(linear, inputs):
        parts = inputs[0].split(192, dim=-1)  # hidden channels that are multiplied at once
        return torch.cat([in_steps(x, x.amax(-1, True).clamp_min(0) - x.amin(-1, True).clamp_max(0), 254.99) for x in parts], dim=-1)

    for linear in [module for module in rounded.modules() if isinstance(module, nn.Linear)]:
        linear.weight.copy_(in_steps(linear.weight, linear.weight.abs().amax(1, True), 127))
        linear.register_forward_pre_hook(per_token)
    check_rounded(block, rounded, packed_blocks([block], torch.int8), ((2, 5, 6), (3, 14, 14)), 0.25)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
@torch.no_grad()
def test_int8_products_of_wild_tokens(value):
    """A token that cannot be scaled gives no sound number; the others, and one that is all zero, are not touched."""
    block = make_block(32, 4, 0, 0.5)
    form, x = packed_blocks([block], torch.int8), normal(0, 1, 9, 4, 32)
    x[0, 7:] = 0
    before = form(x)
    assert before.isfinite().all()
    x[0, 0, 0, 0] = value
    after = form(x)
    assert not after[0, 0, 0].isfinite().any() and torch.equal(after[0, 3:], before[0, 3:])


# Patch embedding and token merging


@pytest.mark.parametrize("in_chans, dim, patch", [(3, 32, 4), (1, 20, 4), (3, 96, 2), (4, 36, 7), (2, 8, 1)])
def test_patch_embed(in_chans, dim, patch):
    embed = fill(PatchEmbed(in_chans, dim, patch)).eval()
    ours = PackedPatchEmbed(embed)
    for B, H, W in ((1, patch, patch), (2, 1, 1), (3, 37, 50), (1, 4 * patch, 130 * patch), (2, 150, 4 * patch)):
        image = normal(H, B, in_chans, H, W)
        check(embed, [ours], image)
        double = F.pad(image, (2, 3, 1, 0)).repeat_interleave(2, 3)
        for view in (
            image.to(memory_format=torch.channels_last),
            double[:, :, 1:, 4:-6:2],
            image.transpose(2, 3),
            image[:1].expand(3, -1, -1, -1),
            normal(0, B, 1, H, W).expand(-1, in_chans, -1, -1),
        ):
            check(embed, [ours], view)
    check(embed, [ours], normal(0, 3, in_chans, 9 * patch, 30 * patch), threads=(1, 2))


@pytest.mark.parametrize("dim, out", [(16, 32), (20, 40), (96, 192), (3, 7), (130, 12)])
@pytest.mark.parametrize("reach", [0, 1, 30])
def test_token_merging(dim, out, reach):
    """``reach``: how far, in tokens, the offsets go; 30 is outside of all of these maps."""
    merging = fill(DeformableTokenMerging(dim, out)).eval().requires_grad_(False)
    merging.dconv.conv_offset.weight.mul_(reach)
    merging.dconv.conv_offset.bias.mul_(reach * 3)
    ours = PackedOperator("native_token_merging", **token_merging_arguments(merging))
    for B, H, W in ((1, 2, 2), (2, 3, 5), (3, 14, 9), (1, 5, 301), (5, 40, 2)):
        x = normal(H, B, H, W, dim)
        check(merging, [ours], x, 1e-5 if reach == 0 else 2e-4)
    check(merging, [ours], x.transpose(1, 2), 1e-5 if reach == 0 else 2e-4, threads=(1, 2))


# The native form of models


ARGUMENTS = [
    dict(),
    dict(alpha=0.0),
    dict(local_ws=(1, 2, 4, 7), alpha=0.5),
    dict(local_ws=(2, 1, 3, 2), alpha=0.4, qkv_bias=False),
    dict(num_classes=0, in_chans=1, patch_size=2),
    dict(embed_dim=20, num_heads=(1, 2, 4, 5), mlp_ratio=3, local_ws=(0, 3, 2, 1), alpha=0.5),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@torch.no_grad()
def test_packed_model(arguments):
    model = tiny_model(**arguments).eval()
    form = packed_model(model)
    one_call = in_one_call(form)
    assert isinstance(one_call, PackedClassifier) == (model.num_classes > 0)
    for shape in ((1, 3, 64, 64), (3, 3, 65, 111), (2, 3, 33, 132)):
        x = normal(0, *shape)[:, : model.in_chans]
        exact = copy.deepcopy(model).double()
        for ours in (one_call, form, model):
            assert max_difference(ours(x), exact(x.double())) < 1e-4
        for ours in (form, model):
            for a, b in zip(ours.forward_pyramid(x), exact.forward_pyramid(x.double()), strict=True):
                assert max_difference(a, b) < 1e-4 * max(1, b.abs().max())


@torch.no_grad()
def test_packed_model_golden():
    case = golden()["classification"][0]
    model = in_one_call(packed_model(fill(litv2_small(alpha=case["alpha"]))))
    images = normal(case["input_seed"], case["batch"], 3, case["img_size"], case["img_size"])
    assert max_difference(model(images), golden_arrays()["cls0_logits"]) <= 1e-4


@pytest.mark.extra
@pytest.mark.parametrize("i", range(3))
@torch.no_grad()
def test_packed_model_golden_pyramid(i):
    backbone = pytest.importorskip("litv2.mm_backbone", exc_type=ImportError).LITv2Backbone
    case = golden()["pyramid"][i]
    norms = {"detection": (1, 2, 3), "segmentation": (0, 1, 2, 3)}[case["task"]]
    maps = packed_model(fill(backbone(local_ws=tuple(case["local_ws"]), out_norms=norms)))(
        normal(case["input_seed"], 1, 3, case["H"], case["W"])
    )
    for level, feature in enumerate(maps):
        assert feature.is_contiguous(memory_format=torch.channels_last)
        values = feature.contiguous().flatten()[::101]
        assert max_difference(values, golden_arrays()[f"pyr{i}_level{level}_every_101st"].flatten()) <= 1e-4


@pytest.mark.extra
@torch.no_grad()
def test_packed_model_of_a_fresh_backbone():
    backbone = pytest.importorskip("litv2.mm_backbone", exc_type=ImportError).LITv2Backbone
    model = backbone(**{k: v for k, v in TINY.items() if k != "num_classes"}, out_indices=(1, 3), out_norms=(3,))
    x = normal(0, 2, 3, 70, 90)
    for ours, theirs in zip(packed_model(model)(x), copy.deepcopy(model).eval().double()(x.double()), strict=True):
        assert max_difference(ours, theirs) < 1e-4 * max(1, theirs.abs().max())


def test_empty_batch():
    model = tiny_model().eval()
    x = torch.empty(0, 3, 64, 64)
    model(x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model(x).shape == in_one_call(packed_model(model))(x).shape == (0, 10)


def test_packed_model_leaves_the_model_as_it_was():
    model = tiny_model(drop_path_rate=0.5, drop_rate=0.3).train()
    model.set_grad_checkpointing()
    before = copy.deepcopy(model.state_dict())
    form = packed_model(model)
    assert model.training and not form.training and all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in form.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = normal(0, 1, 3, 64, 64)
    expected = form(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(form(x), expected)


# Wrong arguments


def operator_case(name: str) -> dict:
    """Arguments that fit, all of them in use."""
    block = make_block(24, 2, 2, 0.5)
    x = normal(0, 2, 4, 6, 24)
    if name == "native_depthwise_gelu":
        return dict(x=normal(0, 2, 4, 6, 32), weight=normal(0, 9, 32), bias=normal(0, 32))
    if name == "native_depthwise_gelu_backward":
        return dict(gradient=normal(0, 2, 4, 6, 32), **operator_case("native_depthwise_gelu"))
    if name == "native_feed_forward":
        return dict(x=x, **feed_forward_arguments(block.mlp, block.norm2))
    if name == "native_hilo":
        return dict(x=x, **hilo_arguments(block.attn, block.norm1))
    if name == "native_classifier":
        form = in_one_call(packed_model(tiny_model()))
        return dict(image=x.new_ones(1, 3, 32, 32), patch=4, tensors=form.tensors, eps=form.eps, stages=form.stages, classes=10)
    if name == "native_blocks":
        blocks = packed_blocks([block, block])[0]
        return dict(x=x, tensors=blocks.tensors, eps=blocks.eps, h_heads=1, l_heads=1, window_size=2)
    if name == "native_patch_embed":
        return dict(image=normal(0, 2, 3, 8, 12), **patch_embed_arguments(fill(PatchEmbed(3, 24, 4)).requires_grad_(False)))
    merging = fill(DeformableTokenMerging(24, 40)).requires_grad_(False)
    return dict(x=x, **token_merging_arguments(merging))


OPERATORS = "blocks classifier depthwise_gelu depthwise_gelu_backward feed_forward hilo patch_embed token_merging".split()


@pytest.mark.parametrize("name", [f"native_{name}" for name in OPERATORS])
@torch.no_grad()
def test_wrong_arguments(name):
    operator, case = getattr(torch.ops.litv2, name), operator_case(name)
    torch.library.opcheck(operator, (), case, test_utils=("test_schema", "test_faketensor"))
    for key, value in case.items():
        if not isinstance(value, Tensor):
            continue
        wrong = [value.double(), value.bfloat16(), value[None], value.flatten()[:-1], value.new_zeros(0), torch.cat((value, value))]
        if value.dim() == 3:  # weights
            wrong += [value[:, :-1].contiguous(), value[..., :-1].contiguous(), value.transpose(0, 2).contiguous(), value.transpose(1, 2)]
        if value.dim() == 4:
            wrong = [*wrong[:-1], value[:, :0], value[:, :, :0], value[..., :0], value[..., :-1], value[0]]
        for other in wrong:
            if other.shape == value.shape and other.dtype == value.dtype and other.stride() == value.stride():
                continue
            if other.numel() == value.numel() and other.dtype == value.dtype and value.dim() < 3:
                continue  # nothing but the number counts
            if (name, key, other.dtype) == ("native_depthwise_gelu", "x", torch.bfloat16):
                continue
            with pytest.raises(ValueError):
                operator(**{**case, key: other})


@pytest.mark.parametrize(
    "name, changes",
    [
        ("hilo", dict(window_size=0)),
        ("hilo", dict(window_size=-2)),
        ("hilo", dict(h_heads=0)),
        ("hilo", dict(h_heads=-1, l_heads=3)),
        ("hilo", dict(h_heads=0, l_heads=0)),
        ("hilo", dict(l_heads=4)),
        ("hilo", dict(h_heads=2, l_heads=0)),
        ("hilo", dict(window_size=1)),
        ("blocks", dict(eps=[1e-6] * 3)),
        ("blocks", dict(tensors=[])),
        ("blocks", dict(h_heads=0, l_heads=0)),
        ("classifier", dict(stages=[])),
        ("classifier", dict(stages=[1, 0, 0, 1])),
        ("classifier", dict(tensors=[])),
        ("classifier", dict(eps=[])),
        ("classifier", dict(eps=[1e-6] * 100)),
        ("classifier", dict(classes=0)),
        ("classifier", dict(classes=-10)),
        ("classifier", dict(classes=40)),
        ("patch_embed", dict(patch=0)),
        ("patch_embed", dict(patch=-4)),
        ("patch_embed", dict(patch=2)),
        ("patch_embed", dict(patch=5)),
        ("token_merging", dict(out_channels=0)),
        ("token_merging", dict(out_channels=-40)),
        ("token_merging", dict(out_channels=80)),
    ],
    ids=str,
)
def test_wrong_numbers(name, changes):
    case = operator_case(f"native_{name}")
    with pytest.raises(ValueError):
        getattr(torch.ops.litv2, f"native_{name}")(**{**case, **changes})


def test_hidden_channels_are_whole_columns():
    """All sizes fit together, but the last columns are not whole: the kernels would write beyond them."""
    columns = torch.ops.litv2.native_columns()
    for hidden in (columns + 1, columns - 1, 0):
        packed = dict(fc1=torch.ops.litv2.native_pack(torch.zeros(hidden, 24)), fc2=torch.ops.litv2.native_pack(torch.zeros(24, hidden)))
        vectors = dict(fc1_bias=torch.zeros(hidden), depthwise=torch.zeros(9, hidden), depthwise_bias=torch.zeros(hidden))
        with pytest.raises(ValueError, match="hidden"):
            torch.ops.litv2.native_feed_forward(**{**operator_case("native_feed_forward"), **packed, **vectors})


def test_pack():
    for N, K in ((1, 1), (20, 7), (64, 33)):
        weight, panel = normal(N, N, K), torch.ops.litv2.native_panel()
        packed = torch.ops.litv2.native_pack(weight.t().contiguous().t())
        assert packed.shape == (-(-N // panel), K, panel)  # no K that Strassen halves
        assert torch.equal(packed.transpose(1, 2).reshape(-1, K), F.pad(weight, (0, 0, 0, -N % panel)))
    for N, K in ((1, 32), (20, 64), (64, 96)):
        weight = normal(N, N, K).bfloat16()
        packed = torch.ops.litv2.native_pack(weight.t().contiguous().t())
        assert packed.shape == (-(-N // 32), K // 2, 32, 2)
        assert torch.equal(packed.transpose(1, 2).reshape(-1, K), F.pad(weight, (0, 0, 0, -N % 32)))
    for wrong in (torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 3).double()):
        with pytest.raises(ValueError, match="pack: .* expected a float32 or bfloat16 matrix on the CPU"):
            torch.ops.litv2.native_pack(wrong)
    with pytest.raises(ValueError, match="of 3 inputs, expected a multiple of 32"):
        torch.ops.litv2.native_pack(torch.zeros(2, 3).bfloat16())
