# SPDX-License-Identifier: Apache-2.0
"""The operator ``attention``: the attention of a block, (B, H, W, dim) -> (B, H, W, dim). Its arguments are x and the module."""

from mm_modules.dispatch import Operator

from . import reference, windows

__all__ = ["attention"]

attention = Operator("attention", [windows.BACKEND, reference.BACKEND])
