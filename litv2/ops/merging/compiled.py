# SPDX-License-Identifier: Apache-2.0
"""``token_merging`` for inference by the compiled deformable convolution, with offsets from a Triton kernel and the batch norm folded.

Its samples lie in memory, where one kernel for both would need none (``triton.py``), but a library multiplies them, and that is the faster
way on the card that was measured (docs/gpu.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from mm_modules.DCN import compiled
from mm_modules.dispatch import Backend
from mm_modules.torch_state import compute_dtype

from .. import triton as kernels
from . import triton

if TYPE_CHECKING:
    from ...layers import DeformableTokenMerging


def why_not(x: Tensor, merging: DeformableTokenMerging) -> str | None:
    return triton.why_not(x, merging) or compiled.why_not(x)


def why_rather_not(x: Tensor, merging: DeformableTokenMerging) -> str | None:
    return kernels.why_rather_not()


def token_merging(x: Tensor, merging: DeformableTokenMerging) -> Tensor:
    dtype, conv = compute_dtype(x), merging.dconv
    weight, bias = triton.folded(merging)
    offset = triton.predict_offset(x, conv).permute(0, 3, 1, 2)
    x = x.to(dtype).permute(0, 3, 1, 2)
    y = compiled.deform_conv2d(x, offset, weight.to(dtype), bias.to(dtype), conv.stride, conv.padding, conv.dilation, None)
    return F.gelu(y).permute(0, 2, 3, 1)


BACKEND = Backend("compiled", token_merging, why_not, why_rather_not)
