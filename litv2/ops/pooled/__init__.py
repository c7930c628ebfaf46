# SPDX-License-Identifier: Apache-2.0
"""The operator ``pooled_attention``: attention of all cells of a map to those of a pooled one, HiLo's Lo-Fi between its projections.

Its arguments are

* ``q``: queries of all heads, (B, H, W, heads * D);
* ``kv``: keys and values of the pooled map, (B, h, w, 2 * heads * D);
* ``heads``, and ``scale``, of the logits.

It returns (B, H, W, heads * D). In :mod:`litv2.inference.fused` it is part of HiLo.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["pooled_attention"]

pooled_attention = Operator("pooled_attention", [triton.BACKEND, reference.BACKEND])
