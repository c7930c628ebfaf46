# SPDX-License-Identifier: Apache-2.0
"""The model that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable

from yacs.config import CfgNode

from data.transforms import scaled_side
from litv2 import LITv2
from litv2.errors import UserError

Build = Callable[[CfgNode, int], LITv2]  # configuration and number of classes -> model with random weights


def build_model(config: CfgNode, num_classes: int) -> LITv2:
    """Builds a LITv2 with random weights.

    Raises:
        UserError: the values of MODEL are inconsistent, or the images are too small for the model.
    """
    lit = config.MODEL.LIT
    try:
        model = LITv2(
            in_chans=lit.IN_CHANS,
            num_classes=num_classes,
            patch_size=lit.PATCH_SIZE,
            embed_dim=lit.EMBED_DIM,
            depths=tuple(lit.DEPTHS),
            num_heads=tuple(lit.NUM_HEADS),
            mlp_ratio=lit.MLP_RATIO,
            qkv_bias=lit.QKV_BIAS,
            local_ws=tuple(lit.LOCAL_WS),
            alpha=lit.ALPHA,
            attention=lit.ATTENTION,
            conv_ffn=lit.CONV_FFN,
            drop_rate=config.MODEL.DROP_RATE,
            drop_path_rate=config.MODEL.DROP_PATH_RATE,
        )
    except ValueError as error:
        raise UserError(f"the section MODEL of the configuration is invalid: {error}") from error
    smallest = model.feature_info[-1]["reduction"]
    sides = {
        "DATA.IMG_SIZE": config.DATA.IMG_SIZE,
        "TEST.IMG_SIZE": config.TEST.IMG_SIZE or smallest,
        "the side at the smallest of TEST.VIEWS.SCALES": scaled_side(config, min(config.TEST.VIEWS.SCALES)),
    }
    for key, side in sides.items():
        if side < smallest:
            raise UserError(f"{key}={side} is too small for this model: each side must be at least {smallest} pixels")
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model
