# SPDX-License-Identifier: Apache-2.0
"""Batches of the images in files that can be read, prepared by worker processes, in the order of the files."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import UserError
from .preprocess import read_image
from .runs.failures import start_worker

__all__ = ["batches", "usual_workers"]


def batches(
    paths: Sequence[Path], transform: Callable[[Image.Image], Tensor], batch_size: int, workers: int, unreadable: list[str]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Yields the images of so many files at a time: the paths of those that can be read, at least one, and the images (B, C, H, W).

    Args:
        transform: RGB image -> tensor (C, H, W).
        workers: processes that read ahead; 0 to read in this one.
        unreadable: gets a line on each of the other files.
    """
    loader = DataLoader(
        _Images(paths, transform),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=functools.partial(start_worker, _leave_interrupts_to_main),
        generator=torch.Generator(),
    )
    for readable, images, reports in loader:
        unreadable += reports
        if readable:
            yield readable, images


def usual_workers(images: int, batch_size: int) -> int:
    """Returns one worker per core, up to 8 and to the number of batches; none for a single batch, which they would only delay."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = -(-images // batch_size)
    return min(8, cores, count) if count > 1 else 0


class _Images(Dataset):
    """``dataset[index]`` is a path and its image, or why it cannot be read."""

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | str]:
        path = self.paths[index]
        try:
            image = read_image(path)
        except UserError as error:
            return path, str(error)
        return path, self.transform(image)


def _collate(samples: list[tuple[Path, Tensor | str]]) -> tuple[list[Path], Tensor, list[str]]:
    images = [(path, sample) for path, sample in samples if isinstance(sample, Tensor)]
    stacked = torch.stack([image for _, image in images]) if images else torch.empty(0)
    return [path for path, _ in images], stacked, [sample for _, sample in samples if isinstance(sample, str)]


def _leave_interrupts_to_main(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
