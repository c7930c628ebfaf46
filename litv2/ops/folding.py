# SPDX-License-Identifier: Apache-2.0
"""Folds weights into each other for inference: the same outputs, up to rounding, from fewer operations.

Modules of the model are accessed by their attributes only, so that nothing here imports it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from hilo import HiLo

if TYPE_CHECKING:
    from ..layers import DeformableTokenMerging
    from ..model import LITv2

__all__ = ["inference_copy", "is_plain", "merging_weights", "token_projections", "weight_and_bias"]

Rows = tuple[Tensor, ...]  # tensors of a linear layer with one row per output, such as its weight and bias


def inference_copy(model: LITv2) -> LITv2:
    """Returns a copy whose weights can be folded: in evaluation mode, without gradients and checkpointing."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_grad_checkpointing(False)
    return model


def is_plain(attn: nn.Module) -> bool:
    """Whether the attention is HiLo as in the paper: square windows, pooling of their size, padding like any other cell.

    Folding and the native operators know no other; what is not plain stays as it is.
    """
    return type(attn) is HiLo and attn.window[0] == attn.window[1] and attn.pool == attn.window and not attn.mask_padding


def merging_weights(merging: DeformableTokenMerging) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias of the deformable convolution with the following batch norm folded in."""
    conv, norm = merging.dconv, merging.norm_layer
    assert norm.running_mean is not None and norm.running_var is not None  # LITv2's batch norms track statistics
    return fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


def weight_and_bias(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias of a linear layer; the bias is zero if it has none."""
    return linear.weight, linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias


def token_projections(attn: HiLo, rows: Callable[[nn.Linear], Rows] = weight_and_bias) -> list[Rows]:
    """Returns HiLo's projections of all tokens, to be computed as one product, with the scale of the logits folded into the queries.

    These are Hi-Fi's queries, keys and values; Lo-Fi's queries; and with a window of 1, where nothing is pooled, Lo-Fi's keys and
    values. A branch without heads has no projections.

    Args:
        rows: returns the tensors of a projection.
    """
    parts = []
    if attn.h_heads:
        parts.append(tuple(torch.cat((part[: attn.h_dim] * attn.scale, part[attn.h_dim :])) for part in rows(attn.h_qkv)))
    if attn.l_heads:
        parts.append(tuple(part * attn.scale for part in rows(attn.l_q)))
        if attn.window_size == 1:
            parts.append(rows(attn.l_kv))
    return parts
