# SPDX-License-Identifier: Apache-2.0
"""The inference form gives the model's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import assert_as_precise, fill, golden, golden_arrays, max_difference, normal, tiny_model
from litv2 import fuse, litv2_small

SHAPES = [(1, 3, 64, 64), (3, 3, 65, 111), (5, 3, 100, 132)]  # maps that windows divide, and do not
ARGUMENTS = [
    dict(),
    dict(alpha=0.0),
    dict(alpha=1.0),
    dict(local_ws=(0, 0, 4, 1), alpha=0.5),
    dict(local_ws=(2, 1, 3, 2), alpha=0.4, qkv_bias=False),
    dict(num_classes=0, in_chans=1),
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_same_numbers(arguments, shape):
    model = tiny_model(**arguments).eval()
    x = normal(0, *shape)[:, : model.in_chans]
    fused = fuse(model)
    assert max_difference(fused(x), model(x)) < 1e-4
    for ours, theirs in zip(fused.forward_pyramid(x), model.forward_pyramid(x)):
        assert max_difference(ours, theirs) < 1e-4 * max(1, theirs.abs().max())


@torch.no_grad()
def test_each_norm_has_its_eps():
    """Norms are computed where the sum is that they follow, which may be in another block."""
    model, x = tiny_model(depths=(1, 2, 3, 2)).eval(), normal(0, *SHAPES[1])
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for i, norm in enumerate(norms):
        norm.eps = 10.0 ** (i % 4 - 2)
    assert max_difference(fuse(model)(x), model(x)) < 1e-5
    norms[-2].eps = norms[-4].eps = 3.0
    assert max_difference(fuse(model)(x), model(x)) < 1e-5


@torch.no_grad()
def test_golden():
    case = golden()["classification"][0]
    model = fuse(fill(litv2_small(alpha=case["alpha"])))
    images = normal(case["input_seed"], case["batch"], 3, case["img_size"], case["img_size"])
    assert max_difference(model(images), golden_arrays()["cls0_logits"]) <= 1e-4


def test_one_product_and_no_batch_norm():
    model = tiny_model(alpha=0.5)
    fused = fuse(model)
    count = {kind: sum(isinstance(m, kind) for m in fused.modules()) for kind in (nn.BatchNorm2d, nn.Linear, nn.LayerNorm)}
    # Per block fc1, fc2; per HiLo a product before and one after attention, and l_kv but in the last stage; the head.
    assert count == {nn.BatchNorm2d: 0, nn.Linear: 5 * 2 + 2 * 3 + 2 + 1, nn.LayerNorm: 2}
    kept = [name for name, module in fused.named_modules() if isinstance(module, nn.LayerNorm)]
    assert kept == ["patch_embed.norm", "norm"]


def test_the_model_stays_as_it_was():
    model = tiny_model(drop_path_rate=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = fuse(model)
    assert model.training and not fused.training and not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_low_precision():
    model = tiny_model().eval()
    x = normal(1, 8, 3, 64, 96)
    exact, fused = model(x), fuse(model)
    assert_as_precise(fused.bfloat16()(x.bfloat16()), model.bfloat16()(x.bfloat16()), exact)


def test_bad_arguments():
    with pytest.raises(TypeError, match="expected a LITv2, got Linear"):
        fuse(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="already fused"):
        fuse(fuse(tiny_model()))
