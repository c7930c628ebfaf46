# SPDX-License-Identifier: Apache-2.0
"""The model against the golden numbers and the published tables, and the properties that users rely on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from helpers import TINY, assert_as_precise, fill, golden, golden_arrays, manifest, max_difference, normal, rounded_model, tiny_model
from litv2 import LITv2, litv2_base, litv2_medium, litv2_small
from litv2.layers import DropPath, channels_last

VARIANTS = {"s": litv2_small, "m": litv2_medium, "b": litv2_base}


@pytest.mark.parametrize("i", range(3))
def test_golden_classification(i):
    case = golden()["classification"][i]
    model = fill(VARIANTS[case["variant"]](alpha=case["alpha"])).eval()
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == manifest()[f"litv2_{case['variant']}"]
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    images = normal(case["input_seed"], case["batch"], 3, case["img_size"], case["img_size"])
    assert images.double().sum().item() == pytest.approx(case["input_sum"], abs=1e-3)
    with torch.inference_mode():
        assert max_difference(model(images), golden_arrays()[f"cls{i}_logits"]) <= 1e-4
        for stage, feature, expected in zip(model.layers, model.forward_pyramid(images), case["stage_mean_std_max"]):
            tokens = channels_last(feature)
            tokens = tokens if stage.downsample is None else stage.downsample(tokens)
            assert [tokens.mean().item(), tokens.std().item(), tokens.max().item()] == pytest.approx(expected, rel=1e-4)


def test_golden_train_step():
    """Training mode: batch statistics, loss, every gradient, running statistics."""
    case = golden()["train_step"]
    model = tiny_model(local_ws=tuple(case["local_ws"]), alpha=case["alpha"])
    logits = model(normal(case["input_seed"], case["batch"], 3, case["img_size"], case["img_size"]))
    assert max_difference(logits, golden_arrays()["train_logits"]) <= 1e-4
    loss = nn.functional.cross_entropy(logits, torch.tensor(case["targets"]))
    assert loss.item() == pytest.approx(case["loss"], abs=1e-4)
    loss.backward()
    for name, parameter in model.named_parameters():
        # A bias before batch norm has no gradient but rounding: hence the absolute part.
        assert parameter.grad.norm().item() == pytest.approx(case["grad_norm"][name], rel=1e-4, abs=1e-4), name
    for name, norm in case["running_mean_after"].items():
        assert model.state_dict()[name].norm().item() == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize(
    "build, size, gflops",
    [(litv2_small, 224, 3.734401596), (litv2_medium, 224, 7.47923718), (litv2_base, 224, 13.193561148), (litv2_base, 384, 39.709486528)],
)
def test_published_flops(build, size, gflops):
    with torch.device("meta"):
        flops = build().flops(size, size)
    assert type(flops) is int and flops == round(gflops * 1e9)


@pytest.mark.parametrize(
    "alpha, gflops", [(0.0, 3.965), (0.2, 3.881), (0.4, 3.815), (0.5, 3.769), (0.7, 3.742), (0.9, 3.734), (1.0, 3.746)]
)
def test_published_flops_of_the_alpha_sweep(alpha, gflops):
    with torch.device("meta"):
        assert litv2_small(alpha=alpha).flops(224, 224) / 1e9 == pytest.approx(gflops, abs=5e-4)


@pytest.mark.parametrize("H, W", [(32, 32), (33, 47), (64, 96), (50, 130)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_size(H, W, batch):
    model = LITv2(**TINY).eval()
    x = torch.randn(batch, 3, H, W)
    assert model(x).shape == (batch, 10)
    for i, (feature, info) in enumerate(zip(model.forward_pyramid(x), model.feature_info)):
        h, w = math.ceil(H / 4) // 2**i, math.ceil(W / 4) // 2**i
        assert feature.shape == (batch, info["num_chs"], h, w) and info["reduction"] == 4 * 2**i
        assert model.get_submodule(info["module"]) is model.layers[i]


def test_parts_of_forward():
    model = tiny_model().eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, 2, 2, 256)
    assert max_difference(model.forward_head(features), model(x)) < 1e-6
    assert max_difference(model.forward_head(features, pre_logits=True), features.mean((1, 2))) < 1e-6
    pyramid = model.forward_pyramid(x)
    assert max_difference(model.norm(channels_last(pyramid[-1])), features) < 1e-6


def test_classifier():
    model = LITv2(**TINY)
    x = torch.randn(2, 3, 64, 64)
    model.double().reset_classifier(7)
    assert model(x.double()).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model(x.double()).shape == (2, 256) and not any(name.startswith("head") for name in model.state_dict())
    assert LITv2(**{**TINY, "num_classes": 0})(x).shape == (2, 256)


def test_every_parameter_gets_a_gradient():
    model = tiny_model(drop_path_rate=0.0)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_checkpointing_changes_nothing():
    plain, checkpointed = (tiny_model(drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1) for _ in range(2))
    checkpointed.set_grad_checkpointing(True)
    x = torch.randn(4, 3, 64, 64)
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(x).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters()):
        assert torch.equal(a.grad, b.grad), name
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), checkpointed.buffers()))


def test_no_copy_between_layers():
    """Tokens stay channels-last: what each block and each merging gets and gives is contiguous (B, H, W, C)."""
    model = LITv2(**TINY).eval()
    seen = []

    def hook(module, inputs, output):
        seen.append(inputs[0].is_contiguous() and output.is_contiguous())

    for stage in model.layers:
        for module in (*stage.blocks, stage.downsample):
            if module is not None:
                module.register_forward_hook(hook)
    for block in (block for stage in model.layers for block in stage.blocks):
        block.mlp.dwconv.register_forward_hook(hook)
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == 13 and all(seen)


def test_drop_path():
    model = LITv2(**TINY, drop_path_rate=0.4)
    rates = [block.drop_path.rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    drop, x = DropPath(0.25), torch.ones(4000, 1, 2, 3)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (y.flatten(1).std(dim=1) == 0).all(), "a sample is kept or dropped as a whole"
    assert 0.7 < (y > 0).float().mean() < 0.8
    assert drop.eval()(x) is x


def test_initialisation():
    model = litv2_small()
    assert model.layers[0].blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].blocks[0].mlp.dwconv.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    for stage in model.layers[:3]:
        assert not stage.downsample.dconv.conv_offset.weight.any() and not stage.downsample.dconv.conv_offset.bias.any()
    names = model.no_weight_decay()
    assert names == {name for name, p in model.named_parameters() if p.ndim == 1} and "head.bias" in names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(dtype):
    model = tiny_model().eval()
    x = normal(1, 32, 3, 64, 64)
    with torch.autocast("cpu", dtype):
        low = model(x)
    assert low.dtype == dtype
    assert_as_precise(low, rounded_model(model, dtype)(x.to(dtype).float()), model(x))


@torch.no_grad()
def test_whole_model_in_bfloat16():
    model = tiny_model().eval()
    x = normal(1, 32, 3, 64, 64)
    exact, plain = model(x), rounded_model(model, torch.bfloat16)(x.bfloat16().float())
    assert_as_precise(model.bfloat16()(x.bfloat16()), plain, exact)


@pytest.mark.extra
def test_export_with_dynamic_sizes():
    model = tiny_model().eval()
    dims = {0: Dim("b"), 2: Dim.AUTO, 3: Dim.AUTO}
    program = export(model, (torch.randn(2, 3, 100, 76),), dynamic_shapes=(dims,))
    for shape in ((1, 3, 96, 128), (3, 3, 65, 111)):
        x = torch.randn(shape)
        assert max_difference(program.module()(x), model(x)) < 1e-4


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(depths=(1, 1)), "must have one entry per stage"),
        (dict(drop_path_rate=1.0), r"drop_path_rate=1.0 must lie in \[0, 1\)"),
        (dict(num_heads=(1, 2, 5, 8)), "dim=128 .*num_heads=5"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        LITv2(**{**TINY, **kwargs})


@pytest.mark.parametrize(
    "shape, words", [((3, 64, 64), r"\(B, 3, H, W\), got \(3, 64, 64\)"), ((1, 1, 64, 64), "got"), ((1, 3, 31, 64), "31 x 64")]
)
def test_bad_images(shape, words):
    with pytest.raises(ValueError, match=words):
        LITv2(**TINY)(torch.randn(shape))
