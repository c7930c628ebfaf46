# SPDX-License-Identifier: Apache-2.0
"""Class weights and frozen stages, which the document says how to set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from helpers import ROOT, generator, normal
from mm_helpers import tiny_dense_model

pytestmark = pytest.mark.extra

SEMANTIC_FPN = ROOT / "segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py"


def test_class_weights():
    """The loss is torch's weighted mean over the labelled pixels."""
    weights = [0.1, 1.0, 3.0]
    options = {"model.decode_head.num_classes": 3, "model.decode_head.loss_decode.class_weight": weights}
    model = tiny_dense_model(SEMANTIC_FPN, **options)
    labels = torch.from_numpy(generator(1).integers(0, 4, (2, 64, 80)))
    labels[labels == 3] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=each[None]), metainfo=dict(img_shape=(64, 80))) for each in labels]
    images = normal(0, 2, 3, 64, 80)
    with torch.no_grad():
        loss = model.loss(images, samples)["decode.loss_ce"]
        logits = model.encode_decode(images, [dict(img_shape=(64, 80))] * 2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, torch.tensor(weights), ignore_index=255))
    assert (loss - F.cross_entropy(logits, labels, ignore_index=255)).abs() > 1e-3


def test_frozen_stages():
    model = tiny_dense_model(SEMANTIC_FPN, **{"model.backbone.frozen_stages": 2, "model.backbone.norm_eval": True}).train()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parts = ("patch_embed", "layers.0", "layers.1", "norm0", "norm1")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"backbone.{part}." for part in parts))}
    assert model.training and not model.backbone.layers[2].downsample.norm_layer.training
