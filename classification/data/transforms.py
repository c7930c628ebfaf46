"""Training augmentation and evaluation preprocessing, by timm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from yacs.config import CfgNode


def build_transform(config: CfgNode, training: bool) -> Callable:
    """PIL image -> normalised tensor (IN_CHANS, size, size)."""
    mean, std = normalisation(config)
    common = dict(mean=mean, std=std, interpolation=config.DATA.INTERPOLATION)
    if training:
        aug = config.AUG
        return create_transform(
            config.DATA.IMG_SIZE,
            is_training=True,
            scale=tuple(aug.SCALE),
            ratio=tuple(aug.RATIO),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER or None,
            auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            **common,
        )
    if common["interpolation"] == "random":
        common["interpolation"] = "bicubic"
    size = config.TEST.IMG_SIZE or config.DATA.IMG_SIZE
    if config.TEST.CROP:
        return create_transform(size, crop_pct=224 / 256, **common)
    return create_transform(size, crop_pct=1.0, crop_mode="squash", **common)


def normalisation(config: CfgNode) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, ImageNet's; for grey images their average."""
    if config.MODEL.LIT.IN_CHANS == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)


def denormalise(images: torch.Tensor, config: CfgNode) -> torch.Tensor:
    """(B, C, H, W) as the model sees them -> the same in [0, 1], to be looked at."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation(config))
    return (images.cpu() * std + mean).clamp(0, 1)
