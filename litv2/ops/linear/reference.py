# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a block by torch's operators."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mm_modules.dispatch import Backend


def norm_linear(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], eps=eps), weight, bias)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + F.linear(x, weight, bias)


def linear_add_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = residual + F.linear(x, weight, bias)
    return y, F.layer_norm(y, y.shape[-1:], eps=eps)


NORM_LINEAR = Backend("torch", norm_linear)
LINEAR_ADD = Backend("torch", linear_add)
LINEAR_ADD_NORM = Backend("torch", linear_add_norm)
