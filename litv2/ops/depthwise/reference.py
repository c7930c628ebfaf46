# SPDX-License-Identifier: Apache-2.0
"""``depthwise_gelu`` by torch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm_modules.dispatch import Backend


def depthwise_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    # The permuted view is in the channels-last memory format, so nothing is copied. The convolution is called as a module, so that
    # its hooks run.
    return F.gelu(conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


BACKEND = Backend("torch", depthwise_gelu)
