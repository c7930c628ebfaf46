# SPDX-License-Identifier: Apache-2.0
"""The three segmentation configurations: what they build, not what they say, against the paper's recipe and tables."""

from __future__ import annotations

import pytest

from litv2.openmmlab.build import build_model
from litv2.openmmlab.config import load_config
from litv2.openmmlab.flops import count_flops
from litv2.weights.releases import ZOO
from mm_helpers import VARIANTS, as_published, backbone_settings, config_files, learning_rates, parameter_groups

pytestmark = pytest.mark.extra


def test_the_three_names():
    assert [path.stem for path in config_files("segmentation")] == [f"litv2_{v}_fpn_r50_512x512_80k_ade20k" for v in "bms"]


@pytest.mark.parametrize("path", config_files("segmentation"), ids=lambda path: path.stem)
def test_config(path):
    config = load_config(path)
    released = config.model.backbone.pop("init_cfg")
    norm_types = {config.model.decode_head.norm_cfg.type}
    model = build_model(config)
    variant = path.stem[6]

    # the published size and cost
    parameters, gflops = ZOO[path.stem].parameters, ZOO[path.stem].gflops
    count = count_flops(model, 512, 512)
    assert as_published(sum(p.numel() for p in model.parameters()) / 1e6, parameters) == parameters
    assert as_published(count["published"] / 1e9, gflops) == gflops

    # the model
    assert backbone_settings(model) == VARIANTS[variant] | dict(
        windows=[0, 0, 2, 1], alpha={0.9}, norms=[0, 1, 2, 3], checkpointing={False}
    )
    assert released["type"] == "Pretrained" and ZOO[released["checkpoint"]].file == f"litv2_{variant}.pth"
    head = model.decode_head
    assert model.neck.out_channels == 256 and model.neck.num_outs == 4
    assert (head.channels, head.num_classes, head.dropout_ratio, norm_types) == (128, 150, 0.1, {"SyncBN"})
    assert model.test_cfg.mode == "whole" and not model.with_auxiliary_head
    assert model.data_preprocessor.size == (512, 512) and model.data_preprocessor.seg_pad_val == 255
    assert model.data_preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])

    # the optimizer
    assert config.optim_wrapper.type == "OptimWrapper" and config.optim_wrapper.get("clip_grad") is None
    groups = parameter_groups(config, model)
    assert groups.keys() == dict(model.named_parameters()).keys() and set(groups.values()) == {(1e-4, 1e-4)}

    # the schedule: 80k updates, total batch 16, poly decay to 1e-6
    assert config.train_cfg.max_iters == 80000 and config.train_dataloader.batch_size * 4 == 16
    assert config.auto_scale_lr.base_batch_size == 16
    rates = learning_rates(config, epoch_length=10**6, updates=[0, 1000, 3000])
    assert rates == pytest.approx([1e-6 + (1e-4 - 1e-6) * (1 - update / 80000) ** 0.9 for update in (0, 1000, 3000)], rel=1e-6)

    # the data
    train, val = config.train_dataloader.dataset, config.val_dataloader.dataset
    steps = {step["type"]: step for step in train.pipeline}
    order = ["LoadImageFromFile", "LoadAnnotations", "RandomResize", "RandomCrop", "RandomFlip", "PhotoMetricDistortion", "PackSegInputs"]
    assert list(steps) == order and train.type == val.type == "ADE20KDataset"
    assert steps["LoadAnnotations"]["reduce_zero_label"]
    assert steps["RandomResize"]["scale"] == (2048, 512) and steps["RandomResize"]["ratio_range"] == (0.5, 2.0)
    assert steps["RandomCrop"]["crop_size"] == (512, 512) and steps["RandomCrop"]["cat_max_ratio"] == 0.75
    assert steps["RandomFlip"]["prob"] == 0.5
    assert [step["scale"] for step in val.pipeline if step["type"] == "Resize"] == [(2048, 512)]
