# SPDX-License-Identifier: Apache-2.0
"""The settings of an export and the network that is exported."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["Network", "Settings", "example_input"]

DYNAMIC = ("batch", "size")


@dataclass(frozen=True)
class Settings:
    """Settings of an export.

    Args:
        image_size: (H, W) of the image in pixels; if the size is dynamic, the one that is traced and checked first.
        batch_size: images per batch, unless the batch is dynamic.
        dynamic: dimensions left open until run time, any of "batch" and "size"; None for all that the format supports.
        dtype: dtype of the computation: float32, float16, bfloat16 or int8; not every format supports each.
        images: folder of real images for the comparison and for int8 calibration; None compares on scikit-learn's sample photographs.

    Raises:
        UserError: a value is invalid.
    """

    image_size: tuple[int, int] = (224, 224)
    batch_size: int = 1
    dynamic: tuple[str, ...] | None = None
    dtype: str = "float32"
    images: Path | None = None

    def __post_init__(self):
        if not set(self.dynamic or ()) <= set(DYNAMIC):
            raise UserError(f"export: dynamic={self.dynamic} must be some of {DYNAMIC}")
        if min(self.image_size) < 1 or self.batch_size < 1:
            raise UserError(f"export: image_size={self.image_size} and batch_size={self.batch_size} must be positive")

    def leaves_open(self, what: str) -> bool:
        """Whether "batch" or "size" is dynamic."""
        return what in (self.dynamic or ())


class Network(nn.Module):
    """The network that is exported: images (B, channels, H, W) -> a tuple of named tensors.

    Args:
        module: the inference form; returns a tensor or a tuple of tensors.
        reference: the original model, which the export is compared with; returns the same.
        outputs: names of the outputs.
        channels: channels of the image.
        smallest: smallest side of an image in pixels.
        classes: names of the outputs whose axis 1 is the class, for the top-1 agreement.
    """

    def __init__(
        self,
        module: nn.Module,
        reference: nn.Module,
        outputs: tuple[str, ...],
        channels: int = 3,
        smallest: int = 32,
        classes: tuple[str, ...] = (),
    ):
        super().__init__()
        self.module = module.eval()
        self.outputs, self.channels, self.smallest, self.classes = outputs, channels, smallest, classes
        self._reference = [reference.eval()]  # in a list, so that it is not a submodule and not exported

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.module(images))

    def in_dtype(self, dtype: torch.dtype) -> Network:
        """Returns a copy whose module has another dtype; this one is left unchanged."""
        if dtype == torch.float32:
            return self
        module = copy.deepcopy(self.module).to(dtype)
        return Network(module, self._reference[0], self.outputs, self.channels, self.smallest, self.classes)

    @torch.no_grad()
    def reference(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(out.float() for out in as_tuple(self._reference[0](images)))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def example_input(network: Network, settings: Settings, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the batch to trace. Dynamic dimensions are larger than 1, down to the last map: tracing treats a size of 1 as a constant."""
    batch = 2 if settings.leaves_open("batch") else settings.batch_size
    least = 2 * network.smallest if settings.leaves_open("size") else 1
    return torch.zeros(batch, network.channels, *(max(side, least) for side in settings.image_size), dtype=dtype)
