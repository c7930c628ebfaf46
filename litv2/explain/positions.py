# SPDX-License-Identifier: Apache-2.0
"""Positions in an image and the cells of maps that they lie in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from ..model import LITv2
from .recording import check_images, evaluating

__all__ = ["Position", "cells_at", "positions", "strongest"]

Position = Sequence[float] | Tensor | None


def positions(network: LITv2, images: Tensor, at: Position) -> Tensor:
    """Returns one position per image, (B, 2): x and y in pixels from the corner, so that 0.5 is the middle of the first pixel.

    Args:
        images: (B, C, H, W), normalised.
        at: x and y, or one pair per image (B, 2); None for each image's strongest response.

    Raises:
        UserError: a position is outside of the images, or the network does not take them.
    """
    check_images(network, images)
    if at is None:
        return strongest(network, images)
    chosen, (H, W) = torch.as_tensor(at, dtype=torch.float32, device=images.device), images.shape[2:]
    if chosen.shape not in ((2,), (len(images), 2)):
        raise UserError(f"explain: expected a position x, y, or one for each of {len(images)} images, got shape {tuple(chosen.shape)}")
    chosen = chosen.expand(len(images), 2)
    if not bool(((chosen >= 0) & (chosen < chosen.new_tensor((W, H)))).all()):  # NaN is in no image either
        raise UserError(f"explain: position {chosen.tolist()} is outside of the images of {W} x {H} pixels")
    return chosen


def strongest(network: LITv2, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2): x and y of the middle of the cell of the last map that responds most.

    In a classifier it is the one that adds most to the logit of the predicted class; in a backbone the one with the longest vector.
    """
    with torch.no_grad(), evaluating(network):
        *_, tokens = network._run_stages(images)
        if network.num_classes:
            logits = network.head(network.norm(tokens))  # of which the classifier takes the mean over positions
            predicted = logits.mean((1, 2)).argmax(-1)
            response = logits[torch.arange(len(images)), :, :, predicted]
        else:
            response = tokens.norm(dim=-1)
    cell, columns = response.flatten(1).argmax(-1), tokens.shape[2]
    return (torch.stack((cell % columns, cell // columns), dim=-1) + 0.5) * network.feature_info[-1]["reduction"]


def cells_at(at: Tensor, stride: int, H: int, W: int) -> Tensor:
    """Positions (B, 2), x and y -> (B, 2): row and column of the cell of a map of H x W cells with this stride.

    Where a merging has left out an odd row or column, the last cell stands for what lies beyond it.
    """
    return torch.minimum((at.flip(-1) / stride).long(), at.new_tensor((H - 1, W - 1)).long())
