# SPDX-License-Identifier: Apache-2.0
"""A training run: its state between steps, its checkpoints, and the work after each epoch."""

from __future__ import annotations

import logging
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
import PIL
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm
from yacs.config import CfgNode

import checkpoint
import distributed
import engine
from balance import build_weighted_loss
from config import to_dict
from data import build_mixup
from data.dataset import ImageDataset, StreamingDataset, seeded
from data.loader import Loaders
from distillation import build_distillation
from freezing import Freezing
from litv2 import LITv2
from litv2.errors import UserError
from litv2.runs.outputs import Outputs
from litv2.runs.signals import StopRequested, StopSignals
from litv2.runs.unreadable import BadFiles
from litv2.weights.state_dict import load_weights
from logger import LOG
from memory import peak_memory_mb
from metrics import Metrics, read_metrics
from optim import build_optimizer, build_scheduler
from plots import plot_curves, plot_predictions
from precision import Precision
from report import PAGE, REPORT, Predictions
from samples import SAMPLES, draw_samples
from tasks import build_loss, task_of


class Training:
    """The state of a run between steps, which checkpoints save and restore."""

    def __init__(
        self,
        config: CfgNode,
        folder: Path,
        log: logging.Logger,
        model: LITv2,
        loaders: Loaders,
        precision: Precision,
        bad_files: BadFiles,
        stop: StopSignals,
    ):
        self.config, self.folder, self.log, self.loaders = config, folder, log, loaders
        self.model, self.bad_files, self.stop = model, bad_files, stop
        self.task = task_of(config)
        self.thresholds: list[float] | None = None  # of the classes of a multi-label model, fitted by the last evaluation
        self.metrics = Metrics(folder, active=distributed.rank() == 0, warn=log.warning)
        self.progress = engine.Progress()
        self.seen: Predictions | None = None  # of the last evaluation
        self.complete = False
        self.accumulation = config.TRAIN.ACCUMULATION_STEPS
        self.total_batch = loaders.batch_size * distributed.world_size() * self.accumulation
        self.updates_per_epoch = -(-loaders.steps_per_epoch // self.accumulation)

        self.freezing = Freezing(config, model)
        if not config.TRAIN.UNFREEZE_EVERY:  # what is never trained has no place in the optimizer
            self.freezing.apply(epoch=0)
        distillation = build_distillation(config, model, loaders.class_names, precision.device, log.info)
        student = model if distillation is None else distillation.student(model)
        self.projection = None if distillation is None else distillation.projection
        optimizer = build_optimizer(config, model, self.total_batch, self.projection)
        scheduler = build_scheduler(config, optimizer, self.updates_per_epoch, self.total_batch)
        ema = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=True) if config.TRAIN.EMA_DECAY else None
        mixup = build_mixup(config, model.num_classes, loaders.vectors)
        if config.TRAIN.CLASS_WEIGHTS == "none":
            loss = build_loss(config, mixup is not None, loaders.vectors)
        else:
            loss = build_weighted_loss(config, loaders, log.info).to(precision.device)
        # A different seed per rank, so that dropout, mixup and drop path differ between processes.
        seed_everything(config.SEED + 1000 + distributed.rank())
        self._random_states: list[dict] | None = None

        self.freezing.apply(epoch=0)
        if self.freezing.frozen:
            log.info(str(self.freezing))
        self.step = engine.Step(
            distributed.parallel(student, precision.device, config.COMPILE),
            optimizer, scheduler, loss, precision, mixup, ema,
            clip_grad=config.TRAIN.CLIP_GRAD, max_nonfinite=config.TRAIN.MAX_NONFINITE, distillation=distillation,
        )  # fmt: skip

    @property
    def evaluated_model(self) -> nn.Module:
        """The model to evaluate: the moving average, if there is one."""
        return self.model if self.step.ema is None else self.step.ema.module

    def fit(self) -> None:
        config, progress, steps = self.config, self.progress, self.loaders.steps_per_epoch
        if progress.epoch >= config.TRAIN.EPOCHS:
            self.log.info(f"all {config.TRAIN.EPOCHS} epochs are already done; use another --tag to start a new run")
        elif not self._out_of_patience():
            self.log.info(f"{config.TRAIN.EPOCHS} epochs of {steps} steps, {self.updates_per_epoch} updates each; "
                          f"total batch {self.total_batch}")  # fmt: skip
            self.metrics.start_trackers(config, resumed=progress.updates > 0, log=self.log.info)
        if not progress.updates:
            self.metrics.forget_after(0, 0)  # rows of another run in this folder, which its checkpoints do not survive either
        if not progress.updates and distributed.rank() == 0 and isinstance(self.loaders.train.dataset, ImageDataset):
            with Outputs(self.log.warning).writing(self.folder / SAMPLES):
                draw_samples(self.loaders.train.dataset, self.loaders.class_names, config, self.folder / SAMPLES)
        start, done_before = time.perf_counter(), progress.epoch
        while progress.epoch < config.TRAIN.EPOCHS and not self._out_of_patience():
            self._train_epoch()
            done = progress.epoch + 1
            result, better = None, False
            if done % config.EVAL_FREQ == 0 or done == config.TRAIN.EPOCHS:
                self._save_latest()  # before the evaluation, which may be interrupted; saved again with its result
                last = done == config.TRAIN.EPOCHS or 0 < config.TRAIN.PATIENCE <= progress.since_best + 1
                self.seen = Predictions() if last else None
                result = self._evaluate()
                self.thresholds = result.pop("thresholds", None)
                better = result[self.task.best] > progress.best or progress.best_epoch < 0
                if better:
                    progress.best, progress.best_epoch = result[self.task.best], progress.epoch
                progress.since_best = 0 if better else progress.since_best + 1
            progress.epoch, progress.step = done, 0
            if result is not None:
                per_epoch = (time.perf_counter() - start) / (done - done_before)
                self.log.info(f"epoch {done}/{config.TRAIN.EPOCHS}  {self.task.line(result)}  "
                              f"val loss {result['loss']:.4f}  best {progress.best:.3f}  {per_epoch:.1f} s/epoch, "
                              f"{_clock(per_epoch * (config.TRAIN.EPOCHS - done))} left")  # fmt: skip
                self.metrics.write("val", progress.updates, epoch=done, **result)
            state = self._save_latest()
            if distributed.rank() == 0:
                if better:
                    checkpoint.save(self.folder / checkpoint.BEST, state)
                if config.SAVE_FREQ and done % config.SAVE_FREQ == 0:
                    checkpoint.save(self.folder / f"epoch-{done:04d}.pth", state)
        if progress.epoch < config.TRAIN.EPOCHS:
            self.log.info(f"stopped after epoch {progress.epoch} of {config.TRAIN.EPOCHS}: none of the last {progress.since_best} "
                          f"evaluations was better than that of epoch {progress.best_epoch + 1}; a TRAIN.PATIENCE above "
                          f"{config.TRAIN.PATIENCE}, or 0, would go on")  # fmt: skip
        self._finish()

    def _out_of_patience(self) -> bool:
        return 0 < self.config.TRAIN.PATIENCE <= self.progress.since_best

    def close(self) -> None:
        self.metrics.close(self.complete)

    def _train_epoch(self) -> None:
        config, progress, steps = self.config, self.progress, self.loaders.steps_per_epoch
        if self.freezing.apply(progress.epoch):
            self.log.info(str(self.freezing))
            # DDP exchanges the gradients of the parameters that needed one when it was made.
            self.step.model = distributed.parallel(distributed.unwrap(self.step.model), self.step.precision.device, config.COMPILE)
        sampler = self.loaders.sampler
        if sampler is not None:
            sampler.epoch, sampler.skip = progress.epoch, progress.step * sampler.batch_size
        else:
            reader = cast(StreamingDataset, self.loaders.train.dataset).dataset
            if hasattr(reader, "set_epoch"):
                reader.set_epoch(progress.epoch)
        bar = tqdm(
            desc=f"epoch {progress.epoch + 1}/{config.TRAIN.EPOCHS}", total=steps, initial=progress.step, unit="step",
            dynamic_ncols=True, leave=False, disable=distributed.rank() != 0 or not sys.stderr.isatty(),
        )  # fmt: skip
        since: list[tuple[engine.Update, float]] = []  # the steps since the last log line, and their durations in seconds

        def on_update(update: engine.Update, seconds: float) -> None:
            since.append((update, seconds))
            updates, times = zip(*since)
            mean_time, loss = fmean(times), fmean(update.loss for update in updates)
            rate = sum(update.images for update in updates) * distributed.world_size() / max(sum(times), 1e-9)
            memory = peak_memory_mb(step.precision.device)
            mem = "?" if memory is None else f"{memory:.0f}MB"
            bar.set_postfix(loss=f"{loss:.4f}", lr=f"{update.lr:.2e}", img_s=f"{rate:.0f}", mem=mem, refresh=False)
            bar.update(self.accumulation)
            if progress.step % config.PRINT_FREQ < self.accumulation or progress.step >= steps:
                self.metrics.write("train", progress.updates, epoch=progress.epoch, loss=loss, lr=update.lr,
                                   grad_norm=update.grad_norm, images_per_second=rate, memory_mb=memory)  # fmt: skip
                left, norm = (steps - progress.step) / self.accumulation * mean_time, fmean(update.grad_norm for update in updates)
                self.log.info(f"Train: [{progress.epoch}/{config.TRAIN.EPOCHS}][{progress.step}/{steps}] eta {_clock(left)} "
                              f"lr {update.lr:.6g} time {seconds:.4f} ({mean_time:.4f}) loss {update.loss:.4f} ({loss:.4f}) "
                              f"grad_norm {update.grad_norm:.4f} ({norm:.4f}) mem {mem}")  # fmt: skip
                since.clear()

        step = self.step
        try:
            engine.train_one_epoch(
                step, self.loaders.train, steps, progress, accumulation=self.accumulation, streaming=sampler is None,
                save_steps=config.SAVE_STEPS, bad_files=self.bad_files, stop=self.stop,
                on_start=self._start_epoch, on_update=on_update, on_save=self._save_latest,
            )  # fmt: skip
        except (engine.NonFiniteLoss, StopRequested):
            self._save_latest()
            raise
        finally:
            bar.close()
        progress.step = steps

    def _evaluate(self) -> dict:
        distributed.broadcast_buffers(self.evaluated_model)
        with seeded(self.config.SEED):  # packages that it imports draw random numbers, in a resumed run once more
            return engine.evaluate(
                self.evaluated_model, self.loaders.val, self.step.precision,
                expected=self.loaders.val_size, bad_files=self.bad_files, log=self.log.info, stop=self.stop, keep=self.seen,
                multi_label=self.config.MODEL.TASK == "multi",
            )  # fmt: skip

    def _finish(self) -> None:
        """Draws the pictures, writes the report and logs the summary."""
        self.complete = True
        progress = self.progress
        outputs = Outputs(self.log.warning)
        if self.seen is not None:  # else the run had been finished before
            with outputs.writing(self.folder / REPORT):
                self.task.write_report(self.folder / REPORT, self.seen, self.loaders, self.config)
        if distributed.rank() == 0:
            curves, predictions = self.folder / "curves.png", self.folder / "predictions.png"
            metrics = read_metrics(self.folder)
            with outputs.writing(curves):
                plot_curves(metrics, self.updates_per_epoch, curves, {key: label for key, (_, label) in self.task.figures.items()})
            if self.loaders.sampler is not None:  # a streaming reader cannot be indexed
                images = cast(ImageDataset, self.loaders.val.dataset)
                with outputs.writing(predictions):
                    plot_predictions(self.evaluated_model, images, self.loaders.class_names, self.config, self.step.precision, predictions)
            rows: list[tuple[str, object]] = []
            last = next((row for row in reversed(metrics) if row["kind"] == "val"), None)
            if last is not None:  # it could be written
                rows += [
                    ("images", f"{last['images']} of validation, {len(self.loaders.class_names)} classes"),
                    ("final figures", f"{self.task.line(last)} %, loss {last['loss']:.4f}"),
                ]
            rows += [
                (f"best {self.task.best_name}", f"{progress.best:.3f} %  after epoch {progress.best_epoch + 1}"),
                ("curves", curves),
                ("predictions", predictions),
                ("report", self.folder / REPORT / PAGE),
                ("best weights", self.folder / checkpoint.BEST),
                ("log and metrics", self.folder / LOG.format(0)),
            ]
            for name, value in rows:
                self.log.info(f"{name:>16}  {value}")

    def _save_latest(self) -> dict:
        """Saves latest.pth and returns its state. Called on all ranks; rank 0 writes."""
        step, states = self.step, distributed.gather(checkpoint.random_state())
        state = dict(
            model=self.model.state_dict(),
            ema=None if step.ema is None else step.ema.module.state_dict(),
            projection=None if self.projection is None else self.projection.state_dict(),
            optimizer=step.optimizer.state_dict(),
            scheduler=step.scheduler.state_dict(),
            scaler=step.precision.scaler.state_dict(),
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
            thresholds=self.thresholds,
            versions=dict(python=sys.version.split()[0], torch=str(torch.__version__), timm=timm.__version__, pillow=PIL.__version__),
        )
        if distributed.rank() == 0:
            checkpoint.save_latest(self.folder, state)
        distributed.barrier()
        return state

    def load(self, state: dict) -> None:
        """Resumes from a checkpoint of this trainer, at the exact step at which it was written.

        Raises:
            UserError: the checkpoint holds only weights, or is for another model or optimizer.
        """
        step = self.step
        needed = ("model", "optimizer", "progress", "sampler", "random_states", "config")
        if missing := [key for key in needed if key not in state]:
            raise UserError(f"the checkpoint has no {', '.join(missing)} to resume from; use --pretrained FILE to load only its weights")
        load_weights(self.model, state["model"])
        if step.ema is not None:
            load_weights(step.ema.module, state["ema"] or state["model"])
            if state["ema"] is None:
                self.log.info("the checkpoint has no moving average; starting it from the weights")
        trained, train = state["config"]["TRAIN"], self.config.TRAIN
        for key, before, wanted in (
            ("OPTIMIZER.NAME", trained["OPTIMIZER"]["NAME"], train.OPTIMIZER.NAME),
            ("FREEZE", trained.get("FREEZE", "0"), train.FREEZE),
            ("UNFREEZE_EVERY", trained.get("UNFREEZE_EVERY", 0), train.UNFREEZE_EVERY),
        ):
            if before != wanted:
                raise UserError(f"the checkpoint was trained with TRAIN.{key}={before} and cannot be resumed with {wanted}; "
                                "use --pretrained FILE to load only its weights")  # fmt: skip
        if (self.projection is None) != (state.get("projection") is None):
            raise UserError("a run with DISTILL.FEATURES above 0 cannot be resumed without, nor one without them with; "
                            "use --pretrained FILE to load only its weights")  # fmt: skip
        if self.projection is not None:
            load_weights(self.projection, state["projection"])
        step.optimizer.load_state_dict(state["optimizer"])
        if state["scheduler"] != step.scheduler.state_dict():  # a pure function of the step, so there is nothing to restore
            self.log.info("the learning-rate schedule differs from the checkpoint's; continuing with that of the configuration")
        if state["scaler"]:
            step.precision.scaler.load_state_dict(state["scaler"])
        self.progress = engine.Progress(**state["progress"])
        self.thresholds = state.get("thresholds")
        self._random_states = state["random_states"]
        then, now = state["sampler"], dict(batch_size=self.loaders.batch_size, world_size=distributed.world_size())
        if self.progress.step and any(then[key] != now[key] for key in now):
            self.log.info(f"resumed within an epoch with {now} instead of { {key: then[key] for key in now} }; restarting the epoch")
            self.progress.step = 0
        if then["steps_per_epoch"] != self.loaders.steps_per_epoch:
            self.log.info(f"steps per epoch: {then['steps_per_epoch']} -> {self.loaders.steps_per_epoch}; this shifts the schedule")
        self.metrics.forget_after(self.progress.updates, self.progress.epoch)
        self.log.info(f"resumed at epoch {self.progress.epoch}, step {self.progress.step}, update {self.progress.updates}")

    def _start_epoch(self) -> None:
        self.freezing.set_modes()
        if self._random_states is not None:
            checkpoint.restore_random_state(self._random_states, self.log.warning)
            self._random_states = None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
