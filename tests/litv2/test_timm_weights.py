# SPDX-License-Identifier: Apache-2.0
"""Weights through timm: pretrained=True and files of every format, adapted by timm, strictly and without running their code."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from helpers import fill, max_difference, normal, shared, timm_model, tiny_model
from litv2.weights.releases import ZOO

timm = pytest.importorskip("timm")
from timm.models._hub import save_for_hf  # noqa: E402
from timm.models._manipulate import adapt_input_conv  # noqa: E402

OURS = dict(pretrained_cfg_overlay=dict(num_classes=10))  # of the tiny files


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A file of the release's format with tiny weights, where pretrained=True looks for the published one."""
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints/litv2_s.pth"
    path.write_bytes(shared("golden/classification_format.pth").read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    return path


def equal_but(model: nn.Module, *others: str) -> bool:
    """All of the model's weights are tiny_model's, but those."""
    expected = tiny_model().state_dict()
    floating = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    return all(torch.equal(value, expected[key]) != key.startswith(others) for key, value in floating.items())


def test_pretrained(released):
    model = timm_model(pretrained=True, **OURS)
    assert model.num_classes == 10 and equal_but(model, "nothing")
    assert "state_dict" not in model.pretrained_cfg and model.pretrained_cfg["url"] == ZOO["litv2_small"].url
    for num_classes in (5, 1000, 0):
        model = timm_model(pretrained=True, num_classes=num_classes, **OURS)
        assert model.num_classes == num_classes and equal_but(model, "head.")
    assert equal_but(timm_model(pretrained=True, img_size=64, num_classes=10, **OURS), "nothing")
    features = timm_model(pretrained=True, features_only=True, out_indices=(0, 3))
    assert equal_but(features.model, "nothing") and "state_dict" not in features.pretrained_cfg | features.model.pretrained_cfg


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6])
def test_pretrained_for_other_channels(released, in_chans):
    model = timm_model(pretrained=True, in_chans=in_chans, num_classes=5).eval()
    assert equal_but(model, "head.", "patch_embed.proj.weight")
    assert torch.equal(model.patch_embed.proj.weight, adapt_input_conv(in_chans, tiny_model().patch_embed.proj.weight))
    gray = normal(0, 2, 1, 64, 64)
    if in_chans == 1:  # what timm's adaptation means: a grey image is worth the colour image of equal channels
        assert max_difference(model.forward_features(gray), tiny_model().eval().forward_features(gray.expand(2, 3, 64, 64))) < 1e-3
    assert model(gray.expand(2, in_chans, 64, 64)).shape == (2, 5)


def test_pretrained_from_a_file(tmp_path):
    """Every format of ours, the average where there is one; timm's checkpoint_path reads some of them itself."""
    safetensors = pytest.importorskip("safetensors.torch")
    raw = timm_model(num_classes=10).state_dict()
    weights = tiny_model().state_dict()
    torch.save(dict(model=raw, ema=weights, epoch=3), tmp_path / "average.pth")
    torch.save(dict(model=weights, ema=None, epoch=3), tmp_path / "ours.pth")
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "bare.pth")
    safetensors.save_file(weights, tmp_path / "weights.safetensors")
    for file in ("average.pth", "ours.pth", "bare.pth", "weights.safetensors"):
        overlay = dict(file=str(tmp_path / file), num_classes=10)
        assert equal_but(timm_model(pretrained=True, pretrained_cfg_overlay=overlay), "nothing"), file
    for file in ("ours.pth", "bare.pth", "weights.safetensors"):
        assert equal_but(timm_model(checkpoint_path=str(tmp_path / file), num_classes=10), "nothing"), file
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        timm_model(pretrained=True, pretrained_cfg_overlay=dict(file="nowhere.pth"))
    cfg = dict(state_dict=weights, num_classes=10, first_conv="patch_embed.proj", classifier="head")
    assert equal_but(timm_model(pretrained=True, pretrained_cfg=cfg), "nothing")


def test_checkpoint_path_is_timms_own(released):
    """It refuses the release's pickled configuration; through the overlay that file is read."""
    with pytest.raises(RuntimeError, match="yacs.config.CfgNode"):
        timm_model(checkpoint_path=str(released), num_classes=10)
    assert equal_but(timm_model(pretrained=True, pretrained_cfg_overlay=dict(file=str(released), num_classes=10)), "nothing")


def test_folder_of_the_hubs_format(tmp_path):
    """What timm saves for the Hugging Face Hub, it makes a model of again, size and all."""
    pytest.importorskip("huggingface_hub")
    save_for_hf(fill(timm_model(num_classes=10, img_size=96)), str(tmp_path / "saved"))
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert equal_but(model, "nothing") and model.pretrained_cfg["input_size"] == (3, 96, 96)
    model = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True, num_classes=2)
    assert equal_but(model, "head.") and model.num_classes == 2


def test_wrong_weights(tmp_path):
    """Strict even where timm is not: it would ignore missing and left-over keys when the number of classes differs."""
    weights = tiny_model().state_dict()
    missing = {key: value for key, value in weights.items() if key != "layers.2.blocks.1.norm1.bias"}
    for file, content in (("missing", missing), ("more", weights | {"layers.2.blocks.2.norm1.bias": torch.zeros(128)})):
        torch.save(content, tmp_path / f"{file}.pth")
        for num_classes in (5, 10):
            with pytest.raises(ValueError, match="another variant.*layers.2.blocks.[12].norm1.bias"):
                timm_model(pretrained=True, num_classes=num_classes, pretrained_cfg_overlay=dict(file=str(tmp_path / f"{file}.pth")))
    torch.save(weights, tmp_path / "tiny.pth")
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm_model(pretrained=True, num_heads=(1, 2, 8, 8), alpha=0.5, pretrained_cfg_overlay=dict(file=str(tmp_path / "tiny.pth")))


def test_hostile_files(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    path = str(tmp_path / "hostile.pth")
    torch.save(dict(tiny_model().state_dict(), other=Hostile()), path)
    with pytest.raises(ValueError, match="cannot be read"):
        timm_model(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    with pytest.raises(RuntimeError, match="blocked"):
        timm_model(checkpoint_path=path)
    assert not (tmp_path / "executed").exists()
