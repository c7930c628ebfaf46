# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a run."""

from __future__ import annotations

import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def peak_memory_mb(device: torch.device) -> float | None:
    """Returns the peak memory in MiB: of tensors on CUDA, else of the process; None on Windows, which does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
