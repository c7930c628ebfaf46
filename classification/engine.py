"""The loops: one epoch of training, an exact evaluation, and the timing of a model."""

from __future__ import annotations

import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
from data.dataset import Batch
from data.loader import BadFiles


class NonFiniteLoss(RuntimeError):
    """Training met a NaN or infinite loss or gradient; weights and optimizer are as they were before that step."""


class StopRequested(Exception):
    """A signal asked the run to end; it is raised between steps, when everything can be saved."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns the first SIGINT or SIGTERM into a request that the loops see between steps; a second one acts at once."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Precision:
    """Mixed precision: one context for the forward pass, one scaler that does nothing unless float16 needs it."""

    device: torch.device
    mode: str = "off"  # off | fp16 | bf16
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.mode == "fp16")

    def context(self) -> torch.autocast:
        dtype = torch.float16 if self.mode == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.mode != "off")


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0  # epochs whose training and validation are complete
    step: int = 0  # batches of the current epoch that are trained, always whole groups of accumulation
    updates: int = 0  # optimizer steps in all, skipped ones included
    nonfinite: int = 0  # steps skipped because of a loss that was not finite
    best: float = 0.0  # best top-1 in percent
    best_epoch: int = -1


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    steps: int,
    optimizer: torch.optim.Optimizer,
    scheduler,
    precision: Precision,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    progress: Progress,
    *,
    mixup: Callable | None = None,
    ema=None,
    accumulation: int = 1,
    clip_grad: float = 0.0,
    max_nonfinite: int = 0,
    streaming: bool = False,
    bad_files: BadFiles,
    stop: StopSignals | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_update: Callable[[dict], None] = lambda record: None,
) -> None:
    """Trains from ``progress.step`` to the end of the epoch, one optimizer step per ``accumulation`` batches.

    The gradients of a group are those of its mean loss; the last group of an epoch may be shorter. Ranks only exchange
    gradients on the last batch of a group. With ``streaming`` the ranks may hold different numbers of batches: the epoch
    ends for all with the first that has none left. ``on_start`` runs when the first batch is being loaded and nothing random has
    happened yet, ``on_update`` after each optimizer step with the numbers of it.

    Raises:
        NonFiniteLoss: more than ``max_nonfinite`` steps had a loss that is not finite. On every rank, as StopRequested.
        StopRequested: a signal arrived at any rank.
        DataError: too many unreadable files.
    """
    device = precision.device
    batches = iter(loader)
    if streaming and distributed.world_size() > 1:
        batches = _agreeing(batches, device)
    on_start()
    model.train()
    while progress.step < steps:
        count = min(accumulation, steps - progress.step)
        start = time.perf_counter()
        group = _take(batches, count)
        if not group:
            break  # a streaming reader may hold fewer images than it announced
        # A loss that is not finite has already spoilt the running statistics of batch norm: keep what they were.
        buffers = [buffer.clone() for buffer in model.buffers()]
        names, losses = [], []
        for i, batch in enumerate(group):
            bad_files.add(batch.unreadable)
            names.append(batch.names)
            images = batch.images.to(device, non_blocking=True)
            targets = batch.targets.to(device, non_blocking=True)
            if mixup is not None:
                images, targets = mixup(images, targets)
            synchronise = i == len(group) - 1
            with nullcontext() if synchronise or not hasattr(model, "no_sync") else model.no_sync():
                with precision.context():
                    logits = model(images)
                loss = loss_fn(logits.float(), targets)
                precision.scaler.scale(loss / len(group)).backward()
            losses.append(loss.detach())

        precision.scaler.unscale_(optimizer)
        limit = clip_grad if clip_grad > 0 else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        losses = torch.stack(losses)
        broken = [i for i, value in enumerate(losses.tolist()) if not _finite(value)]
        # With a scaler an infinite gradient is ordinary: the scale was too large, the scaler skips the step by itself.
        spoilt = bool(broken) or (not precision.scaler.is_enabled() and not _finite(float(grad_norm)))
        any_spoilt, any_stop = distributed.all_sum([float(spoilt), float(stop is not None and stop.received > 0)], device)

        if any_spoilt:
            optimizer.zero_grad(set_to_none=True)
            for buffer, value in zip(model.buffers(), buffers):
                buffer.copy_(value)
            if progress.nonfinite >= max_nonfinite:
                files = [name for i in (broken or range(len(names))) for name in names[i]]
                raise NonFiniteLoss(_report(progress, losses, grad_norm, files if spoilt else None))
            progress.nonfinite += 1
        else:
            precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        rate = optimizer.param_groups[0]["lr"]
        scheduler.step_update(progress.updates)
        progress.updates += 1
        progress.step += len(group)
        if ema is not None and not any_spoilt:
            ema.update(unwrap(model), step=progress.updates)
        on_update(
            dict(
                loss=losses.mean().item(),
                grad_norm=float(grad_norm),
                lr=rate,
                images=sum(len(part) for part in names),
                seconds=time.perf_counter() - start,
            )
        )
        if any_stop:
            numbers = distributed.gather(stop.received)
            raise StopRequested(max(numbers))


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
    """Exact top-1 and top-5 (percent) and cross-entropy over all processes, each image counted once.

    Sums and counts are reduced once, at the end, so that shares of any size work. ``expected`` is the size of the data
    set; images that could not be read are left out and said.

    Raises:
        RuntimeError: the images seen are not the expected ones.
    """
    device = precision.device
    model.eval()
    sums = [0.0, 0.0, 0.0, 0.0]  # images, correct at 1, correct at 5, loss
    unreadable = 0
    for batch in loader:
        if stop is not None and stop.received:
            raise StopRequested(stop.received)  # latest.pth was written before the evaluation: nothing is lost
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
    count, top1, top5, loss, unreadable = distributed.all_sum([*sums, float(unreadable)], device)
    if expected is not None and count + unreadable != expected:
        raise RuntimeError(f"evaluation saw {count:.0f} images (+ {unreadable:.0f} unreadable), the data set has {expected}")
    if count == 0:
        raise RuntimeError("evaluation saw no images")
    if unreadable:
        log(f"evaluation leaves out {unreadable:.0f} unreadable images of {expected}")
    return dict(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, images=int(count))


@torch.inference_mode()
def throughput(model: nn.Module, images: Tensor, precision: Precision, warm_up: int = 50, timed: int = 30) -> dict[str, float]:
    """Time of a forward pass over one batch by the paper's protocol: 50 warm-up and 30 timed passes.

    Returns:
        images_per_second and latency_ms (median, p10, p90 of a pass) and peak_memory_mb (of CUDA, else of the process).
    """
    device = precision.device
    synchronise = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    model.eval()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with precision.context():
        for i in range(warm_up + timed):
            synchronise()
            start = time.perf_counter()
            model(images)
            synchronise()
            if i >= warm_up:
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return dict(
        batch_size=len(images),
        images_per_second=len(images) / median,
        latency_ms_median=1e3 * median,
        latency_ms_p10=1e3 * deciles[0],
        latency_ms_p90=1e3 * deciles[-1],
        peak_memory_mb=peak_memory_mb(device),
    )


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in use so far, MiB: of CUDA tensors on CUDA, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside DDP and torch.compile."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def _take(batches: Iterator[Batch], count: int) -> list[Batch]:
    group = []
    while len(group) < count and (batch := next(batches, None)) is not None:
        group.append(batch)
    return group


def _agreeing(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Ends for all ranks when it ends for one: a rank alone would wait for the others' gradients for ever."""
    while True:
        batch = next(batches, None)
        if distributed.all_sum([float(batch is None)], device)[0]:
            return
        yield batch


def _finite(value: float) -> bool:
    return value - value == 0


def _report(progress: Progress, losses: Tensor, grad_norm: Tensor, files: list[str] | None) -> str:
    where = f"epoch {progress.epoch}, step {progress.step}, update {progress.updates}"
    if files is None:
        return f"the loss of another process is not finite ({where})"
    listing = "\n  ".join(files)
    return f"loss {losses.tolist()}, gradient norm {float(grad_norm):g}: not finite at {where}; the images of it:\n  {listing}"
