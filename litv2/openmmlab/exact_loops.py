# SPDX-License-Identifier: Apache-2.0
"""mmengine's training loops, with a resume that is exact to the bit, a stop at a loss that is not finite, and one at a signal.

What is random in an iteration, in the model and in the augmentation of each image, is seeded by the run's seed, the process and the
iteration, and by the place in the batch: nothing but the number of the iteration has to be saved. Batches that a run has had already are
left out before they are read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_reduce, get_rank, is_main_process
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ..errors import UserError, listed
from ..files import is_shortage
from ..runs.signals import StopRequested, StopSignals
from ..runs.unreadable import BadFiles

__all__ = ["ExactEpochLoop", "ExactIterLoop", "with_named_files"]


def seed_all(*numbers: int) -> None:
    """Seeds the generators of Python, numpy and torch with a function of these numbers."""
    first, second = (int(word) for word in np.random.SeedSequence(numbers).generate_state(2))
    random.seed(first)
    np.random.seed(first)
    torch.manual_seed(first << 32 | second)


class Drawn(int):
    """The index of a sample, and the numbers that its augmentation is seeded with."""

    seeds: tuple[int, ...]


class NamingDataset(Dataset):
    """A data set that names the file of a sample whose image or label map cannot be read; otherwise the data set itself."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except Exception as error:
            if is_shortage(error) or (report := self._unreadable(index)) is None:
                raise
            raise UserError(f"an evaluation needs each of its images: {report}; mend it, or remove it from the data set") from error

    def _unreadable(self, index: int) -> str | None:
        """Which of the sample's files cannot be read, and why."""
        info = self.dataset.get_data_info(index)
        for path in filter(None, (info.get("img_path"), info.get("seg_map_path"))):
            try:
                if mmcv.imread(path, flag="unchanged") is None:
                    return f"{path}: it is no image, or damaged"
            except Exception as error:  # for damaged files, decoders raise anything
                return f"{path}: {error}"
        return None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled in a worker
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SeededDataset(NamingDataset):
    """A data set whose augmentation is a function of the ``Drawn`` index.

    A sample that cannot be read is replaced by the next one, and its ``data_samples`` has a field ``unreadable``.
    """

    def __getitem__(self, index: Drawn) -> Any:
        unreadable: list[str] = []
        for number in range(len(self)):
            place = (index + number) % len(self)
            seed_all(*index.seeds)
            try:
                data = self.dataset[place]
            except Exception as error:
                if is_shortage(error) or (report := self._unreadable(place)) is None:
                    raise
                unreadable.append(report)
                continue
            if unreadable:
                data["data_samples"].set_field(unreadable, "unreadable", field_type="metainfo")
            return data
        raise UserError(f"none of the {len(self)} images can be read; the first one: {unreadable[0]}")


class NumberedBatches(BatchSampler):
    """Batches of ``Drawn`` indices. ``start`` is the iteration of the first batch, ``done`` how many batches are left out before it."""

    def __init__(self, batches: Any, seed: int):
        self.batches, self.sampler = batches, batches.sampler
        self.seed, self.start, self.done = seed, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self.batches):
            if number >= self.done:
                yield [self._drawn(index, self.start + number - self.done, place) for place, index in enumerate(batch)]

    def _drawn(self, index: int, iteration: int, place: int) -> Drawn:
        drawn = Drawn(index)
        drawn.seeds = (self.seed, get_rank(), iteration, 1 + place)
        return drawn

    def __len__(self) -> int:
        return len(self.batches)


class NotFinite(Exception):
    """A loss that is not finite."""


def with_named_files(loader: DataLoader) -> DataLoader:
    """The loader of an evaluation; an image that it cannot read ends the program with a line that names it."""
    return _replaced(loader, NamingDataset(loader.dataset), loader.batch_sampler)


def _replaced(loader: DataLoader, dataset: Dataset, batches: Any) -> DataLoader:
    """The same loader of another data set, in other batches."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
        prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )


class _Exact:
    """What both loops share: they are mixed with mmengine's."""

    runner: Any
    dataloader: Any
    _iter: int
    _epoch: int

    def __init__(self, *args: Any, max_bad_files: int = 10, **kwargs: Any):
        """``max_bad_files`` unreadable images are reported and skipped by each process; one more stops the run."""
        super().__init__(*args, **kwargs)
        logger = self.runner.logger
        say = logger.warning if is_main_process() else logger.error  # mmengine's loggers of other processes show errors only
        self.bad_files = BadFiles(max_bad_files, say, "train_cfg.max_bad_files")

    def _prepare(self) -> None:
        """Once, before the first iteration, when a checkpoint has been resumed."""
        loader, seed = self.dataloader, self.runner.seed  # of the checkpoint, not the one that the samplers were built with
        loader.batch_sampler.sampler.seed = seed
        self.dataloader = _replaced(loader, SeededDataset(loader.dataset), NumberedBatches(loader.batch_sampler, seed))
        self.signals = StopSignals()
        update = self.runner.optim_wrapper.update_params

        def update_if_finite(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if not torch.isfinite(loss).all():
                raise NotFinite(f"the loss is {loss.item()}")
            update(loss, *args, **kwargs)

        self.runner.optim_wrapper.update_params = update_if_finite

    def _exactly(self, run_iter: Any, *args: Any) -> None:
        """Runs one iteration.

        Raises:
            UserError: its loss is not finite, or there are too many unreadable images; nothing has been updated.
            StopRequested: a signal arrived at any process; a checkpoint has been saved.
        """
        data = args[-1]
        for sample in data["data_samples"]:
            self.bad_files.add(sample.metainfo.get("unreadable", ()))
        seed_all(self.runner.seed, get_rank(), self._iter, 0)
        try:
            run_iter(*args)
        except NotFinite as error:
            files = listed(sample.img_path for sample in data["data_samples"])
            last = self.runner.message_hub.runtime_info.get("last_ckpt")
            kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise UserError(f"{error} at iteration {self._iter + 1}, of the images {files}; it was not applied; {kept}") from error
        number = torch.tensor(self.signals.received)
        all_reduce(number, "max")
        if number:
            self.runner.save_for_resume(self._epoch, self._iter)
            raise StopRequested(int(number))


class ExactEpochLoop(_Exact, EpochBasedTrainLoop):
    def run(self) -> torch.nn.Module:
        self._prepare()
        return super().run()

    def run_epoch(self) -> None:
        batches = self.dataloader.batch_sampler
        batches.start, batches.done = self._iter, self._iter - self._epoch * len(self.dataloader)
        super().run_epoch()

    def run_iter(self, idx: int, data_batch: Sequence[dict]) -> None:
        self._exactly(super().run_iter, self._iter - self._epoch * len(self.dataloader), data_batch)


class ExactIterLoop(_Exact, IterBasedTrainLoop):
    def run(self) -> torch.nn.Module:
        self._prepare()
        batches = self.dataloader.batch_sampler
        if self._iter and not isinstance(batches.sampler, InfiniteSampler):
            kind = type(batches.sampler).__name__
            raise UserError(f"train_dataloader has a {kind}; a run by iterations resumes with an InfiniteSampler only")
        batches.start = batches.done = self._iter
        self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)
        self.dataloader_iterator.skip_iter = lambda iterations: None  # the batches themselves do it
        return super().run()

    def run_iter(self, data_batch: Sequence[dict]) -> None:
        self._exactly(super().run_iter, data_batch)
