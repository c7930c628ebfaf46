# SPDX-License-Identifier: Apache-2.0
"""Training augmentation and evaluation preprocessing with timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from timm.data import create_transform
from torchvision.transforms import Compose
from yacs.config import CfgNode

from litv2.errors import UserError
from litv2.preprocess import evaluation_transform, normalisation


def build_transform(config: CfgNode, training: bool) -> Callable:
    """Returns a function: PIL image -> normalised tensor (IN_CHANS, size, size).

    Raises:
        UserError: timm does not know the policy AUTO_AUGMENT.
    """
    channels, interpolation = config.MODEL.LIT.IN_CHANS, config.DATA.INTERPOLATION
    if training:
        aug = config.AUG
        mean, std = normalisation(channels)
        try:
            return create_transform(
                config.DATA.IMG_SIZE,
                is_training=True,
                scale=tuple(aug.SCALE),
                ratio=tuple(aug.RATIO),
                hflip=aug.HFLIP,
                color_jitter=aug.COLOR_JITTER or None,  # type: ignore[arg-type] # timm accepts None for no jitter
                auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
                re_prob=aug.REPROB,
                re_mode=aug.REMODE,
                re_count=aug.RECOUNT,
                mean=mean,
                std=std,
                interpolation=interpolation,
            )
        except AssertionError as error:  # timm's error for an invalid policy
            raise UserError(f"AUG.AUTO_AUGMENT={aug.AUTO_AUGMENT!r} is not a timm policy: {error}") from error
    return evaluation_steps(config)


def evaluation_steps(config: CfgNode, scale: float = 1.0) -> Compose:
    """The preprocessing of evaluations, its image side times ``scale``: resize, crop, convert to a tensor, normalise."""
    side, interpolation = scaled_side(config, scale), config.DATA.INTERPOLATION
    how = "bicubic" if interpolation == "random" else interpolation
    return cast(Compose, evaluation_transform(side, config.TEST.CROP, config.MODEL.LIT.IN_CHANS, how))


def scaled_side(config: CfgNode, scale: float = 1.0) -> int:
    """The side of evaluation images in pixels."""
    return round(scale * (config.TEST.IMG_SIZE or config.DATA.IMG_SIZE))


def denormalise(images: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """Maps normalised images (B, C, H, W) back to [0, 1] for display."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation(config.MODEL.LIT.IN_CHANS))
    return (images.cpu() * std + mean).clamp(0, 1)
