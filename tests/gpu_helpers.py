# SPDX-License-Identifier: Apache-2.0
"""For tests on CUDA devices: they carry the marker ``gpu``, and are skipped on a machine without one."""

from __future__ import annotations

import pytest
import torch

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def on_gpu(test):
    """Marks a test that runs on a CUDA device alone."""
    for mark in needs_gpu:
        test = mark(test)
    return test
