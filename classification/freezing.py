# SPDX-License-Identifier: Apache-2.0
"""Frozen stages: parts of the network that keep their weights, for the whole run or until their turn to be trained."""

from __future__ import annotations

from torch import nn
from yacs.config import CfgNode

from litv2 import LITv2


class Freezing:
    """What TRAIN.FREEZE and TRAIN.UNFREEZE_EVERY freeze in each epoch.

    Of N stages the first N are frozen, with their token mergings and the patch embedding; with "head" all stages and the final norm. Every
    UNFREEZE_EVERY epochs the last stage that is frozen joins the training, the final norm with the first of them.

    Frozen parts need no gradients and stay in evaluation mode: batch norm keeps its statistics, and nothing is dropped. An optimizer skips
    parameters without gradients, so that they do not decay either.
    """

    def __init__(self, config: CfgNode, model: LITv2):
        self.model = model
        self.head_only = config.TRAIN.FREEZE == "head"
        self.stages = len(model.stages) if self.head_only else int(config.TRAIN.FREEZE)
        self.every = config.TRAIN.UNFREEZE_EVERY
        self.frozen: list[nn.Module] = []

    def apply(self, epoch: int) -> bool:
        """Freezes what is frozen in this epoch, counted from 0, and nothing else; returns whether that differs from before."""
        unfrozen = epoch // self.every if self.every else 0
        stages = max(0, self.stages - unfrozen)
        frozen: list[nn.Module] = [self.model.patch_embed, *self.model.stages[:stages]] if stages else []
        if self.head_only and not unfrozen:
            frozen.append(self.model.norm)
        if frozen == self.frozen:
            return False
        self.frozen = frozen
        self.model.requires_grad_(True)
        for part in frozen:
            part.requires_grad_(False)
        return True

    def set_modes(self) -> None:
        """Puts the frozen parts into evaluation mode, which ``model.train()`` ends."""
        for part in self.frozen:
            part.eval()

    def __str__(self) -> str:
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        what = "nothing" if not self.frozen else f"the first {len(self.frozen) - 1} stages"
        if self.model.norm in self.frozen:
            what = "all but the head"
        return f"frozen: {what}; {trained:,} of {total:,} parameters are trained"
