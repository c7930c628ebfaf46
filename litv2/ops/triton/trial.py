# SPDX-License-Identifier: Apache-2.0
"""The smallest kernel, to find out whether Triton works on a device: it needs a C compiler and a folder for its cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x, y):
    tl.store(y, tl.load(x))


def copies(device: torch.device) -> None:
    """Raises whatever Triton raises."""
    x = torch.zeros(2, device=device)
    with torch.cuda.device_of(x):
        copy_kernel[(1,)](x, x[1:])
