# SPDX-License-Identifier: Apache-2.0
"""Samples: decodes any kind of image, augments it with its own random seed, and reports files that cannot be read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from litv2.files import is_shortage
from litv2.preprocess import decode

from .sources import DataError, ListSource, Target


class Sample(NamedTuple):
    image: Tensor | None  # (C, H, W), or a list of views, whatever the transform makes; None if it could not be read
    target: Target
    name: str
    unreadable: tuple[str, ...]  # "path: reason" of each file that was skipped


class Batch(NamedTuple):
    images: Tensor  # (B, C, H, W); where the transform makes views, a list with (B, views, C, H, W) for each size
    targets: Tensor  # (B,) int64, or (B, classes) float32
    names: list[str]
    unreadable: list[str]


class ImageDataset(Dataset):
    """Map-style data set over a source.

    ``dataset[index, seed]`` is a training sample: augmented with ``seed``, and replaced by the next readable one if its
    file is damaged, so that batches keep their size. ``dataset[index]`` is an evaluation sample; a damaged one is left out.
    """

    def __init__(self, source: ListSource, transform: Callable, mode: str = "RGB"):
        self.source, self.transform, self.mode = source, transform, mode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, None)
        unreadable = []
        for _ in range(len(self.source)):
            name = self.source.filename(index)
            try:
                file, target = self.source[index]
                image = decode(file, self.mode)
            except Exception as error:  # for damaged files, decoders raise anything: OSError, SyntaxError, struct.error ...
                if is_shortage(error):
                    raise
                unreadable.append(f"{name}: {error}")
                if seed is None:
                    return Sample(None, -1, name, tuple(unreadable))
                index = (index + 1) % len(self.source)
                continue
            with seeded(seed):
                return Sample(self.transform(image), target, name, tuple(unreadable))
        raise DataError(f"none of the {len(self.source)} images can be read; the first one: {unreadable[0]}")


class StreamingDataset(IterableDataset):
    """Samples of a timm streaming reader, which itself shuffles and splits the data between processes."""

    def __init__(self, dataset: Any, transform: Callable, name: str):
        self.dataset, self.transform, self.name = dataset, transform, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Sample]:
        for image, target in self.dataset:
            yield Sample(self.transform(image), target, self.name, ())


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seeds the random numbers of python, numpy and torch within the block and restores them afterwards; None does nothing."""
    if seed is None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    images = [sample.image for sample in samples if sample.image is not None]
    vectors = [sample.target for sample in good if isinstance(sample.target, np.ndarray)]
    return Batch(
        _stacked(images) if images else torch.empty(0),
        torch.from_numpy(np.stack(vectors)) if vectors else torch.tensor([sample.target for sample in good], dtype=torch.int64),
        [sample.name for sample in good],
        [report for sample in samples for report in sample.unreadable],
    )


def _stacked(images: list[Any]) -> Any:
    """Stacks the images, or the views of each size."""
    return torch.stack(images) if isinstance(images[0], Tensor) else [torch.stack(size) for size in zip(*images)]
