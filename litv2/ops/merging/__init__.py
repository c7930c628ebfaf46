# SPDX-License-Identifier: Apache-2.0
"""The operator ``token_merging``: (B, H, W, dim) -> (B, H // 2, W // 2, out_dim). Its arguments are x and the module."""

from mm_modules.dispatch import Operator

from . import compiled, reference, triton

__all__ = ["token_merging"]

token_merging = Operator("token_merging", [compiled.BACKEND, triton.BACKEND, reference.BACKEND])
