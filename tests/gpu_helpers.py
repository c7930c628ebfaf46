# SPDX-License-Identifier: Apache-2.0
"""For tests on CUDA devices: they carry the marker ``gpu``, and are skipped on a machine without one."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mm_modules import build

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def on_gpu(test):
    """Marks a test that runs on a CUDA device alone."""
    for mark in needs_gpu:
        test = mark(test)
    return test


def cuobjdump() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that comes with Triton."""
    compiler, triton = build.nvcc(), find_spec("triton")
    folders = [compiler.parent] if compiler else []
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends/nvidia/bin")
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
