# SPDX-License-Identifier: Apache-2.0
"""Class weights and frozen stages, which the document says how to set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers import ROOT, generator, normal
from mm_helpers import tiny_dense_model

pytestmark = pytest.mark.extra

MASK_RCNN = ROOT / "detection/configs/litv2/mask_rcnn_litv2_s_fpn_1x_coco.py"


def test_class_weights_and_frozen_stages():
    """The loss of the classes is torch's, each proposal weighted by its class; the last class is the background."""
    weights = [1.0, 3.0, 0.5]
    options = {f"model.roi_head.{head}.num_classes": 2 for head in ("bbox_head", "mask_head")}
    options |= {"model.roi_head.bbox_head.loss_cls.class_weight": weights, "model.backbone.frozen_stages": 1}
    model = tiny_dense_model(MASK_RCNN, **options).train()
    scores, labels = normal(0, 50, 3), torch.from_numpy(generator(1).integers(0, 3, 50))
    rest = [torch.zeros(50, 5), labels, torch.ones(50), torch.zeros(50, 4), torch.zeros(50, 4)]
    loss = model.roi_head.bbox_head.loss(scores, torch.zeros(50, 8), *rest)["loss_cls"]
    torch.testing.assert_close(loss, F.cross_entropy(scores, labels, torch.tensor(weights), reduction="none").mean())
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    parts = ("backbone.patch_embed.", "backbone.layers.0.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(parts)}
