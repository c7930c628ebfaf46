# SPDX-License-Identifier: Apache-2.0
"""The operator ``hilo_attention``: both branches of HiLo between their projections, Hi-Fi's channels before Lo-Fi's.

Its arguments are

* ``qkv``, ``pad``: of Hi-Fi, as ``window_attention`` takes them, (B, H, W, 3 * h_heads * D) and (3 * h_heads * D,);
* ``q``, ``kv``: of Lo-Fi, as ``pooled_attention`` takes them, (B, H, W, l_heads * D) and (B, h, w, 2 * l_heads * D);
* ``window_size``, ``h_heads``, ``l_heads``, and ``scale``, of the logits.

It returns (B, H, W, (h_heads + l_heads) * D). In :mod:`litv2.inference.fused` it is part of HiLo.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["hilo_attention"]

hilo_attention = Operator("hilo_attention", [triton.BACKEND, reference.BACKEND])
