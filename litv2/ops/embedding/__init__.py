# SPDX-License-Identifier: Apache-2.0
"""The operator ``patch_embed``: images (B, in_chans, H, W) -> normalised tokens (B, ceil(H / patch), ceil(W / patch), dim).

Its arguments are x and the module.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["patch_embed"]

patch_embed = Operator("patch_embed", [triton.BACKEND, reference.BACKEND])
