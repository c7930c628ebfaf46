# SPDX-License-Identifier: Apache-2.0
"""``patch_embed`` by its modules. The convolution's result is channels-last: tokens are a view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_modules.dispatch import Backend

from ..padding import pad_to_multiple

if TYPE_CHECKING:
    from ...layers import PatchEmbed


def patch_embed(x: Tensor, embed: PatchEmbed) -> Tensor:
    x = pad_to_multiple(x, embed.patch_size)
    return embed.norm(embed.proj(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))


BACKEND = Backend("torch", patch_embed)
