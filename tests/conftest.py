# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

import signal
import sys

import pytest
import torch

# Numbers of a GPU are compared with the CPU's: its float32 must not round factors to 10 bits.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def repeatable():
    """Every test starts from the same random state, and leaves signal handlers as it found them and no visualizer of mmengine behind.

    mmengine keeps a visualizer by its name, and with it the folder of the run that made it, which is gone after its test.
    """
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if visualization := sys.modules.get("mmengine.visualization"):
        for kind in (visualization.Visualizer, *visualization.Visualizer.__subclasses__()):
            kind._instance_dict.clear()


@pytest.fixture
def one_thread():
    """For torch, where a test does not say otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
