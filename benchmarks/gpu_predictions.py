# SPDX-License-Identifier: Apache-2.0
"""What LITv2 and its rivals were expected to take on a GPU before any of it was timed: estimates, to be compared with gpu.py's figures."""

from __future__ import annotations

REACHED = 0.85  # of the bound (roofline.py), by eager models: timm's published figures of an RTX 3090 with autocast give 0.80 to 0.93

# Milliseconds on an H100 at 224 x 224, by model, mode, dtype and batch.
ON_H100 = {
    ("LITv2-S", "eager", "float16", 64): 3.6,
    ("LITv2-S", "compiled", "float16", 64): 2.2,  # 80 % of the bound that is left with the depthwise part as one kernel
    ("LITv2-S", "eager", "float16", 1): 2.2,  # 210 launches, each after about 10 us of Python
    ("LITv2-S", "graph", "float16", 1): 0.55,  # the same launches at 2.5 us each
}


def predicted_ms(model: str, mode: str, dtype: str, batch: int, bound_ms: float | None) -> float | None:
    """Returns the estimate for an H100; where there is none, that for an eager model of a large batch, from its bound on this GPU."""
    if (model, mode, dtype, batch) in ON_H100:
        return ON_H100[model, mode, dtype, batch]
    return round(bound_ms / REACHED, 3) if bound_ms and mode == "eager" and batch > 1 else None
