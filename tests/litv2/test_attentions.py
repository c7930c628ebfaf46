# SPDX-License-Identifier: Apache-2.0
"""Other attention in the place of HiLo: each layer against another library's or a loop, and the models of all of them in every form."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table_simple
from timm.models.pvt_v2 import Attention as PVTAttention
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import ROOT, fill, max_difference, normal, tiny_model
from litv2 import LITv2, fuse
from litv2.attentions import ATTENTIONS, SRA, RelativeSelfAttention, SelfAttention, WindowAttention
from litv2.explain.attending import attention
from litv2.export import Settings, classifier, export
from litv2.inference.packed import packed_model
from litv2.lit import lit_small
from litv2.ops import OPERATORS, native
from litv2.weights.architecture import infer_arguments
from litv2.weights.state_dict import load_weights

DIM, HEADS = 12, 3
MODELS = {name: dict(attention=name) for name in ATTENTIONS if name != "hilo"} | {"lit": dict(attention="relative-msa", conv_ffn=False)}
IMAGES = (2, 3, 72, 200)  # maps of 5 x 13 and 3 x 7 tokens, roughly: neither windows nor reduced cells are whole


def by_hand(layer: SelfAttention, x: Tensor, H: int, W: int, table: Tensor | None = None) -> Tensor:
    """Self-attention of one image (1, H * W, DIM) with loops over heads and pairs; ``table`` is (2H - 1, 2W - 1, HEADS)."""
    d = DIM // HEADS
    q, k, v = (part.unflatten(1, (HEADS, d)) for part in layer.qkv(x[0]).chunk(3, dim=1))  # (N, HEADS, d)
    cells, out = list(itertools.product(range(H), range(W))), torch.zeros(H * W, HEADS, d)
    for head, (i, (row, column)) in itertools.product(range(HEADS), enumerate(cells)):
        logits = torch.stack([q[i, head] @ k[j, head] / d**0.5 for j in range(H * W)])
        if table is not None:
            logits += torch.stack([table[row - r + H - 1, column - c + W - 1, head] for r, c in cells])
        out[i, head] = sum(weight * v[j, head] for j, weight in enumerate(logits.softmax(0)))
    return layer.proj(out.flatten(1))[None]


@torch.no_grad()
def test_msa():
    layer, x = fill(SelfAttention(DIM, HEADS)), normal(0, 1, 12, DIM)
    assert max_difference(layer(x, 3, 4), by_hand(layer, x, 3, 4)) < 1e-5


@pytest.mark.parametrize("H, W", [(3, 3), (2, 4), (1, 5)])
@torch.no_grad()
def test_relative_positions(H, W):
    """A table of 3 x 3 cells, as it is and resized by timm's function."""
    layer, x = fill(RelativeSelfAttention(DIM, HEADS, side=3)), normal(0, 1, H * W, DIM)
    size = (2 * H - 1) * (2 * W - 1), HEADS
    table = resize_rel_pos_bias_table_simple(layer.relative_position_bias_table, (H, W), size)
    expected = by_hand(layer, x, H, W, table.reshape(2 * H - 1, 2 * W - 1, HEADS))
    assert max_difference(layer(x, H, W), expected) < 1e-5 < max_difference(by_hand(layer, x, H, W), expected)


@pytest.mark.parametrize("H, W", [(14, 7), (9, 20), (2, 3)])
@torch.no_grad()
def test_windows(H, W):
    """timm's of Twins, which also pads: Swin's without shift and positions."""
    layer, x = fill(WindowAttention(DIM, HEADS)), normal(0, 2, H * W, DIM)
    timms = LocallyGroupedAttn(DIM, HEADS, ws=7)
    timms.load_state_dict(layer.state_dict())
    assert max_difference(layer(x, H, W), timms(x, (H, W))) < 1e-5


@pytest.mark.parametrize("ratio", [1, 2, 4])
@pytest.mark.parametrize("H, W", [(8, 12), (7, 5)])
@torch.no_grad()
def test_spatial_reduction(H, W, ratio):
    """timm's of PVT: on whole cells as it is; else with its convolution over the padded map, which PVT cuts."""
    layer, x = fill(SRA(DIM, HEADS, ratio)), normal(0, 2, H * W, DIM)
    timms = PVTAttention(DIM, HEADS, sr_ratio=ratio)
    timms.load_state_dict(layer.state_dict())
    if ratio > 1:
        timms.sr = nn.Sequential(nn.ZeroPad2d((0, -W % ratio, 0, -H % ratio)), timms.sr)
    assert max_difference(layer(x, H, W), timms(x, (H, W))) < 1e-5


@pytest.mark.parametrize("make", [SelfAttention, WindowAttention, lambda dim, heads: SRA(dim, heads, 2)])
@pytest.mark.parametrize("H, W", [(14, 14), (9, 16)])
def test_flops(make, H, W):
    """Those of torch's counter, which leaves norms out and projects only the cells of the map."""
    with torch.device("meta"):
        layer, x = make(DIM, HEADS), torch.empty(1, H * W, DIM)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            layer(x, H, W)
    norms = -(-H // 2) * -(-W // 2) * DIM if isinstance(layer, SRA) else 0
    assert layer.flops(H, W) == counter.get_total_flops() // 2 + norms


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_forms(arguments):
    """The inference forms give the model's numbers: nothing mistakes the attention for HiLo, or the feed-forward network for LITv2's."""
    model, x = tiny_model(**arguments).eval(), normal(0, *IMAGES)
    with torch.enable_grad():  # no native operator for blocks
        expected = model(x).detach()
    forms = [model, fuse(model), *([] if native.problem else [packed_model(model)])]
    assert expected.abs().max() > 0.1 and all(max_difference(form(x), expected) < 1e-4 for form in forms)
    reason = OPERATORS["block"].explain(model.layers[2].blocks[0], normal(0, 2, 16, 16, 128))["native"]
    assert native.problem or "is not a module that it supports" in reason
    assert max_difference(tiny_model().eval()(x), expected) > 1e-3


def test_twins_alternate():
    layers = [type(block.attn) for stage in tiny_model(depths=(1, 1, 4, 2), attention="t-msa").stages[2:] for block in stage.blocks]
    assert layers == [WindowAttention, SRA] * 3


def test_lit():
    """Attention in the last two stages only, no convolution but those of patches and merging, tables without weight decay."""
    with torch.device("meta"):
        model = lit_small()
    sides = [None if block.attn is None else block.attn.side for stage in model.stages for block in stage.blocks]
    assert sides == [None] * 4 + [14] * 6 + [7] * 2 and not any("mlp.dwconv" in name for name in model.state_dict())
    assert "layers.2.blocks.0.attn.relative_position_bias_table" in model.no_weight_decay()


@torch.no_grad()
def test_plain_feed_forward():
    mlp, x = tiny_model(conv_ffn=False).layers[0].blocks[0].mlp, normal(0, 1, 3, 4, 32)
    assert max_difference(mlp(x), mlp.fc2(F.gelu(mlp.fc1(x)))) < 1e-6


@pytest.mark.parametrize("name, arguments", MODELS.items())
def test_trainers_configuration(name, arguments, monkeypatch):
    """The trainer builds the model, and its checkpoints tell which attention they have, or that they do not."""
    monkeypatch.syspath_prepend(ROOT / "classification")
    for module in ("config", "network"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    import config
    from network import build_model

    flags = ["MODEL.LIT.ATTENTION", arguments["attention"], "MODEL.LIT.CONV_FFN", arguments.get("conv_ffn", True)]
    flags += ["MODEL.LIT.EMBED_DIM", 32, "MODEL.LIT.NUM_HEADS", [1, 2, 4, 8]]
    loaded = config.load_config(ROOT / "classification/configs/litv2-digits.yaml", flags)
    weights = build_model(loaded, num_classes=10).state_dict()
    inferred, guessed = infer_arguments(weights, config.to_dict(loaded))
    assert inferred.items() >= arguments.items() and inferred["qkv_bias"] and not guessed
    assert load_weights(LITv2(**inferred), weights) == []

    if name in ("msa", "w-msa"):
        with pytest.raises(ValueError, match="msa or w-msa"):
            infer_arguments(weights)
    else:
        assert infer_arguments(weights)[0].items() >= arguments.items()
    other = tiny_model().state_dict()
    with torch.device("meta"):
        wrong = LITv2(**infer_arguments(other | {}, config.to_dict(loaded))[0])
    with pytest.raises(ValueError, match="attn"):
        load_weights(wrong, other)


def test_unknown():
    with pytest.raises(ValueError, match="attention='mha' must be one of hilo, msa"):
        LITv2(attention="mha")
    with pytest.raises(ValueError, match="12 channels.*num_heads=5"):
        SRA(12, 5, 2)
    lit = dict(EMBED_DIM=32, DEPTHS=[1, 1, 2, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 0, 2, 1], ATTENTION=["hilo"])
    with pytest.raises(ValueError, match="ATTENTION.*expected hilo"):
        infer_arguments(tiny_model().state_dict(), dict(MODEL=dict(LIT=lit)))


def test_explained():
    """Nothing is drawn as if the blocks with another attention had none."""
    with pytest.raises(ValueError, match="has SRA, WindowAttention"):
        attention(tiny_model(attention="t-msa"), normal(0, 1, 3, 64, 64))


@pytest.mark.extra
def test_counts_of_detectors():
    """The counter of dense models knows HiLo's products alone, and does not leave others out in silence."""
    count_flops = pytest.importorskip("litv2.openmmlab.flops", exc_type=ImportError).count_flops
    with pytest.raises(ValueError, match="not of SRA, WindowAttention"):
        count_flops(tiny_model(attention="t-msa"), 64, 64)


@pytest.mark.extra
def test_export(tmp_path):
    """One graph for every size, which tables are resized to; ``export`` itself compares the outputs with the model's."""
    model, file = tiny_model(attention="relative-msa", depths=(1, 1, 1, 1)).eval(), tmp_path / "model.pt2"
    assert export(classifier(model), "torch-export", file, Settings(image_size=(64, 96)))["file"] == file.name
