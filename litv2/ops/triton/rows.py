# SPDX-License-Identifier: Apache-2.0
"""Maps as rows of channels, which is how kernels read them."""

from torch import Tensor


def cells_as_rows(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * H * W, C): a view where rows of the map lie one after the other, as in a part of a product's columns."""
    x = x.flatten(0, 2)
    return x if x.stride(1) == 1 else x.contiguous()
