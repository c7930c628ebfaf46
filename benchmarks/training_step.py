# SPDX-License-Identifier: Apache-2.0
"""The trainer's own step (``classification/engine.py``) on a random batch, for the benchmarks that time it."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from models import CANDIDATES

# Modules of the trainer, which the harness makes importable.
# isort: split
import distributed
import engine
from data.dataset import Batch
from litv2 import LITv2
from litv2.runs.unreadable import BadFiles
from precision import Precision

KNOWN = {candidate.timm: candidate for candidate in CANDIDATES if candidate.timm and candidate.group != "today"}  # models with drop path
PRECISIONS = {"float32": "off", "bfloat16": "bf16", "float16": "fp16"}  # as the trainer names them


def random_batch(size: int, img_size: int, classes: int = 1000) -> Batch:
    images = torch.randn(size, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.randint(classes, (size,)), [], [])


def known_model(name: str, checkpointing: bool = False) -> nn.Module:
    """One of ``KNOWN``, with drop path."""
    model = timm.create_model(name, drop_path_rate=0.2, **dict(KNOWN[name].options))
    if checkpointing:
        model.set_grad_checkpointing()
    return model


def training_step(model: nn.Module, batch: Batch, device: torch.device, compiled: bool = False) -> Callable[[str], None]:
    """Returns a function that runs one training step of a model on a batch, in the precision passed to it."""
    model = model.train().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=1000, t_in_epochs=False)
    ours = isinstance(model, LITv2)
    runner = distributed.parallel(model, device, compiled and ours)
    if compiled and not ours:
        runner = torch.compile(runner)  # with the defaults: COMPILE_OPTIONS are for LITv2
    batch = batch._replace(images=batch.images.to(device), targets=batch.targets.to(device))

    def step(mode: str) -> None:
        once = engine.Step(runner, optimizer, scheduler, nn.CrossEntropyLoss(), Precision(device, mode), clip_grad=5.0)
        engine.train_one_epoch(once, [batch], 1, engine.Progress(), bad_files=BadFiles(0, print))

    return step
