# SPDX-License-Identifier: Apache-2.0
"""Samplers: which images a process sees, in which order and with which seeds is a function of seed, epoch and position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
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
        indices, seeds = self._draw(torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch))
        yield from zip(indices[self.skip : self.count].tolist(), seeds[self.skip : self.count].tolist())

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns this process's images of an epoch, in order, and their seeds."""
        seeds = torch.randint(0, 2**31, (self.size,), generator=generator)
        if self.fixed_share:
            mine = torch.arange(self.rank, self.size, self.world_size)
            mine = mine[torch.randperm(len(mine), generator=generator)]
        else:
            mine = torch.randperm(self.size, generator=generator)[self.rank :: self.world_size]
        return mine, seeds[mine]

    def __len__(self) -> int:
        return self.count - self.skip


class BalancedSampler(TrainSampler):
    """Draws each class equally often; epochs have as many images as without it.

    As many images as there are classes are drawn in turn, one of each class, in random order. A class gives its images in random order,
    and all of them once before any comes again within the epoch. The processes share the images of one drawing; an image that is drawn
    again has another seed.

    Args:
        targets: class number of each image in the data set.
        batch_size, rank, world_size, seed: as of ``TrainSampler``.
    """

    def __init__(self, targets: Sequence[int], batch_size: int, rank: int, world_size: int, seed: int):
        super().__init__(len(targets), batch_size, rank, world_size, seed)
        order = torch.tensor(targets).argsort(stable=True)
        counts = torch.bincount(torch.tensor(targets))
        self.members = order.split(counts[counts > 0].tolist())  # the images of each class that has any

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seeds = torch.randint(0, 2**31, (self.size,), generator=generator)
        rounds = -(-self.size // len(self.members))
        drawn = torch.stack([_repeated(images, rounds, generator) for images in self.members], dim=1)  # (rounds, classes)
        order = torch.rand(drawn.shape, generator=generator).argsort(dim=1)
        mine = slice(self.rank, self.size, self.world_size)
        return drawn.gather(1, order).flatten()[mine], seeds[mine]


def _repeated(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Returns ``count`` of the images: all of them, in random order, again and again."""
    passes = [images[torch.randperm(len(images), generator=generator)] for _ in range(-(-count // len(images)))]
    return torch.cat(passes)[:count]


class EvalSampler(Sampler):
    """Yields each image once over all processes: every world_size-th image here, so shares may differ by one."""

    def __init__(self, size: int, rank: int, world_size: int):
        self.indices = range(rank, size, world_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
