"""The loops: one optimizer step, one training epoch, and an exact evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distributed
from data.dataset import Batch
from data.loader import BadFiles
from litv2.errors import UserError
from precision import Precision
from signals import StopRequested, StopSignals


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite; the weights and the optimizer are unchanged by that step."""


@dataclass
class Progress:
    """Progress of a run; saved with every checkpoint."""

    epoch: int = 0  # epochs whose training and validation are complete
    step: int = 0  # trained batches of the current epoch, always whole accumulation groups
    updates: int = 0  # total optimizer steps, including skipped ones
    nonfinite: int = 0  # steps skipped because of a non-finite loss
    best: float = 0.0  # best top-1 in percent
    best_epoch: int = -1


class Update(NamedTuple):
    """The figures of an optimizer step on this process."""

    loss: float
    grad_norm: float
    lr: float  # learning rate that the first parameter group used
    images: int
    stop: bool  # whether a signal arrived at any rank


@dataclass
class Step:
    """An optimizer step with everything that it needs."""

    model: nn.Module  # possibly wrapped by DDP and torch.compile
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    precision: Precision
    mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    ema: ModelEmaV3 | None = None
    clip_grad: float = 0.0  # maximum gradient norm; 0 = no clipping
    max_nonfinite: int = 0  # steps with a non-finite loss that are skipped per run

    def __call__(self, group: list[Batch], progress: Progress, stop: bool = False) -> Update:
        """Trains on the mean loss of a group of batches and advances ``progress``; gradients are all-reduced on the last batch.

        ``stop`` tells that this process was asked to stop; the result tells whether any rank was.

        Raises:
            NonFiniteLoss: more than ``max_nonfinite`` steps had a non-finite loss; raised on every rank.
        """
        # A non-finite loss has already corrupted the running statistics of batch norm: keep a copy of the old ones.
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        parts = len(group)
        losses = torch.stack([self._backward(batch, parts, last=i == parts - 1) for i, batch in enumerate(group)])
        self.precision.scaler.unscale_(self.optimizer)
        limit = self.clip_grad if self.clip_grad > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)

        broken = [batch for batch, value in zip(group, losses.tolist()) if not _finite(value)]
        # With a gradient scaler infinite gradients are normal: the scale was too large, and the scaler skips the step itself.
        spoilt = bool(broken) or (not self.precision.scaler.is_enabled() and not _finite(float(grad_norm)))
        any_spoilt, any_stop = distributed.all_sum([float(spoilt), float(stop)], self.precision.device)
        if any_spoilt:
            self.optimizer.zero_grad(set_to_none=True)
            for buffer, value in zip(self.model.buffers(), buffers):
                buffer.copy_(value)
            if progress.nonfinite >= self.max_nonfinite:
                files = [name for batch in broken or group for name in batch.names]
                raise NonFiniteLoss(_report(progress, losses, grad_norm, files if spoilt else None))
            progress.nonfinite += 1
        else:
            self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        lr = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step_update(progress.updates)
        progress.updates += 1
        progress.step += parts
        if self.ema is not None and not any_spoilt:
            self.ema.update(unwrap(self.model), step=progress.updates)
        return Update(losses.mean().item(), float(grad_norm), lr, sum(len(batch.names) for batch in group), any_stop > 0)

    def _backward(self, batch: Batch, parts: int, last: bool) -> Tensor:
        """Accumulates the gradients of one of the ``parts`` batches of a group; returns its loss, a scalar."""
        device = self.precision.device
        images = batch.images.to(device, non_blocking=True)
        targets = batch.targets.to(device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext():
            with self.precision.context():
                logits = self.model(images)
            loss = self.loss_fn(logits.float(), targets)
            self.precision.scaler.scale(loss / parts).backward()
        return loss.detach()


def train_one_epoch(
    step: Step,
    loader: Iterable[Batch],
    steps: int,
    progress: Progress,
    *,
    bad_files: BadFiles,
    accumulation: int = 1,
    streaming: bool = False,
    stop: StopSignals | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_update: Callable[[Update, float], None] = lambda update, seconds: None,
) -> None:
    """Trains from ``progress.step`` to the end of the epoch, with one optimizer step per ``accumulation`` batches.

    The last group of an epoch may be shorter. With ``streaming`` the ranks may have different numbers of batches; the epoch ends
    on all ranks when the first one runs out. ``on_start`` is called once loading has begun but before any random number is drawn,
    ``on_update`` after each optimizer step with its figures and its duration in seconds, data loading included.

    Raises:
        NonFiniteLoss: as ``Step``.
        StopRequested: a signal arrived at any rank; raised on every rank.
        DataError: there are too many unreadable files.
    """
    batches = iter(loader)
    if streaming and distributed.world_size() > 1:
        batches = _agreeing(batches, step.precision.device)
    on_start()
    step.model.train()
    while progress.step < steps:
        start = time.perf_counter()
        group = _take(batches, min(accumulation, steps - progress.step))
        if not group:
            break  # a streaming reader may yield fewer images than announced
        for batch in group:
            bad_files.add(batch.unreadable)
        update = step(group, progress, stop is not None and stop.received > 0)
        on_update(update, time.perf_counter() - start)
        if update.stop:
            raise StopRequested(max(distributed.gather(stop.received if stop is not None else 0)))


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
) -> dict[str, float]:
    """Computes exact top-1 and top-5 (percent) and cross-entropy over all processes, counting each image once.

    Sums and counts are reduced once, at the end, so that ranks may have different numbers of images. ``expected`` is the size of
    the data set; unreadable images are left out and logged.

    Raises:
        RuntimeError: the number of images differs from the expected one.
        UserError: there are no images.
    """
    device = precision.device
    model.eval()
    sums = [0.0, 0.0, 0.0, 0.0]  # images, correct at 1, correct at 5, loss
    unreadable = 0
    for batch in loader:
        if stop is not None and stop.received:
            raise StopRequested(stop.received)  # nothing is lost: latest.pth was written before the evaluation
        bad_files.add(batch.unreadable)
        unreadable += len(batch.unreadable)
        if not len(batch.targets):
            continue
        targets = batch.targets.to(device, non_blocking=True)
        with precision.context():
            logits = model(batch.images.to(device, non_blocking=True))
        logits = logits.float()
        top = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        sums[0] += len(targets)
        sums[1] += top[:, 0].sum().item()
        sums[2] += top.any(dim=1).sum().item()
        sums[3] += F.cross_entropy(logits, targets, reduction="sum").item()
    count, top1, top5, loss, left_out = distributed.all_sum([*sums, float(unreadable)], device)
    if expected is not None and count + left_out != expected:
        raise RuntimeError(f"evaluation saw {count:.0f} images (+ {left_out:.0f} unreadable), but the data set has {expected}")
    if count == 0:
        raise UserError("evaluation saw no images: the validation set is empty or unreadable")
    if left_out:
        log(f"evaluation leaves out {left_out:.0f} unreadable images of {expected}")
    return dict(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, images=int(count))


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the plain model inside DDP and torch.compile."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def _take(batches: Iterator[Batch], count: int) -> list[Batch]:
    group: list[Batch] = []
    while len(group) < count and (batch := next(batches, None)) is not None:
        group.append(batch)
    return group


def _agreeing(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Stops on all ranks when one runs out: the others would otherwise wait forever for its gradients."""
    while True:
        batch = next(batches, None)
        if distributed.all_sum([float(batch is None)], device)[0] or batch is None:
            return
        yield batch


def _finite(value: float) -> bool:
    return value - value == 0


def _report(progress: Progress, losses: Tensor, grad_norm: Tensor, files: list[str] | None) -> str:
    where = f"epoch {progress.epoch}, step {progress.step}, update {progress.updates}"
    if files is None:
        return f"the loss of another process is not finite ({where})"
    listing = "\n  ".join(files)
    return f"loss {losses.tolist()}, gradient norm {float(grad_norm):g}: not finite at {where}; the images of this step:\n  {listing}"
