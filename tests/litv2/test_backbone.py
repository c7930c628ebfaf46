# SPDX-License-Identifier: Apache-2.0
"""The backbone of detectors and segmenters: golden feature maps, freezing, and weights from every kind of file."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from helpers import ROOT, TINY, fill, golden, golden_arrays, manifest, max_difference, normal, shared, tiny_model
from litv2 import LITv2
from litv2.errors import UserError
from litv2.mm_backbone import LITv2Backbone

pytestmark = pytest.mark.extra

BACKBONE = {key: value for key, value in TINY.items() if key != "num_classes"}
NORMS = {"detection": (1, 2, 3), "segmentation": (0, 1, 2, 3)}


def tiny_backbone(**kwargs) -> LITv2Backbone:
    return fill(LITv2Backbone(**{**BACKBONE, **kwargs}))


@pytest.mark.parametrize("i", range(3))
def test_golden_pyramid(i):
    """Feature maps of both tasks: padding, flooring, both window sizes."""
    case, arrays = golden()["pyramid"][i], golden_arrays()
    backbone = fill(LITv2Backbone(local_ws=tuple(case["local_ws"]), out_norms=NORMS[case["task"]])).eval()
    assert {name: list(value.shape) for name, value in backbone.state_dict().items()} == manifest()[f"{case['task']}_s"]
    with torch.inference_mode():
        maps = backbone(normal(case["input_seed"], 1, 3, case["H"], case["W"]))
    assert [list(level.shape) for level in maps] == case["shapes"]
    for level, feature in enumerate(maps):
        assert feature.is_contiguous(memory_format=torch.channels_last)  # read by the FPN's convolutions without a copy
        assert feature.abs().mean().item() == pytest.approx(case["abs_mean"][level], rel=1e-5)
        values = feature.contiguous().flatten()[::101]
        assert max_difference(values, arrays[f"pyr{i}_level{level}_every_101st"].flatten()) <= 1e-4


@pytest.mark.parametrize("library", ["mmdet", "mmseg"])
def test_registered_for_every_library(library):
    with MODELS.switch_scope_and_registry(library) as registry:
        backbone = registry.build(dict(type="LITv2", **BACKBONE))
    assert type(backbone) is LITv2Backbone
    init_default_scope("mmengine")


def test_only_the_asked_maps():
    images = normal(0, 1, 3, 64, 96)
    everything = tiny_backbone().eval()(images)
    some = tiny_backbone(out_indices=(1, 2), out_norms=(2,)).eval()
    assert not hasattr(some, "norm1")
    second, third = some(images)
    torch.testing.assert_close(third, everything[2])
    norm = fill(nn.LayerNorm(64), prefix="norm1.")
    torch.testing.assert_close(norm(second.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), everything[1])


@pytest.mark.parametrize("frozen", range(-1, 5))
def test_frozen_stages(frozen):
    backbone = tiny_backbone(frozen_stages=frozen, drop_path_rate=0.1)
    assert backbone.train() is backbone and backbone.eval() is backbone
    backbone.train()
    parts = ["patch_embed"] * (frozen >= 0) + [f"{part}{i}" for i in range(max(frozen, 0)) for part in ("layers.", "norm")]
    for name, module in backbone.named_modules():
        if name:
            inside = any(name == part or name.startswith(part + ".") for part in parts)
            assert module.training == (not inside), name
    before = copy.deepcopy(backbone.state_dict())
    maps = backbone(normal(0, 2, 3, 64, 64))
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    if trained:
        sum(feature.square().mean() for feature in maps).backward()
        torch.optim.SGD(trained, lr=1.0).step()
    for name, value in backbone.state_dict().items():
        frozen_part = any(name.startswith(part + ".") for part in parts)
        assert torch.equal(value, before[name]) == frozen_part, name


def test_norm_eval():
    backbone = tiny_backbone(norm_eval=True).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(normal(0, 2, 3, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.training and not backbone.layers[0].downsample.norm_layer.training


def test_checkpointing_changes_no_number():
    gradients = []
    for with_cp in (False, True):
        backbone = tiny_backbone(with_cp=with_cp).train()
        sum(feature.square().mean() for feature in backbone(normal(0, 2, 3, 64, 64))).backward()
        gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(out_indices=(0, 4)),
        dict(out_indices=(1, 0)),
        dict(out_indices=()),
        dict(out_indices=(2, 3)),  # out_norms has others
        dict(frozen_stages=5),
        dict(init_cfg=dict(type="Kaiming", layer="Conv2d")),
        dict(init_cfg=dict(type="Pretrained", checkpoint="x", prefix="backbone.")),
        dict(depth=(1, 1, 1, 1)),  # no such argument
        dict(num_classes=3),
        dict(drop_path_rate=2.0),
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(UserError, match="LITv2"):
        LITv2Backbone(**BACKBONE, **arguments)


def test_the_releases_keys(tmp_path, caplog):
    """Keys that mean the same, or nothing at the value that they had: the same model, with a line about each."""
    torch.save(dict(model=tiny_model().state_dict()), tmp_path / "tiny.pth")
    old = dict(pretrain_img_size=224, window_size=7, ape=False, patch_norm=True, qk_scale=None, has_msa=[0, 0, 1, 1])
    logger = MMLogger.get_instance("old_keys")
    logger.addHandler(caplog.handler)
    backbone = LITv2Backbone(**BACKBONE, **old, use_checkpoint=True, pretrained=str(tmp_path / "tiny.pth"))
    for key in (*old, "use_checkpoint", "pretrained"):
        assert len([message for message in caplog.messages if message.startswith(f"LITv2: {key}")]) == 1, key
    backbone.init_weights()
    assert all(stage.grad_checkpointing for stage in backbone.layers)
    assert backbone.state_dict().keys() == LITv2Backbone(**BACKBONE).state_dict().keys()
    assert torch.equal(backbone.patch_embed.proj.weight, tiny_model().patch_embed.proj.weight)
    assert LITv2Backbone(**BACKBONE, use_checkpoint=False, with_cp=True).layers[0].grad_checkpointing is False
    assert LITv2Backbone(**BACKBONE, pretrained=None).init_cfg is None


@pytest.mark.parametrize(
    "old, words",
    [
        (dict(pretrain_img_size=384), "pretrain_img_size=384 is not supported"),
        (dict(window_size=14), "window_size=14 is not supported: HiLo's windows are set by local_ws"),
        (dict(ape=True), "ape=True is not supported"),
        (dict(patch_norm=False), "patch_norm=False is not supported"),
        (dict(qk_scale=0.1), "qk_scale=0.1 is not supported"),
        (dict(has_msa=[0, 1, 1, 1]), r"has_msa=\[0, 1, 1, 1\] does not agree with local_ws=\(0, 0, 2, 1\)"),
        (dict(has_msa=[0, 0, 1, 1], local_ws=(0, 2, 2, 1)), r"does not agree with local_ws=\(0, 2, 2, 1\)"),
    ],
)
def test_the_releases_keys_at_other_values(old, words):
    with pytest.raises(UserError, match=words):
        LITv2Backbone(**BACKBONE, **old)


def pretrained(path, **kwargs) -> LITv2Backbone:
    backbone = LITv2Backbone(**{**BACKBONE, **kwargs}, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    backbone.init_weights()
    return backbone


def test_weights_of_the_releases_classifier():
    backbone = pretrained(shared("golden/classification_format.pth"))
    expected = tiny_backbone()
    for name, value in backbone.state_dict().items():
        if name.startswith("norm"):  # the classifier has none of these
            assert torch.equal(value, torch.ones_like(value) if name.endswith("weight") else torch.zeros_like(value))
        elif value.is_floating_point():  # not the count of batches
            assert torch.equal(value, expected.state_dict()[name]), name


def test_weights_of_the_releases_detector():
    path = shared("golden/detection_format.pth")
    backbone = pretrained(path, out_norms=(1, 2, 3))
    in_file = torch.load(path, weights_only=True)["state_dict"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, in_file[f"backbone.{name}"]), name


def test_weights_of_ours(tmp_path):
    torch.save(dict(model=LITv2(**TINY).state_dict(), ema=tiny_model().state_dict()), tmp_path / "ours.pth")
    backbone = pretrained(tmp_path / "ours.pth")
    assert torch.equal(backbone.patch_embed.proj.weight, tiny_model().patch_embed.proj.weight)


def test_weights_by_a_name_of_the_zoo(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(dict(model=tiny_model().state_dict()), tmp_path / "hub/checkpoints/litv2_s.pth")
    backbone = pretrained("litv2_small")
    assert torch.equal(backbone.patch_embed.proj.weight, tiny_model().patch_embed.proj.weight)
    with pytest.raises(FileNotFoundError, match="litv2_smal.*litv2_small"):
        pretrained("litv2_smal")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("layers.0.blocks.0.norm2.weight"),
        lambda weights: weights.update({"layers.9.weight": torch.zeros(1)}),
        lambda weights: weights.update({"patch_embed.proj.bias": torch.zeros(3)}),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_other_weights_are_an_error(tmp_path, change):
    weights = tiny_model().state_dict()
    change(weights)
    torch.save(weights, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="another variant"):
        pretrained(tmp_path / "other.pth")


def test_missing_and_hostile_files(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        pretrained(tmp_path / "nowhere.pth")
    torch.save(dict(state_dict=Hostile()), tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        pretrained(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()


def test_without_openmmlab_the_error_says_what_to_do():
    """Each module of the folder says so, as an ImportError; classification goes on without it."""
    modules = ["litv2.mm_backbone", *(f"litv2.openmmlab.{path.stem}" for path in (ROOT / "litv2/openmmlab").glob("[a-z]*.py"))]
    code = f"""
import sys
from importlib import import_module
sys.modules["mmengine"] = None
import litv2, hilo
for module in {modules}:
    try:
        import_module(module)
    except ImportError as error:
        print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = "MissingPackage detection and segmentation need OpenMMLab's packages, but mmengine is not installed; run `make mm`"
    assert len(modules) > 8 and done.stdout.splitlines() == [expected] * len(modules)
