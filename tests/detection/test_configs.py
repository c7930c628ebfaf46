# SPDX-License-Identifier: Apache-2.0
"""The twelve detection configurations: what they build, not what they say, against the paper's recipe and tables."""

from __future__ import annotations

import pytest

from helpers import ROOT
from litv2.openmmlab.build import build_model
from litv2.openmmlab.config import load_config
from litv2.openmmlab.flops import count_flops
from litv2.weights.releases import ZOO
from mm_helpers import VARIANTS, as_published, backbone_settings, config_files, learning_rates, parameter_groups, run_tool

pytestmark = pytest.mark.extra


def test_the_twelve_names():
    assert {path.stem for path in config_files("detection")} == {entry.config for entry in ZOO.values() if entry.task == "detection"}


@pytest.mark.parametrize("path", config_files("detection"), ids=lambda path: path.stem)
def test_config(path):
    config = load_config(path)
    released = config.model.backbone.pop("init_cfg")
    model = build_model(config)
    detector, variant = ("retinanet", path.stem[16]) if "retinanet" in path.stem else ("mask_rcnn", path.stem[16])

    # the published size and cost
    parameters, gflops = ZOO[path.stem].parameters, ZOO[path.stem].gflops
    count = count_flops(model, 800, 1280)
    counted = count["published"]
    if path.stem == "mask_rcnn_litv2_m_fpn_1x_coco_ws_4":  # the one published number that forgot attention's products
        counted -= count["products"]
    assert as_published(sum(p.numel() for p in model.parameters()) / 1e6, parameters) == parameters
    assert as_published(counted / 1e9, gflops) == gflops
    assert count["full"] - count["published"] == pytest.approx({"b": 6.30e9}.get(variant, 3.54e9), rel=0.01)

    # the model
    assert backbone_settings(model) == VARIANTS[variant] | dict(
        windows=[0, 0, 4, 1] if path.stem.endswith("ws_4") else [0, 0, 2, 1], alpha={0.9}, norms=[1, 2, 3], checkpointing={variant == "b"}
    )
    assert released["type"] == "Pretrained" and ZOO[released["checkpoint"]].file == f"litv2_{variant}.pth"
    neck, preprocessor = model.neck, model.data_preprocessor
    if detector == "retinanet":
        assert (neck.start_level, neck.add_extra_convs, neck.num_outs) == (1, "on_input", 5)
        assert model.bbox_head.num_classes == 80
    else:
        assert (neck.start_level, neck.add_extra_convs, neck.num_outs) == (0, False, 5)
        assert model.roi_head.bbox_head.num_classes == model.roi_head.mask_head.num_classes == 80
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert preprocessor.pad_size_divisor == 32 and preprocessor._channel_conversion

    # the optimizer
    assert config.optim_wrapper.type == "AmpOptimWrapper" and config.optim_wrapper.get("clip_grad") is None
    lr = 1e-4 if detector == "retinanet" else 2e-4
    groups = parameter_groups(config, model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, group in groups.items():
        assert group == (lr, 0.0 if "norm" in name else 1e-4), name
    assert sum(decay == 0 for _, decay in groups.values()) > 20

    # the schedule: 12 epochs, total batch 16, warm-up of 500 updates from a thousandth, a tenth from epochs 8 and 11 on
    assert config.train_cfg.max_epochs == 12 and config.train_dataloader.batch_size * 8 == 16
    rates = learning_rates(config, epoch_length=600, updates=[0, 250, 500, 8 * 600 - 1, 8 * 600, 11 * 600 - 1, 11 * 600])
    assert rates == pytest.approx([lr * f for f in (0.001, 0.001 + 0.999 * 250 / 499, 1, 1, 0.1, 0.1, 0.01)])

    # the data
    train, val = config.train_dataloader.dataset, config.val_dataloader.dataset
    steps = {step["type"]: step for step in train.pipeline}
    assert list(steps) == ["LoadImageFromFile", "LoadAnnotations", "Resize", "RandomFlip", "PackDetInputs"]
    assert steps["Resize"]["scale"] == (1333, 800) and steps["Resize"]["keep_ratio"] and steps["RandomFlip"]["prob"] == 0.5
    assert steps["LoadAnnotations"].get("with_mask", False) == (detector == "mask_rcnn")
    assert [step["scale"] for step in val.pipeline if step["type"] == "Resize"] == [(1333, 800)]
    assert (train.type, train.ann_file, val.ann_file) == (
        "CocoDataset",
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
    )


def test_get_flops_prints_both_counts():
    printed = run_tool("detection", "tools/analysis_tools/get_flops.py", "configs/litv2/retinanet_litv2_s_fpn_1x_coco.py").stdout
    assert printed.splitlines()[-1].split()[:4] == ["retinanet_litv2_s_fpn_1x_coco", "38.01", "242.39", "245.94"]


def test_configs_are_short():
    """Deltas over the installed bases."""
    assert all(len(path.read_text().splitlines()) <= 30 for path in config_files("detection") + config_files("segmentation"))
    assert not (ROOT / "mmdet").exists() and not (ROOT / "mmseg").exists()
