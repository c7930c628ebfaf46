# SPDX-License-Identifier: Apache-2.0
"""The operator ``window_attention``: attention inside square windows of a map, HiLo's Hi-Fi between its projections.

Its arguments are

* ``qkv``: queries, keys and values of all heads, (B, H, W, 3 * heads * D);
* ``pad``: those of the cells that complete the windows on the right and at the bottom, (3 * heads * D,): the projection's bias;
* ``window_size``, ``heads``, and ``scale``, of the logits.

It returns (B, H, W, heads * D). In :mod:`litv2.ops.attention_forward` and :mod:`litv2.inference.fused` it is part of HiLo.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["window_attention"]

window_attention = Operator("window_attention", [triton.BACKEND, reference.BACKEND])
