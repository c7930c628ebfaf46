"""Fixtures of all tests."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable():
    """Every test starts from the same random state and leaves signal handlers as it found them."""
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
