# SPDX-License-Identifier: Apache-2.0
"""When there are no Triton kernels, and what is said then."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from litv2.ops import triton as room

pytest.importorskip("triton", reason="triton is not installed")
from litv2.ops.triton import trial  # noqa: E402


def why_not(device: str = "cuda", dtype: torch.dtype = torch.float16) -> str | None:
    """What backends are told of a fake tensor."""
    room._asked_once.cache_clear()
    with FakeTensorMode():
        return room.why_not(torch.empty(3, device=device, dtype=dtype))


@pytest.fixture
def device(monkeypatch):
    """A GPU of capability 9.0, as far as the questions go; what they hear of it is forgotten."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(trial, "copies", lambda device: None)
    yield
    room._asked_once.cache_clear()


pytestmark = [pytest.mark.usefixtures("device"), pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU that is not here")]


def test_there_are():
    assert why_not() is None


def test_what_no_kernel_serves():
    assert why_not("cpu") == "it supports CUDA only, got cpu"
    assert why_not(dtype=torch.float64) == "it has no kernel for torch.float64"


def test_they_are_switched_off(monkeypatch):
    monkeypatch.setenv("LITV2_TRITON", "0")
    monkeypatch.setattr(room, "problem", room._problem())
    assert why_not() == "switched off by LITV2_TRITON=0"


def test_without_triton(monkeypatch):
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    assert room._problem() == "triton is not installed"


def test_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why_not() == "it needs compute capability 8.0, got 7.5"


def test_a_trial_that_fails(monkeypatch):
    """The reason is said, and asked for once."""
    calls = []

    def fails(device: torch.device) -> None:
        calls.append(device)
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(trial, "copies", fails)
    expected = "Triton does not work here: RuntimeError: Failed to find C compiler."
    assert why_not() == room._why_not_on(calls[0]) == expected and len(calls) == 1
