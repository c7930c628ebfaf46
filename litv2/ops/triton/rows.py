# SPDX-License-Identifier: Apache-2.0
"""Maps as rows of channels, which is how kernels read them."""

from torch import Tensor

SMALLEST = 16  # block that tensor cores take


def cells_as_rows(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * H * W, C): a view where rows of the map lie one after the other, as in a part of a product's columns."""
    x = x.flatten(0, 2)
    return x if x.stride(1) == 1 else x.contiguous()


def blocks(channels: int) -> tuple[int, int]:
    """The sizes of one or two blocks, powers of two, that hold so many channels: 64 + 32 of 96. The second is 0 where one is enough."""
    first = 1 << (channels.bit_length() - 1)
    rest = channels - first
    return max(SMALLEST, first), 0 if channels <= max(SMALLEST, first) else max(SMALLEST, 1 << (rest - 1).bit_length())
