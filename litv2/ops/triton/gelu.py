# SPDX-License-Identifier: Apache-2.0
"""GELU inside kernels, exact as torch's."""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
