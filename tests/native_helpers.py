# SPDX-License-Identifier: Apache-2.0
"""What the tests of the native operators share; where these are not in use the tests that import this skip, saying why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import max_difference
from litv2.ops import native

if native.problem is not None:
    pytest.skip(f"the native operators: {native.problem}", allow_module_level=True)


def close(ours: Tensor, exact: Tensor, tolerance: float = 3e-6) -> bool:
    """Within the tolerance of the largest value; false where a NaN is."""
    return max_difference(ours, exact) <= tolerance * max(1.0, exact.abs().max().item())


@torch.no_grad()
def in_float64(module: nn.Module, x: Tensor) -> Tensor:
    """What the plain module gives; in float64 it takes no fast path."""
    return copy.deepcopy(module).double()(x.double())
