# SPDX-License-Identifier: Apache-2.0
"""Data loaders for training and evaluation."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from yacs.config import CfgNode

import distributed
from litv2.errors import MissingPackage
from litv2.runs.failures import start_worker

from .dataset import ImageDataset, StreamingDataset, collate
from .sampler import BalancedSampler, EvalSampler, TrainSampler
from .sources import STREAMING, DataError, open_sources
from .transforms import build_transform


@dataclass
class Loaders:
    train: DataLoader
    val: DataLoader
    class_names: list[str]
    val_size: int | None  # images over all processes; None if a streaming reader does not know
    steps_per_epoch: int  # batches of this process
    batch_size: int  # training batch size per process
    sampler: TrainSampler | None  # None for a streaming reader, which orders its images itself
    class_counts: list[int] | None  # training images of each class over all processes; None for a streaming reader, or several classes
    vectors: bool = False  # training targets are (B, classes) instead of (B,)
    note: str = ""  # of the validation images, for the log and the report


def build_loaders(config: CfgNode) -> Loaders:
    """Builds both loaders of this process. Raises DataError as ``sources.open_sources`` does."""
    rank, world_size = distributed.rank(), distributed.world_size()
    data = config.DATA
    mode = "RGB" if config.MODEL.LIT.IN_CHANS == 3 else "L"
    workers = data.NUM_WORKERS
    if workers < 0:
        workers = min(8, max(1, len(os.sched_getaffinity(0)) // distributed.local_world_size())) if hasattr(os, "sched_getaffinity") else 4
    common = dict(
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=data.PIN_MEMORY and torch.cuda.is_available(),
        worker_init_fn=functools.partial(start_worker, _own_process_group),
    )
    transforms = build_transform(config, training=True), build_transform(config, training=False)

    if data.DATASET.startswith(STREAMING):
        if data.SAMPLING != "all":
            raise DataError(f"DATA.SAMPLING={data.SAMPLING} needs the class of each image; {data.DATASET} orders its images itself")
        train, val = (_stream(config, training, transform, workers) for training, transform in zip((True, False), transforms))
        return Loaders(
            train=DataLoader(train, data.BATCH_SIZE, drop_last=True, generator=torch.Generator(), **common),
            val=DataLoader(val, data.BATCH_SIZE, generator=torch.Generator(), **common),
            class_names=[str(i) for i in range(_class_count(config))],
            val_size=None,
            steps_per_epoch=max(1, len(train) // (world_size * data.BATCH_SIZE)),
            batch_size=data.BATCH_SIZE,
            sampler=None,
            class_counts=None,
        )

    train_source, val_source = open_sources(config)
    targets: list[Any] = [target for _, target in train_source.samples]
    vectors = isinstance(targets[0], np.ndarray)
    if vectors and (data.SAMPLING != "all" or config.TRAIN.CLASS_WEIGHTS != "none"):
        raise DataError("DATA.SAMPLING and TRAIN.CLASS_WEIGHTS need one class per image, and the training table has several or shares")
    if data.SAMPLING == "balanced":
        sampler: TrainSampler = BalancedSampler(targets, data.BATCH_SIZE, rank, world_size, config.SEED)
    else:
        fixed_share = data.ZIP_MODE and data.CACHE_MODE == "part"
        sampler = TrainSampler(len(targets), data.BATCH_SIZE, rank, world_size, config.SEED, fixed_share)
    shares = EvalSampler(len(val_source), rank, world_size)
    train_set = ImageDataset(train_source, transforms[0], mode)
    val_set = ImageDataset(val_source, transforms[1], mode)
    # A separate generator: without one, every pass would draw from the global state that dropout and mixup use.
    return Loaders(
        train=DataLoader(train_set, sampler.batch_size, sampler=sampler, generator=torch.Generator(), **common),
        val=DataLoader(val_set, data.BATCH_SIZE, sampler=shares, generator=torch.Generator(), **common),
        class_names=train_source.class_names,
        val_size=len(val_set),
        steps_per_epoch=sampler.count // sampler.batch_size,
        batch_size=sampler.batch_size,
        sampler=sampler,
        class_counts=None if vectors else torch.bincount(torch.tensor(targets), minlength=len(train_source.class_names)).tolist(),
        vectors=vectors,
        note=val_source.note,
    )


def with_transform(loader: DataLoader, transform: Callable) -> DataLoader:
    """Returns a loader for one pass over the same images of this process, through another transform."""
    dataset: Any = copy.copy(loader.dataset)
    dataset.transform = transform
    return DataLoader(
        dataset,
        loader.batch_size,
        sampler=None if isinstance(dataset, IterableDataset) else loader.sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
    )


def _stream(config: CfgNode, training: bool, transform: Callable, workers: int) -> StreamingDataset:
    from timm.data import create_dataset

    data = config.DATA
    split = data.TRAIN_SPLIT if training else data.VAL_SPLIT
    try:
        dataset = create_dataset(
            data.DATASET, root=data.DATA_PATH, split=split, is_training=training, batch_size=data.BATCH_SIZE, seed=config.SEED
        )
        if hasattr(dataset, "set_loader_cfg"):
            dataset.set_loader_cfg(num_workers=max(1, workers))
    except ImportError as error:
        raise MissingPackage(f"DATA.DATASET={data.DATASET!r} needs a package that is not installed: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"DATA.DATASET={data.DATASET!r}, split {split!r} in {data.DATA_PATH!r} cannot be opened: {error}") from error
    return StreamingDataset(dataset, transform, f"{data.DATASET}:{split}")


def _class_count(config: CfgNode) -> int:
    if config.MODEL.NUM_CLASSES < 1:
        raise DataError(f"DATA.DATASET={config.DATA.DATASET!r} does not state its number of classes; set MODEL.NUM_CLASSES")
    return config.MODEL.NUM_CLASSES


def _own_process_group(worker: int) -> None:
    # Ctrl-C and torchrun's SIGTERM go to the whole process group of the trainer, which finishes its step and saves. A worker
    # in that group would die and interrupt the step.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
