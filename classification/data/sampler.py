"""Samplers: which images a process sees, in which order and with which seeds is a function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from litv2.errors import UserError


class TrainSampler(Sampler):
    """Yields (index, augmentation seed) pairs, equally many and in whole batches for every process.

    The order depends neither on the number of loader workers nor on interruptions: set ``epoch``, and set ``skip`` to the
    number of images that this process has already trained on in that epoch.

    Args:
        size: images in the data set.
        batch_size: images per process and step. A last incomplete batch is dropped, unless it is the only one.
        fixed_share: keep the same images on this process in all epochs, for a per-process cache.

    Raises:
        UserError: there are fewer images than processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int, seed: int, fixed_share: bool = False):
        share = size // world_size
        if share == 0:
            raise UserError(f"{size} training images are too few for {world_size} processes")
        self.size, self.rank, self.world_size, self.seed, self.fixed_share = size, rank, world_size, seed, fixed_share
        self.batch_size = min(batch_size, share)
        self.count = share // self.batch_size * self.batch_size
        self.epoch = 0
        self.skip = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        seeds = torch.randint(0, 2**31, (self.size,), generator=generator)
        if self.fixed_share:
            mine = torch.arange(self.rank, self.size, self.world_size)
            mine = mine[torch.randperm(len(mine), generator=generator)]
        else:
            mine = torch.randperm(self.size, generator=generator)[self.rank :: self.world_size]
        for index in mine[self.skip : self.count].tolist():
            yield index, int(seeds[index])

    def __len__(self) -> int:
        return self.count - self.skip


class EvalSampler(Sampler):
    """Yields each image once over all processes: every world_size-th image here, so shares may differ by one."""

    def __init__(self, size: int, rank: int, world_size: int):
        self.indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
