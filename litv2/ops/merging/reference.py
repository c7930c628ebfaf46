# SPDX-License-Identifier: Apache-2.0
"""``token_merging`` by its modules. Views of (B, H, W, C) are (B, C, H, W) in the channels-last memory format: nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from mm_modules.dispatch import Backend

if TYPE_CHECKING:
    from ...layers import DeformableTokenMerging


def token_merging(x: Tensor, merging: DeformableTokenMerging) -> Tensor:
    return merging.act(merging.norm_layer(merging.dconv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


BACKEND = Backend("torch", token_merging)
