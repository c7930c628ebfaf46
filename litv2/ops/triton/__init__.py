# SPDX-License-Identifier: Apache-2.0
"""Kernels for NVIDIA GPUs, written in Triton: a file per operator, with its kernels and the functions that launch them.

Those functions take and return tensors, and know nothing of autograd. The operator's backend, such as ``ops/depthwise/triton.py``,
makes torch operators of them and says when they are taken. It imports the kernels when they are first launched: ``import litv2`` does not
import Triton, which comes with torch for CUDA and is needed nowhere else.

``LITV2_TRITON=0`` switches all of them off.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mm_modules.torch_state import compute_dtype, constant_in_graphs, in_transform, is_exporting

__all__ = ["problem", "why_not", "why_rather_not"]

CAPABILITY = (8, 0)  # the lowest that the kernels are compiled for in the tests
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of x; sums are in float32


def _problem() -> str | None:
    if os.environ.get("LITV2_TRITON", "1") == "0":
        return "switched off by LITV2_TRITON=0"
    if torch.version.hip:
        return "it supports NVIDIA's GPUs only, and this torch is for AMD's"
    return None if find_spec("triton") else "triton is not installed"


problem = _problem()  # why there are no kernels, or None


def why_not(x: Tensor) -> str | None:
    """Returns the reason why no kernel computes with x, or None: what a backend asks before its own questions."""
    if problem is not None:
        return problem
    if not isinstance(x, Tensor):
        return "it supports tensors only, got a torch.fx proxy"
    if x.device.type != "cuda":
        return f"it supports CUDA only, got {x.device.type}"
    if compute_dtype(x) not in DTYPES:
        return f"it has no kernel for {compute_dtype(x)}"
    if not torch.compiler.is_compiling() and in_transform():
        return "it has no rules for torch.func's transforms and forward derivatives"
    return _why_not_on(x.device)


def why_rather_not() -> str | None:
    return "exported programs use plain tensor operations only, so as not to depend on Triton" if is_exporting() else None


@constant_in_graphs
def _why_not_on(device: torch.device) -> str | None:
    return _asked_once(device)


@cache
def _asked_once(device: torch.device) -> str | None:
    # A machine without a GPU has fake tensors only, which no kernel ever sees.
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"it needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, got {capability[0]}.{capability[1]}"
    from .trial import compare

    try:
        compare(device)
    except Exception as error:  # there are many: no C compiler, a driver that is too old, a folder that cannot be written, other numbers
        return f"Triton does not work here: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
