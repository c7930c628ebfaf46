# SPDX-License-Identifier: Apache-2.0
"""The operator ``block``: a whole block of the network, (B, H, W, dim) -> (B, H, W, dim). ``Block.forward`` is its reference.

    class Block(nn.Module):
        @ops.block(parts=(HiLo, Mlp))
        def forward(self, x): ...       # written as in the paper; another backend may compute it
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mm_modules.dispatch import Backend, Operator

from . import bfloat16, native

if TYPE_CHECKING:
    from ...layers import Block

    Forward = Callable[[Block, Tensor], Tensor]

__all__ = ["block"]


def block(parts: tuple[type[nn.Module], ...]) -> Callable[[Forward], Forward]:
    """Makes a ``forward`` the reference of the operator ``block``, whose arguments are the module and x.

    Args:
        parts: the classes that the block consists of, besides torch's own. A block with any other submodule, such as a replaced one,
            is computed by its own ``forward``.
    """

    def decorate(forward: Forward) -> Forward:
        operator = Operator("block", [native.backend(parts), bfloat16.backend(forward), Backend("torch", forward)])

        @wraps(forward)
        def chosen(self: Block, x: Tensor) -> Tensor:
            return operator(self, x)

        return chosen

    return decorate
