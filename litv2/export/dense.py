# SPDX-License-Identifier: Apache-2.0
"""Builds detectors and segmenters for export from their configurations; tracing them needs mmdet or mmseg.

The exported graphs take images as the configuration's data preprocessor returns them: normalised RGB.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..configurations import config_of
from ..errors import UserError
from ..inference.fused import fuse
from ..weights.download import fetch
from ..weights.releases import ZOO
from .networks import pyramid
from .settings import Network

__all__ = ["from_config", "network_of"]


def from_config(name: str, checkpoint: str | None, backbone: bool) -> tuple[Network, tuple[int, int]]:
    """Returns the network of a configuration (a path or a zoo name) and its published image size.

    Args:
        checkpoint: a file, a URL or a zoo name; None for the published weights.
        backbone: export only the feature maps of the backbone.

    Raises:
        MissingPackage: OpenMMLab's packages are not installed.
        UserError: the model cannot be exported, or the weights do not fit.
    """
    from ..openmmlab.build import build_model
    from ..openmmlab.config import load_config

    path = name if name.endswith(".py") else config_of(name)
    stem = Path(path).stem
    if checkpoint is None and stem not in ZOO:
        raise UserError(f"{path} has no published weights; pass others with --checkpoint")
    model = build_model(load_config(path), str(fetch(checkpoint or stem)))
    height, width = ZOO[stem].image_size if stem in ZOO else (512, 512)
    return (pyramid(model.backbone) if backbone else network_of(model)), (height - height % 32, width - width % 32)


def network_of(model: Any) -> Network:
    """Returns the part of an mmdet or mmseg model that can be exported.

    A segmenter gives ``logits`` (B, classes, H, W), scaled to the image; a one-stage detector the raw ``class{i}``
    (B, anchors * classes, h, w) and ``box{i}`` (B, anchors * 4, h, w) of each level, before boxes are decoded.

    Raises:
        UserError: a two-stage detector, whose second stage depends on the boxes of the first.
    """
    module: type[nn.Module]
    outputs: tuple[str, ...]
    classes: tuple[str, ...]
    if hasattr(model, "decode_head"):
        module, outputs, classes = _Segmenter, ("logits",), ("logits",)
    elif hasattr(model, "bbox_head"):
        levels = range(len(model.bbox_head.prior_generator.strides))
        outputs = (*(f"class{i}" for i in levels), *(f"box{i}" for i in levels))
        module, classes = _OneStage, ()
    else:
        raise UserError(f"export: a {type(model).__name__} cannot be exported as one graph; its backbone can, with --backbone")
    inference = copy.deepcopy(model)
    inference.backbone = fuse(model.backbone)
    for parent in list(inference.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "Upsample" and not isinstance(child, nn.Upsample):
                # mmseg's own computes its size with int(), which tracing would turn into a constant.
                parent.add_module(name, nn.Upsample(scale_factor=child.scale_factor, mode=child.mode, align_corners=child.align_corners))
    return Network(module(inference), module(model), outputs, model.backbone.in_chans, 32, classes)


class _Segmenter(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.neck, self.decode_head = model.backbone, model.neck, model.decode_head

    def forward(self, images: Tensor) -> Tensor:
        logits = self.decode_head(self.neck(self.backbone(images)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=self.decode_head.align_corners)


class _OneStage(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.neck, self.bbox_head = model.backbone, model.neck, model.bbox_head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        classes, boxes = self.bbox_head(self.neck(self.backbone(images)))
        return (*classes, *boxes)
