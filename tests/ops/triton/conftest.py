# SPDX-License-Identifier: Apache-2.0
"""The fixture of tests that run Triton kernels without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def interpreter(monkeypatch) -> Iterator[None]:
    """Within the test, kernels compute on the CPU, slowly, and backends take its tensors; new tensors are full of NaN."""
    from triton_helpers import interpreted, interpreting

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills new tensors with NaN
    with interpreting():
        monkeypatch.setattr(interpreted()["depthwise"], "PROGRAMS", 1)  # of as many as a GPU needs, most rows are read three times
        yield
    torch.use_deterministic_algorithms(before)
