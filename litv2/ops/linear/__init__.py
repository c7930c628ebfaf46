# SPDX-License-Identifier: Apache-2.0
"""Linear layers of a block, each as one operator with what stands before and after it.

* ``norm_linear(x, weight, bias, eps)``: of x after LayerNorm without scale and shift, (..., K) -> (..., N);
* ``linear_add(x, weight, bias, residual)``: the residual (..., N) and the linear layer of x (..., K), added;
* ``linear_add_norm(x, weight, bias, residual, eps)``: this sum, and it after LayerNorm without scale and shift, both (..., N).

``weight`` is (N, K), ``bias`` (N,). In :mod:`litv2.inference.fused` they are parts of a block.
"""

from mm_modules.dispatch import Operator

from . import reference, triton

__all__ = ["linear_add", "linear_add_norm", "norm_linear"]

norm_linear = Operator("norm_linear", [triton.NORM_LINEAR, reference.NORM_LINEAR])
linear_add = Operator("linear_add", [triton.LINEAR_ADD, reference.LINEAR_ADD])
linear_add_norm = Operator("linear_add_norm", [triton.LINEAR_ADD_NORM, triton.ADD_NORM, reference.LINEAR_ADD_NORM])
