# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: a classifier's mean probabilities over several views of each image.

The views are crops, at several sizes of the image, and their mirror images. Probabilities are averaged, not logits, as in AlexNet (its
ten crops are five crops with mirror images) and VGG (arXiv 1409.1556, section 3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import FiveCrop
from yacs.config import CfgNode

from data.transforms import evaluation_steps, scaled_side
from engine import logits_of
from precision import Precision

__all__ = ["MeanPrediction", "Views", "count_views"]


def count_views(config: CfgNode) -> int:
    """The number of views of each image that TEST.VIEWS asks for; 1 is the plain evaluation, if the size is not scaled."""
    views = config.TEST.VIEWS
    return views.CROPS * len(views.SCALES) * (2 if views.FLIP else 1)


class Views:
    """Transform of an evaluation: PIL image -> for each of TEST.VIEWS.SCALES a tensor (crops, C, side, side), normalised.

    The image itself is resized for each scale. One crop is the centre; five are the corners, in reading order, and the centre.
    """

    def __init__(self, config: CfgNode):
        self.crops = config.TEST.VIEWS.CROPS
        self.sizes = [(scaled_side(config, scale), evaluation_steps(config, scale)) for scale in config.TEST.VIEWS.SCALES]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        views = []
        for side, steps in self.sizes:
            resize, centre, *finish = steps.transforms
            resized = resize(image)
            crops = FiveCrop(side)(resized) if self.crops == 5 else [centre(resized)]
            for step in finish:
                crops = [step(crop) for crop in crops]
            views.append(torch.stack(list(crops)))
        return views


class MeanPrediction:
    """``predict`` of ``engine.evaluate`` for batches of ``Views``, with each view's mirror image too if ``flip``.

    It returns the logarithm of the mean probabilities (B, classes): logits whose softmax are these.
    """

    def __init__(self, flip: bool):
        self.flip = flip

    def __call__(self, model: nn.Module, images: Any, precision: Precision) -> Tensor:
        views = [view for size in images for view in size.unbind(dim=1)]
        if self.flip:
            views += [view.flip(-1) for view in views]
        logs = torch.stack([logits_of(model, view, precision).log_softmax(dim=1) for view in views])
        return logs.logsumexp(dim=0) - math.log(len(views))
