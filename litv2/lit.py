# SPDX-License-Identifier: Apache-2.0
"""LIT, the predecessor of LITv2: "Less is More: Pay Less Attention in Vision Transformers" (arXiv 2105.14217).

Its blocks are those of LITv2 with a feed-forward network without convolution, and with plain self-attention with learned relative
positions instead of HiLo: also only in the last two stages. The tables of positions are for images of 224 x 224 pixels; other sizes,
known only when the model runs, have theirs interpolated (:class:`litv2.attentions.RelativeSelfAttention`).
"""

from __future__ import annotations

from .model import LITv2, litv2_base, litv2_medium, litv2_small

__all__ = ["lit_base", "lit_medium", "lit_small"]

LIT = dict(attention="relative-msa", conv_ffn=False)


def lit_small(**kwargs) -> LITv2:
    """LIT-S: 28.0 M parameters, 4.1 GFLOPs. Keyword arguments go to :class:`LITv2`."""
    return litv2_small(**{**LIT, **kwargs})


def lit_medium(**kwargs) -> LITv2:
    """LIT-M: 49.4 M parameters, 8.6 GFLOPs. Keyword arguments go to :class:`LITv2`."""
    return litv2_medium(**{**LIT, **kwargs})


def lit_base(**kwargs) -> LITv2:
    """LIT-B: 87.3 M parameters, 15.0 GFLOPs. Keyword arguments go to :class:`LITv2`."""
    return litv2_base(**{**LIT, **kwargs})
