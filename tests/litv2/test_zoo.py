# SPDX-License-Identifier: Apache-2.0
"""The model zoo: its table against what is published, and models by name."""

from __future__ import annotations

import pytest
import torch
import yaml

from helpers import ROOT, fill, manifest
from litv2 import LITv2, litv2_small
from litv2.factory import VARIANTS, create_model
from litv2.weights.architecture import infer_arguments
from litv2.weights.releases import ZOO
from litv2.weights.state_dict import find_weights

CLASSIFIERS = [name for name, entry in ZOO.items() if entry.task == "classification"]


def test_every_file_of_the_release():
    assert [sum(entry.task == task for entry in ZOO.values()) for task in ("classification", "detection", "segmentation")] == [11, 12, 3]
    assert len({entry.url for entry in ZOO.values()}) == 26
    for name, entry in ZOO.items():
        tag = "v1.1" if entry.file.startswith("alpha_") else "v1.0"
        assert entry.name == name and "." not in name
        assert entry.url == f"https://github.com/ziplab/LITv2/releases/download/{tag}/{entry.file}"
    assert [ZOO[name].file for name in CLASSIFIERS] == (
        "litv2_s.pth litv2_m.pth litv2_b.pth litv2_b_384.pth "
        "alpha_0.pth alpha_0.2.pth alpha_0.4.pth alpha_0.5.pth alpha_0.7.pth alpha_0.9.pth alpha_1.pth"
    ).split()


def test_dense_entries_are_the_configurations():
    for task in ("detection", "segmentation"):
        entries = [entry for entry in ZOO.values() if entry.task == task]
        assert {entry.config for entry in entries} == {path.stem for path in (ROOT / task / "configs/litv2").glob("*.py")}
        for entry in entries:
            assert entry.file == f"{entry.config}.pth"
            assert (entry.window[2] == 4) == entry.name.endswith("ws_4")


def test_alpha_sweep():
    """SPEC: heads of stage 3 and accuracies; the trainer has a configuration for each."""
    published = {0.0: (0, 81.16), 0.2: (2, 81.89), 0.4: (4, 81.81), 0.5: (6, 81.88), 0.7: (8, 81.94), 0.9: (10, 82.03), 1.0: (12, 81.89)}
    sweep = [entry for name, entry in ZOO.items() if "alpha" in name]
    assert {entry.alpha: entry.figures["top-1"] for entry in sweep} == {alpha: top1 for alpha, (_, top1) in published.items()}
    for entry in sweep:
        config = yaml.safe_load((ROOT / f"classification/configs/litv2-small-alpha-{entry.alpha}.yaml").read_text())
        assert config["MODEL"]["LIT"]["ALPHA"] == entry.alpha
        with torch.device("meta"):
            assert create_model(entry.name).layers[2].blocks[0].attn.l_heads == published[entry.alpha][0]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_models_by_name(name):
    """Shapes of the release, and arguments that can be told from shapes alone."""
    entry = ZOO[name]
    with torch.device("meta"):
        model = create_model(name)
    state = model.state_dict()
    if entry.alpha == 0.9:
        assert {key: list(value.shape) for key, value in state.items()} == manifest()[f"litv2_{entry.variant[0]}"]
    with torch.device("meta"):
        again = LITv2(**infer_arguments(state)[0])
    assert {key: value.shape for key, value in again.state_dict().items()} == {key: value.shape for key, value in state.items()}
    assert [block.attn.window_size for stage in again.layers[2:] for block in stage.blocks] == [
        block.attn.window_size for stage in model.layers[2:] for block in stage.blocks
    ]


def test_arguments_of_other_models():
    """Grey images, other patches, widths, windows and no bias; what shapes do not tell comes from the configuration."""
    arguments = dict(in_chans=1, num_classes=3, patch_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2.0)
    arguments |= dict(qkv_bias=False, local_ws=(0, 2, 4, 2), alpha=0.5, attention="hilo", conv_ffn=True)
    lit = dict(EMBED_DIM=16, DEPTHS=[1, 2, 1, 1], NUM_HEADS=[1, 2, 4, 8], LOCAL_WS=[0, 2, 4, 2])
    state = LITv2(**arguments).state_dict()
    assert infer_arguments(state, dict(MODEL=dict(LIT=lit))) == (arguments, [])
    with pytest.raises(ValueError, match="heads.*16 channels"):
        infer_arguments(state)
    with pytest.raises(ValueError, match="heads.*16 channels"):
        infer_arguments(state, dict(MODEL=dict(LIT={**lit, "DEPTHS": [2, 2, 6, 2]})))  # of another network: it says nothing
    with pytest.raises(ValueError, match="heads.*16 channels"):
        infer_arguments(state, dict(MODEL=dict(LIT={**lit, "LOCAL_WS": [0, 2, "4", 2]})))  # not numbers
    with pytest.raises(ValueError, match="head.weight is a single number"):
        find_weights({**state, "head.weight": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="numbers of heads that do not fit"):
        infer_arguments(state, dict(MODEL=dict(LIT={**lit, "NUM_HEADS": [1, 2, 10**400, 8]})))
    with pytest.raises(ValueError, match="a window of more than 64 tokens"):
        infer_arguments(state, dict(MODEL=dict(LIT={**lit, "LOCAL_WS": [0, 2, 10**400, 2]})))
    for other in ({}, {"weight": torch.zeros(3)}, {"patch_embed.proj.weight": torch.zeros(3, 3)}):
        with pytest.raises(ValueError, match="not the weights of a LITv2"):
            infer_arguments(other)
    for alpha in (0.1, 0.34, 0.6, 0.95):
        model = LITv2(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), alpha=alpha, local_ws=(0, 2, 2, 2))
        inferred, guessed = infer_arguments(model.state_dict())
        assert guessed == ["num_heads", "local_ws"]
        same = LITv2(**inferred)
        assert same.state_dict().keys() == model.state_dict().keys()
    with torch.device("meta"):  # 13 of 23 heads: int(23 * (13 / 23)) is 12
        state = LITv2(embed_dim=736, depths=(1, 1, 1, 1), num_heads=(23, 46, 92, 184), alpha=0.6, local_ws=(2, 0, 0, 1)).state_dict()
        assert LITv2(**infer_arguments(state)[0]).layers[0].blocks[0].attn.l_heads == 13


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file in the place where the published weights of S would be."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "hub/checkpoints"
    folder.mkdir(parents=True)
    model = fill(litv2_small())
    torch.save(dict(model=model.state_dict(), epoch=299), folder / "litv2_s.pth")
    return home, model.state_dict()


def test_pretrained(released, monkeypatch, recwarn):
    home, state = released
    monkeypatch.setenv("TORCH_HOME", str(home))
    for pretrained in (True, "litv2_small", home / "hub/checkpoints/litv2_s.pth"):
        model = create_model("litv2_small", pretrained=pretrained)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    headless = create_model("litv2_small", pretrained=True, num_classes=0)
    assert torch.equal(headless.norm.weight, state["norm.weight"])
    assert not recwarn
    with pytest.warns(UserWarning, match="litv2_small: head is newly initialised.*1000 outputs.*5"):
        model = create_model("litv2_small", pretrained=True, num_classes=5)
    assert torch.equal(model.norm.weight, state["norm.weight"]) and model.head.weight.shape == (5, 768)
    with pytest.raises(ValueError, match="litv2_small: the weights do not fit.*another variant"):
        create_model("litv2_small_alpha05", pretrained="litv2_small")
    with pytest.raises(ValueError, match=r"litv2_small: (.|\n)*patch_embed.proj.weight"):
        create_model("litv2_small", pretrained=True, in_chans=1)


def test_unknown_names():
    with pytest.raises(ValueError, match="no classification model 'litv2_smal'; similar names: litv2_small,"):
        create_model("litv2_smal")
    with pytest.raises(ValueError, match="no classification model 'retinanet_litv2_s_fpn_1x_coco'"):
        create_model("retinanet_litv2_s_fpn_1x_coco")
    assert VARIANTS.keys() == {entry.variant for entry in ZOO.values()}


def test_moving_averages():
    """Whose entry is which: ours, timm's, mmengine's (which exchanges the two names when it saves)."""
    plain, average = ({"layers.0.weight": torch.full((1,), value)} for value in (1.0, 2.0))
    wrapped = {f"module.{key}": value for key, value in plain.items()} | {"steps": torch.tensor(3)}
    files = [
        dict(model=plain, ema=average),
        dict(state_dict=plain, state_dict_ema=average),
        dict(model=plain, model_ema=average),
        dict(state_dict={f"backbone.{key}": value for key, value in average.items()}, ema_state_dict=wrapped),
    ]
    for file in files:
        assert find_weights(file)["layers.0.weight"] == 2 and find_weights(file, "ema")["layers.0.weight"] == 2
        assert find_weights(file, "model")["layers.0.weight"] == 1
    with pytest.raises(ValueError, match="no moving average"):
        find_weights(dict(model=plain, ema=None), "ema")
    with pytest.raises(ValueError, match="only the moving average"):
        find_weights(dict(ema=average), "model")
    with pytest.raises(ValueError, match="which='both'"):
        find_weights(files[0], "both")


@pytest.mark.parametrize("wrap", ["module._orig_mod.backbone.", "_orig_mod.module.", "backbone._orig_mod.module.", "module.module."])
def test_nested_wrappings(wrap):
    weights = {f"{wrap}norm.weight": torch.ones(2), f"{wrap}head.bias": torch.ones(3)}
    assert find_weights(dict(state_dict=weights)).keys() == {"norm.weight", "head.bias"}
    with pytest.raises(ValueError, match="more than 10 wrapper prefixes"):
        find_weights({"module." * 1000 + "a": torch.ones(1)})
