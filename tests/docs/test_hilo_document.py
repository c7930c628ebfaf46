# SPDX-License-Identifier: Apache-2.0
"""docs/hilo.md: the tests that it offers pass for HiLo, and see maps that are scrambled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from document_helpers import blocks
from hilo import HiLo, HiLo2d

(CODE,) = (block for block in blocks("docs/hilo.md", "python") if "def test_" in block)
NAMES = [line.removeprefix("def ").removesuffix("():") for line in CODE.splitlines() if line.startswith("def test_")]
ARGUMENTS = dict(dim=32, num_heads=4, window_size=2, alpha=0.5)


class OnTokens(HiLo2d):
    """HiLo2d as it is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return self.to_map(HiLo.forward(self, self.to_tokens(x), *x.shape[2:]), *x.shape[2:])

    def to_tokens(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def to_map(self, y: Tensor, H: int, W: int) -> Tensor:
        return y.transpose(1, 2).unflatten(2, (H, W))


class ScrambledIn(OnTokens):
    def to_tokens(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, self.dim)


class ScrambledOut(OnTokens):
    def to_map(self, y: Tensor, H: int, W: int) -> Tensor:
        return y.reshape(-1, self.dim, H, W)


class ScrambledBoth(ScrambledIn, ScrambledOut):
    pass


class Transposed(OnTokens):
    """Columns for rows."""

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        return self.to_map(HiLo.forward(self, self.to_tokens(x), W, H), H, W)


def offered(name: str, layer: torch.nn.Module):
    """The test, of the layer in the place of the document's."""
    names: dict = {}
    exec(CODE, names)
    names["layer"] = layer.eval()
    torch.manual_seed(0)
    return names[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [HiLo2d, OnTokens])
@torch.no_grad()
def test_passes_for_hilo(name, layer):
    offered(name, layer(**ARGUMENTS))()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layer", [ScrambledIn, ScrambledOut, ScrambledBoth])
@torch.no_grad()
def test_sees_a_scrambled_map(name, layer):
    with pytest.raises(AssertionError):
        offered(name, layer(**ARGUMENTS))()


@torch.no_grad()
def test_one_sees_height_taken_for_width():
    """Of maps that are not square."""
    with pytest.raises(AssertionError):
        offered("test_maps_are_tokens", Transposed(**ARGUMENTS))()
