"""A training run: what it holds between steps, saves in checkpoints, and does after each epoch."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import asdict

import numpy as np
import PIL
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import distributed
import engine
from config import to_dict
from data import build_mixup
from litv2.weights.state_dict import load_weights
from logger import read_metrics
from optim import build_optimizer, build_scheduler
from plots import plot_curves, plot_predictions


class Training:
    """Everything that a run holds between steps: what a checkpoint saves and restores."""

    def __init__(self, config, folder, log, model, loaders, precision, bad_files, stop):
        self.config, self.folder, self.log, self.loaders = config, folder, log, loaders
        self.precision, self.bad_files, self.stop = precision, bad_files, stop
        self.progress = engine.Progress()
        self.accumulation = config.TRAIN.ACCUMULATION_STEPS
        total_batch = loaders.batch_size * distributed.world_size() * self.accumulation
        self.updates_per_epoch = -(-loaders.steps_per_epoch // self.accumulation)

        self.model = model
        self.optimizer = build_optimizer(config, model, total_batch)
        self.scheduler = build_scheduler(config, self.optimizer, self.updates_per_epoch, total_batch)
        self.ema = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=True) if config.TRAIN.EMA_DECAY else None
        self.mixup = build_mixup(config, model.num_classes)
        if self.mixup is not None:
            self.loss_fn = SoftTargetCrossEntropy()
        elif config.MODEL.LABEL_SMOOTHING > 0:
            self.loss_fn = LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
        else:
            self.loss_fn = nn.CrossEntropyLoss()
        # Rank by rank, so that dropout, mixup and drop path differ between processes.
        seed_everything(config.SEED + 1000 + distributed.rank())
        self._random_states: list[dict] | None = None

        self.runner = torch.compile(model) if config.COMPILE else model
        if distributed.world_size() > 1:
            ids = [precision.device] if precision.device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, device_ids=ids)

    @property
    def evaluated_model(self) -> nn.Module:
        """The one that is evaluated: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def fit(self) -> None:
        config, progress, steps = self.config, self.progress, self.loaders.steps_per_epoch
        if progress.epoch >= config.TRAIN.EPOCHS:
            self.log(f"all {config.TRAIN.EPOCHS} epochs are done already; another --tag starts afresh")
        else:
            self.log(f"{config.TRAIN.EPOCHS} epochs of {steps} steps, {self.updates_per_epoch} updates each; "
                     f"total batch {self.loaders.batch_size * distributed.world_size() * self.accumulation}")  # fmt: skip
        start, done_before = time.perf_counter(), progress.epoch
        while progress.epoch < config.TRAIN.EPOCHS:
            self._train_epoch()
            done = progress.epoch + 1
            result, better = None, False
            if done % config.EVAL_FREQ == 0 or done == config.TRAIN.EPOCHS:
                self._save_latest()  # the evaluation may be interrupted; written again after it, with its result
                result = self._evaluate()
                better = result["top1"] > progress.best or progress.best_epoch < 0
                if better:
                    progress.best, progress.best_epoch = result["top1"], progress.epoch
            progress.epoch, progress.step = done, 0
            if result is not None:
                per_epoch = (time.perf_counter() - start) / (done - done_before)
                self.log(f"epoch {done}/{config.TRAIN.EPOCHS}  Acc@1 {result['top1']:.3f}  Acc@5 {result['top5']:.3f}  "
                         f"val loss {result['loss']:.4f}  best {progress.best:.3f}  {per_epoch:.1f} s/epoch, "
                         f"{_clock(per_epoch * (config.TRAIN.EPOCHS - done))} left")  # fmt: skip
                self.log.metrics("val", progress.updates, epoch=done, **result)
            state = self._save_latest()
            if distributed.rank() == 0:
                if better:
                    checkpoint.save(self.folder / checkpoint.BEST, state)
                if config.SAVE_FREQ and done % config.SAVE_FREQ == 0:
                    checkpoint.save(self.folder / f"epoch-{done:04d}.pth", state)
        self._finish()

    def _train_epoch(self) -> None:
        config, progress, steps = self.config, self.progress, self.loaders.steps_per_epoch
        sampler = self.loaders.sampler
        if sampler is not None:
            sampler.epoch, sampler.skip = progress.epoch, progress.step * sampler.batch_size
        elif hasattr(self.loaders.train.dataset.dataset, "set_epoch"):
            self.loaders.train.dataset.dataset.set_epoch(progress.epoch)
        since = dict(loss=0.0, images=0, seconds=0.0, updates=0)

        def on_update(record: dict) -> None:
            for key in ("loss", "images", "seconds"):
                since[key] += record[key]
            since["updates"] += 1
            rate = since["images"] * distributed.world_size() / max(since["seconds"], 1e-9)
            loss = since["loss"] / since["updates"]
            memory = engine.peak_memory_mb(self.precision.device)
            self.log.advance_bar(self.accumulation, loss=f"{loss:.4f}", lr=f"{record['lr']:.2e}", img_s=f"{rate:.0f}", mem=f"{memory:.0f}M")
            if progress.step % config.PRINT_FREQ < self.accumulation or progress.step >= steps:
                self.log.metrics("train", progress.updates, epoch=progress.epoch, loss=loss, lr=record["lr"],
                                 grad_norm=record["grad_norm"], images_per_second=rate, memory_mb=memory)  # fmt: skip
                left = (steps - progress.step) / self.accumulation * since["seconds"] / since["updates"]
                self.log(f"epoch {progress.epoch + 1}  step {progress.step}/{steps}  loss {loss:.4f}  lr {record['lr']:.3e}  "
                         f"grad norm {record['grad_norm']:.2f}  {rate:.0f} images/s  {memory:.0f} MiB  {_clock(left)} left")  # fmt: skip
                since.update(loss=0.0, images=0, seconds=0.0, updates=0)
            if config.SAVE_STEPS and progress.updates % config.SAVE_STEPS == 0:
                self._save_latest()

        self.log.start_bar(f"epoch {progress.epoch + 1}/{config.TRAIN.EPOCHS}", steps, progress.step)
        try:
            engine.train_one_epoch(
                self.runner, self.loaders.train, steps, self.optimizer, self.scheduler, self.precision, self.loss_fn, progress,
                mixup=self.mixup, ema=self.ema, accumulation=self.accumulation, clip_grad=config.TRAIN.CLIP_GRAD,
                max_nonfinite=config.TRAIN.MAX_NONFINITE, streaming=sampler is None, bad_files=self.bad_files, stop=self.stop,
                on_start=self._restore_random_state, on_update=on_update,
            )  # fmt: skip
        except (engine.NonFiniteLoss, engine.StopRequested):
            self._save_latest()
            raise
        finally:
            self.log.end_bar()
        progress.step = steps

    def _evaluate(self) -> dict:
        distributed.broadcast_buffers(self.evaluated_model)
        return engine.evaluate(
            self.evaluated_model, self.loaders.val, self.precision,
            expected=self.loaders.val_size, bad_files=self.bad_files, log=self.log, stop=self.stop,
        )  # fmt: skip

    def _finish(self) -> None:
        """The pictures and the last lines."""
        progress = self.progress
        if distributed.rank() == 0:
            curves, predictions = self.folder / "curves.png", self.folder / "predictions.png"
            plot_curves(read_metrics(self.folder), self.updates_per_epoch, curves)
            if self.loaders.sampler is not None:  # a streaming reader has no image number 7
                plot_predictions(
                    self.evaluated_model, self.loaders.val.dataset, self.loaders.class_names, self.config, self.precision, predictions
                )
            last = [row for row in read_metrics(self.folder) if row["kind"] == "val"][-1]
            rows = [
                ("images", f"{last['images']} of validation, {len(self.loaders.class_names)} classes"),
                ("final Acc@1", f"{last['top1']:.3f} %  (Acc@5 {last['top5']:.3f} %, loss {last['loss']:.4f})"),
                ("best Acc@1", f"{progress.best:.3f} %  after epoch {progress.best_epoch + 1}"),
                ("curves", curves),
                ("predictions", predictions),
                ("best weights", self.folder / checkpoint.BEST),
                ("log and metrics", self.folder / "log.txt"),
            ]
            for name, value in rows:
                self.log(f"{name:>16}  {value}")

    def _save_latest(self) -> dict:
        """All ranks take part; rank 0 writes. Returns the state that was written."""
        states = distributed.gather(checkpoint.random_state())
        state = dict(
            model=self.model.state_dict(),
            ema=None if self.ema is None else self.ema.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            scaler=self.precision.scaler.state_dict(),
            progress=asdict(self.progress),
            epoch=self.progress.epoch,
            sampler=dict(
                epoch=self.progress.epoch,
                images=self.progress.step * self.loaders.batch_size * distributed.world_size(),
                batch_size=self.loaders.batch_size,
                world_size=distributed.world_size(),
                steps_per_epoch=self.loaders.steps_per_epoch,
            ),
            random_states=states,
            config=to_dict(self.config),
            class_names=list(self.loaders.class_names),
            versions=dict(python=sys.version.split()[0], torch=str(torch.__version__), timm=timm.__version__, pillow=PIL.__version__),
        )
        if distributed.rank() == 0:
            checkpoint.save_latest(self.folder, state)
        distributed.barrier()
        return state

    def load(self, state: dict) -> None:
        """Goes on from a checkpoint of ours, at the very step where it was written."""
        needed = ("model", "optimizer", "progress", "sampler", "random_states")
        if missing := [key for key in needed if key not in state]:
            raise ValueError(f"the checkpoint has no {', '.join(missing)}: it cannot be resumed; --pretrained FILE takes its weights alone")
        load_weights(self.model, state["model"])
        if self.ema is not None:
            load_weights(self.ema.module, state["ema"] or state["model"])
            if state["ema"] is None:
                self.log("the checkpoint has no moving average: it starts from the weights")
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scheduler"] != self.scheduler.state_dict():  # a pure function of the step: nothing else to restore
            self.log("the schedule of learning rates is no longer the checkpoint's: from here on the configuration's holds")
        self.precision.scaler.load_state_dict(state["scaler"]) if state["scaler"] else None
        self.progress = engine.Progress(**state["progress"])
        self._random_states = state["random_states"]
        then, now = state["sampler"], dict(batch_size=self.loaders.batch_size, world_size=distributed.world_size())
        if self.progress.step and any(then[key] != now[key] for key in now):
            self.log(f"resumed within an epoch with {now} instead of { {key: then[key] for key in now} }: the epoch starts again")
            self.progress.step = 0
        if then["steps_per_epoch"] != self.loaders.steps_per_epoch:
            self.log(f"an epoch has {self.loaders.steps_per_epoch} steps, it had {then['steps_per_epoch']}: the schedule shifts")
        self.log.forget_after(self.progress.updates, self.progress.epoch)
        self.log(f"resumed at epoch {self.progress.epoch}, step {self.progress.step}, update {self.progress.updates}")

    def _restore_random_state(self) -> None:
        if self._random_states is not None:
            checkpoint.restore_random_state(self._random_states, self.log)
            self._random_states = None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
