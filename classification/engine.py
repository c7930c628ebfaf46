# SPDX-License-Identifier: Apache-2.0
"""The loops: one optimizer step, one training epoch, and an exact evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import distributed
import multilabel
from data.dataset import Batch
from distillation import Distillation, plain_model
from litv2.errors import UserError
from litv2.runs.signals import StopRequested, StopSignals
from litv2.runs.unreadable import BadFiles
from precision import Precision
from reading import Reading
from report import Predictions


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; the weights and the optimizer are unchanged by that step."""


@dataclass
class Progress:
    """Progress of a run; saved with every checkpoint."""

    epoch: int = 0  # epochs whose training and validation are complete
    step: int = 0  # trained batches of the current epoch, always whole accumulation groups
    updates: int = 0  # total optimizer steps, including skipped ones
    nonfinite: int = 0  # steps skipped because of a non-finite loss
    best: float = 0.0  # best top-1, or mean average precision, in percent
    best_epoch: int = -1
    since_best: int = 0  # evaluations


class Update(NamedTuple):
    """The figures of an optimizer step on this process."""

    loss: float
    grad_norm: float
    lr: float  # learning rate that the first parameter group used
    images: int
    stop: bool  # whether a signal arrived at any rank


@dataclass
class _Pending:
    """An optimizer step whose figures have not been read."""

    reading: Reading  # as _Figures, then the loss of each batch
    names: list[list[str]]  # the files of each batch


class _Figures(NamedTuple):
    """The numbers of a step that the device computes; flags are 0 or 1."""

    loss: float
    grad_norm: float
    bad: float  # the step was skipped because a loss or gradient is not finite
    bad_loss: float  # a loss is not finite, in this or another process
    stop: float  # a process was asked to stop


@dataclass
class Step:
    """An optimizer step with everything that it needs.

    The device decides by itself whether a step is applied, and keeps its figures. With ``lag`` the host reads them when it has queued
    the forward and backward pass of the next step, so that the device always has work; what the host does after a step, the moving
    average included, follows then. Between steps the weights, the optimizer and ``progress`` belong together only after ``finish``.
    """

    model: nn.Module  # possibly wrapped by distributed.parallel; with a projection, as WithProjection
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ema: ModelEmaV3 | None = None
    clip_grad: float = 0.0  # maximum gradient norm; 0 = no clipping
    max_nonfinite: int = 0  # steps with a non-finite loss that are skipped per run
    distillation: Distillation | None = None  # its loss contains that of ``loss_fn``
    lag: bool | None = None  # read a step's figures during the next one; None: on CUDA

    def __post_init__(self) -> None:
        if self.lag is None:
            self.lag = self.precision.device.type == "cuda"
        self._pending: _Pending | None = None

    def __call__(self, group: list[Batch], progress: Progress, stop: bool = False) -> Update | None:
        """Trains on the mean loss of a group of batches; gradients are all-reduced on the last batch.

        ``stop`` tells that this process was asked to stop.

        Returns:
            The figures of this step, and ``progress`` has advanced; with ``lag`` those of the step before, None if it was finished.

        Raises:
            NonFiniteLoss: more than ``max_nonfinite`` steps had a non-finite loss; raised on every rank. With ``lag`` it is the step
                before that had it, and nothing of this one remains but the random numbers that it drew.
        """
        # The statistics of batch norm are set aside until the step is applied: a non-finite loss has already corrupted them.
        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        parts = len(group)
        losses = torch.stack([self._backward(batch, parts, last=i == parts - 1) for i, batch in enumerate(group)])
        after = [buffer.clone() for buffer in buffers]
        _copy_all(buffers, before)
        self.precision.scaler.unscale_(self.optimizer)
        limit = self.clip_grad if self.clip_grad > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)

        flags = torch.stack([~losses.isfinite().all(), ~grad_norm.isfinite(), losses.new_full((), stop)])
        distributed.any_of(flags)
        bad_loss, bad_norm, stops = flags
        skip = torch.maximum(bad_loss, bad_norm)
        # With a gradient scaler infinite gradients are normal: the scale was too large, and is reduced.
        bad = bad_loss if self.precision.scaler.is_enabled() else skip
        figures = torch.stack([losses.mean(), grad_norm, bad, bad_loss, stops])

        update = self.finish(progress)
        _copy_all(buffers, [torch.where(bad > 0, old, new) for old, new in zip(before, after)])
        self._apply_unless(skip)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending = _Pending(Reading(torch.cat([figures, losses])), [batch.names for batch in group])
        return update if self.lag else self.finish(progress)

    def finish(self, progress: Progress) -> Update | None:
        """Reads the figures of the last step, if that has not been done, and advances ``progress``. Raises as a call does."""
        if self._pending is None:
            return None
        numbers, names = self._pending.reading.numbers(), self._pending.names
        self._pending = None
        count = len(_Figures._fields)
        figures, losses = _Figures(*numbers[:count]), numbers[count:]
        if figures.bad:
            if progress.nonfinite >= self.max_nonfinite:
                raise NonFiniteLoss(_report(progress, losses, figures, names))
            progress.nonfinite += 1
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(progress.updates)
        progress.updates += 1
        progress.step += len(names)
        if self.ema is not None and not figures.bad:
            self.ema.update(plain_model(self.model), step=progress.updates)
        return Update(figures.loss, figures.grad_norm, lr, sum(map(len, names)), figures.stop > 0)

    def _backward(self, batch: Batch, parts: int, last: bool) -> Tensor:
        """Accumulates the gradients of one of the ``parts`` batches of a group; returns its loss, a scalar."""
        device = self.precision.device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with nullcontext() if last else distributed.without_sync(self.model):
            with self.precision.context():
                outputs = self.model(images)
            logits, features = outputs if isinstance(outputs, tuple) else (outputs, None)
            loss = self.loss_fn(logits.float(), targets)
            if self.distillation is not None:
                loss = self.distillation(loss, images, logits, features)
            self.precision.scaler.scale(loss / parts).backward()
        return loss.detach()

    def _apply_unless(self, skip: Tensor) -> None:
        """Changes the weights, unless ``skip``, 0 or 1 on the device, forbids it. The gradients are unscaled already."""
        optimizer: Any = self.optimizer
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # Torch's fused optimizers skip a step on the device. GradScaler.step would give them its own flag only.
            optimizer.found_inf = skip
            optimizer.step()
            del optimizer.found_inf
        elif not skip.item():  # for the others the host has to wait
            optimizer.step()


def train_one_epoch(
    step: Step,
    loader: Iterable[Batch],
    steps: int,
    progress: Progress,
    *,
    bad_files: BadFiles,
    accumulation: int = 1,
    streaming: bool = False,
    save_steps: int = 0,
    stop: StopSignals | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_update: Callable[[Update, float], None] = lambda update, seconds: None,
    on_save: Callable[[], object] = lambda: None,
) -> None:
    """Trains from ``progress.step`` to the end of the epoch, with one optimizer step per ``accumulation`` batches.

    The last group of an epoch may be shorter. With ``streaming`` the ranks may have different numbers of batches; the epoch ends
    on all ranks when the first one runs out. ``on_start`` is called once loading has begun and the model is in training mode, but before
    any random number is drawn, ``on_update`` once per optimizer step, in order, with its figures and its duration in seconds, data loading
    included, and ``on_save`` after every ``save_steps`` steps of the run. All steps are finished when it is called, when this function
    returns and when it raises one of the first two errors below.

    Raises:
        NonFiniteLoss: as ``Step``.
        StopRequested: a signal arrived at any rank; raised on every rank.
        DataError: there are too many unreadable files.
    """
    batches = iter(loader)
    if streaming and distributed.world_size() > 1:
        batches = _agreeing(batches)
    step.model.train()
    on_start()
    begun, updates, stopping = progress.step, progress.updates, False  # ``progress`` may be one step behind
    start = time.perf_counter()

    def report(update: Update | None) -> bool:
        """Returns whether a rank was asked to stop."""
        nonlocal start
        if update is not None:
            on_update(update, time.perf_counter() - start)
            start = time.perf_counter()
        return update is not None and update.stop

    while begun < steps and not stopping:
        group = _take(batches, min(accumulation, steps - begun))
        if not group:
            break  # a streaming reader may yield fewer images than announced
        for batch in group:
            bad_files.add(batch.unreadable)
        stopping = report(step(group, progress, stop is not None and stop.received > 0))
        begun, updates = begun + len(group), updates + 1
        if save_steps and updates % save_steps == 0:
            stopping |= report(step.finish(progress))
            on_save()
    stopping |= report(step.finish(progress))
    if stopping:
        raise StopRequested(max(distributed.gather(stop.received if stop is not None else 0)))


def logits_of(model: nn.Module, images: Tensor, precision: Precision) -> Tensor:
    """The logits (B, classes), float32, of a model of ``Precision.for_inference`` for images (B, C, H, W)."""
    return model(images.to(precision.device, non_blocking=True).to(precision.dtype)).float()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    precision: Precision,
    *,
    expected: int | None,
    bad_files: BadFiles,
    log: Callable[[str], None],
    stop: StopSignals | None = None,
    keep: Predictions | None = None,
    predict: Callable[[nn.Module, Tensor, Precision], Tensor] = logits_of,
    multi_label: bool = False,
) -> dict[str, Any]:
    """Computes exact top-1 and top-5 (percent) and cross-entropy over all processes, counting each image once; with ``multi_label`` the
    figures of ``multilabel.figures`` and ``thresholds`` (classes,), the best ones on these images.

    Sums and counts are reduced once, at the end, so that ranks may have different numbers of images. ``expected`` is the size of
    the data set; unreadable images are left out and logged. Mixed precision takes a copy of the model with half-precision weights.
    ``keep`` collects the logits of this process, which ``predict`` computes.

    Raises:
        RuntimeError: the number of images differs from the expected one.
        UserError: there are no images.
    """
    device = precision.device
    model = precision.for_inference(model).eval()
    rows = []  # of each batch: images that are correct at 1 and at 5, and their loss; read at the end, so that CUDA need not wait
    images = unreadable = 0
    keep = Predictions() if multi_label and keep is None else keep
    for batch in loader:
        if stop is not None and stop.received:
            raise StopRequested(stop.received)  # nothing is lost: latest.pth was written before the evaluation
        bad_files.add(batch.unreadable)
        unreadable += len(batch.unreadable)
        if not len(batch.targets):
            continue
        targets = batch.targets.to(device, non_blocking=True)
        logits = predict(model, batch.images, precision)
        if keep is not None:
            keep.add(batch.names, batch.targets, logits)
        images += len(targets)
        if multi_label:
            continue
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        rows.append(torch.stack([top[:, 0].sum(), top.any(dim=1).sum(), F.cross_entropy(logits, targets, reduction="sum")]))
    sums = [sum(column) for column in zip(*Reading(torch.stack(rows)).numbers())] if rows else [0.0, 0.0, 0.0]
    count, left_out, top1, top5, loss = distributed.all_sum([images, unreadable, *sums])
    if expected is not None and count + left_out != expected:
        raise RuntimeError(f"evaluation saw {count:.0f} images (+ {left_out:.0f} unreadable), but the data set has {expected}")
    if count == 0:
        raise UserError("evaluation saw no images: the validation set is empty or unreadable")
    if left_out:
        log(f"evaluation leaves out {left_out:.0f} unreadable images of {expected}")
    if multi_label and keep is not None:
        _, wanted, found = keep.of_all_processes()
        thresholds = multilabel.best_thresholds(wanted, multilabel.probabilities(found))
        return dict(**multilabel.figures(wanted, found), thresholds=thresholds.tolist(), images=int(count))
    return dict(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, images=int(count))


def _take(batches: Iterator[Batch], count: int) -> list[Batch]:
    group: list[Batch] = []
    while len(group) < count and (batch := next(batches, None)) is not None:
        group.append(batch)
    return group


def _agreeing(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Stops on all ranks when one runs out: the others would otherwise wait forever for its gradients."""
    while True:
        batch = next(batches, None)
        if distributed.all_sum([batch is None])[0] or batch is None:
            return
        yield batch


def _report(progress: Progress, losses: list[float], figures: _Figures, names: list[list[str]]) -> str:
    where = f"epoch {progress.epoch}, step {progress.step}, update {progress.updates}"
    bad = [batch for batch, loss in zip(names, losses) if not math.isfinite(loss)]
    if figures.bad_loss and not bad:
        return f"the loss of another process is not finite ({where})"
    listing = "\n  ".join(name for batch in bad or names for name in batch)
    return f"loss {losses}, gradient norm {figures.grad_norm:g}: not finite at {where}; the images of this step:\n  {listing}"


@torch.no_grad()
def _copy_all(tensors: list[Tensor], values: list[Tensor]) -> None:
    if tensors:
        torch._foreach_copy_(tensors, values)
