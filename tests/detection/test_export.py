# SPDX-License-Identifier: Apache-2.0
"""Segmenters whole, one-stage detectors up to their raw heads, two-stage detectors' backbones: exported and run in onnxruntime."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxruntime")

from command_helpers import put_download, run_here
from document_helpers import documented
from helpers import ROOT, fill, max_difference, normal
from litv2.__main__ import main
from litv2.export import Settings, export, load
from litv2.export.dense import network_of
from litv2.openmmlab.build import build_model
from litv2.openmmlab.config import load_config

pytestmark = pytest.mark.extra

TINY_BACKBONE = {
    "model.backbone.embed_dim": 32,
    "model.backbone.depths": (1, 1, 1, 1),
    "model.backbone.num_heads": (1, 2, 4, 8),
    "model.backbone.init_cfg": None,
    "model.neck.in_channels": [32, 64, 128, 256],
}
SEGMENTER = "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"
DETECTOR = "detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py"
TWO_STAGES = "detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py"


def tiny(config: str) -> torch.nn.Module:
    return fill(build_model(load_config(ROOT / config, TINY_BACKBONE)))


@torch.no_grad()
def test_whole_segmenter(tmp_path):
    model = tiny(SEGMENTER)
    export(network_of(model), "onnx", tmp_path / "segmenter.onnx", Settings((96, 128)))
    images = normal(0, 3, 3, 65, 107)
    (logits,) = load("onnx", tmp_path / "segmenter.onnx")(images)
    exact = model.encode_decode(images, [dict(img_shape=images.shape[2:])])
    assert logits.shape == (3, 150, 65, 107) and max_difference(logits, exact) < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("command", documented("docs/deployment.md", r"python -m litv2 export litv2_s_fpn_\S+ --format onnx"), ids=str)
def test_documented_export_of_a_segmenter(command, tmp_path, monkeypatch, capsys):
    """Of random weights where a download would put the published ones, and of smaller images of one size."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = build_model(load_config(ROOT / SEGMENTER, {"model.backbone.init_cfg": None}))
    put_download(tmp_path, f"{command.words[4]}.pth", dict(meta={}, state_dict=model.state_dict()))
    run_here(monkeypatch, command, "--img-size", 64, "--dynamic", "--out", tmp_path / "segmenter.onnx")
    assert f"written to {tmp_path / 'segmenter.onnx'}" in capsys.readouterr().out
    (logits,) = load("onnx", tmp_path / "segmenter.onnx")(normal(0, 1, 3, 64, 64))
    assert logits.shape == (1, 150, 64, 64)


@torch.no_grad()
def test_raw_heads_of_a_detector(tmp_path):
    model = tiny(DETECTOR)
    export(network_of(model), "onnx-standard", tmp_path / "detector.onnx", Settings((96, 128), dynamic=("batch",)))
    images = normal(0, 3, 3, 96, 128)
    results = load("onnx-standard", tmp_path / "detector.onnx")(images)
    classes, boxes = model._forward(images)
    for ours, theirs in zip(results, (*classes, *boxes), strict=True):
        assert max_difference(ours, theirs) < 1e-4 * max(1, theirs.abs().max())


def test_a_second_stage_is_an_error_and_its_backbone_is_not(tmp_path, monkeypatch, capsys):
    model = tiny(TWO_STAGES)
    with pytest.raises(ValueError, match="MaskRCNN cannot be exported as one graph; its backbone can, with --backbone"):
        network_of(model)

    monkeypatch.chdir(tmp_path)
    config = tmp_path / "mine.py"
    changes = "\n".join(f"model.{name.split('.', 1)[1]} = {value!r}" for name, value in TINY_BACKBONE.items())
    config.write_text(f"_base_ = {str(ROOT / TWO_STAGES)!r}\nmodel = _base_.model\n{changes}\n")
    torch.save({"state_dict": model.state_dict(), "meta": {}}, "mine.pth")
    arguments = ["export", "mine.py", "--checkpoint", "mine.pth", "--format", "onnx", "--img-size", "64", "96", "--dynamic"]
    assert main([*arguments, "--backbone"]) == 0
    printed = capsys.readouterr().out
    assert "stride4" in printed and "stride32" in printed and "written to mine_backbone.onnx" in printed
    images = normal(0, 1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(load("onnx", "mine_backbone.onnx")(images), model.backbone(images), strict=True):
            assert max_difference(ours, theirs) < 1e-4 * max(1, theirs.abs().max())
    assert main(arguments) == 2 and "--backbone" in capsys.readouterr().err
    assert main(["export", "mine.py", "--format", "onnx"]) == 2 and "no published weights" in capsys.readouterr().err
