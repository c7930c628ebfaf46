# SPDX-License-Identifier: Apache-2.0
"""The operators of the network that have more than one backend: a folder per operator, a file per backend.

* ``patch_embed``: the patch embedding with its norm;
* ``depthwise_gelu``: the depthwise convolution of the feed-forward network with its GELU;
* ``block``: a whole block;
* ``attention``: its attention;
* ``window_attention``: that of Hi-Fi's windows, between HiLo's projections;
* ``pooled_attention``: Lo-Fi's, to the pooled map, also between them;
* ``hilo_attention``: both of them;
* ``pooled_linear``: Lo-Fi's keys and values of the map, which it pools;
* ``norm_linear``, ``linear_add``, ``linear_add_norm``: linear layers with the norm and the residual around them;
* ``token_merging``: the layer between stages;
* ``deform_conv2d``, in :mod:`mm_modules.DCN`: the deformable convolution of token merging.

:mod:`mm_modules.dispatch` chooses the backend. ``python -m litv2 env`` prints the choice for this machine and why the others were not
taken; ``LITV2_OPS`` forces one. To add a backend, write a file for it and add it to the list of its operator.
"""

from mm_modules.dispatch import OPERATORS, use

from .attention_forward import attention
from .block_forward import block
from .depthwise import depthwise_gelu
from .embedding import patch_embed
from .hilo_attention import hilo_attention
from .linear import linear_add, linear_add_norm, norm_linear
from .merging import token_merging
from .padding import pad_to_multiple, whole_windows
from .pooled import pooled_attention
from .pooled_linear import pooled_linear
from .windows import window_attention

__all__ = [
    "OPERATORS",
    "attention",
    "block",
    "depthwise_gelu",
    "hilo_attention",
    "linear_add",
    "linear_add_norm",
    "norm_linear",
    "pad_to_multiple",
    "patch_embed",
    "pooled_attention",
    "pooled_linear",
    "token_merging",
    "use",
    "whole_windows",
    "window_attention",
]
