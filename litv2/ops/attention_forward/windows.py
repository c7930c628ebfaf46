# SPDX-License-Identifier: Apache-2.0
"""``attention`` of a HiLo whose windows the operator ``window_attention`` computes in a kernel, also in training.

HiLo itself, which other projects copy as one file, knows torch alone. Its windows are copied there before and after attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mm_modules.dispatch import Backend
from mm_modules.torch_state import has_global_hooks, has_hooks

from ..folding import is_plain, weight_and_bias
from ..windows import triton, window_attention

if TYPE_CHECKING:
    from hilo import HiLo


def why_not(x: Tensor, attn: Any) -> str | None:
    if not is_plain(attn):
        return "it knows HiLo as in the paper alone: square windows, pooling of their size, padding like any other cell"
    if not attn.h_heads:
        return "no head attends in windows"
    if has_global_hooks() or has_hooks(attn) or has_hooks(attn.h_qkv):
        return "the attention or its projection of windows has hooks"
    if type(attn.h_qkv) is not nn.Linear:
        return f"the projection of windows is a {type(attn.h_qkv).__name__}"  # of which it cannot tell what padding becomes
    if attn.training and attn.attn_drop:
        return "weights of the attention are dropped"
    return None


def why_rather_not(x: Tensor, attn: HiLo) -> str | None:
    return triton.why_not_heads(x, attn.head_dim, attn.window[0], attn.h_heads) or triton.why_rather_not()


def attention(x: Tensor, attn: HiLo) -> Tensor:
    _, bias = weight_and_bias(attn.h_qkv)  # what the projection makes of padding
    hifi = attn.h_proj(window_attention(attn.h_qkv(x), bias, attn.window[0], attn.h_heads, attn.scale))
    if not attn.l_heads:
        return attn.proj_drop(hifi)
    tokens = attn._tokens("x", x, None, None)
    lofi, _ = attn._lofi(tokens, tokens, tokens, None, need_weights=False)
    return attn.proj_drop(torch.cat((hifi, lofi.unflatten(1, x.shape[1:3])), dim=-1))


BACKEND = Backend("windows", attention, why_not, why_rather_not)
