# SPDX-License-Identifier: Apache-2.0
"""timm's mixup and cutmix, for batches of any size."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.mixup import one_hot
from torch import Tensor
from yacs.config import CfgNode


class AnyBatchMixup(Mixup):
    """timm's Mixup, which rejects odd batch sizes, extended to them: the last image is left unchanged."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W), modified in place, and class numbers (B,) or targets (B, num_classes) -> x and soft targets (B, num_classes)."""
        if len(x) % 2 == 0:
            return super().__call__(x, target)
        last = target[-1:]
        if not self.multi_label:
            off = self.label_smoothing / self.num_classes
            last = one_hot(last, self.num_classes, on_value=1.0 - self.label_smoothing + off, off_value=off)
        if len(x) == 1:
            return x, last
        mixed, soft = super().__call__(x[:-1], target[:-1])
        return torch.cat((mixed, x[-1:])), torch.cat((soft, last))


def build_mixup(config: CfgNode, num_classes: int, vectors: bool = False) -> AnyBatchMixup | None:
    """Returns None if both mixup and cutmix are off. ``vectors``: targets are (B, num_classes), and smoothed by the loss."""
    aug = config.AUG
    if aug.MIXUP == 0 and aug.CUTMIX == 0 and not aug.CUTMIX_MINMAX:
        return None
    return AnyBatchMixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX or None,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=0.0 if vectors else config.MODEL.LABEL_SMOOTHING,
        num_classes=num_classes,
        multi_label=vectors,
    )
