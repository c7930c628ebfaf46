"""Trains, evaluates and times LITv2 on images. From this folder:

    python main.py --cfg configs/litv2-digits.yaml                                  # embedded data set, a few minutes on a CPU
    python main.py --cfg configs/litv2-small.yaml --data-path DIR                   # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE
    torchrun --nproc-per-node 8 main.py --cfg configs/litv2-small.yaml --data-path DIR --batch-size 128 --amp bf16
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --resume litv2_s.pth --eval
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --pretrained litv2_s.pth --opts TRAIN.EPOCHS 30
    python main.py --cfg configs/litv2-small.yaml --throughput --batch-size 64

Results go to OUTPUT/MODEL.NAME/TAG; running the same command again goes on from there. ``config.py`` lists every key.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 and hilo of this checkout, installed or not

import checkpoint
import distributed
import engine
import numpy as np
import PIL
import timm
import torch
from config import parse_args, to_dict
from data import build_loaders, build_mixup
from data.loader import BadFiles, Loaders
from data.sources import DataError
from logger import Logger, read_metrics
from optim import build_optimizer, build_scheduler
from plots import plot_curves, plot_predictions
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

from litv2 import LITv2
from litv2.checkpoint import find_weights, load_weights, read_checkpoint


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit code: 0, 1 after an error, 128 + N after signal N."""
    config = parse_args(argv)
    try:
        device = distributed.pick_device(config.DEVICE)
        distributed.init(device)
        return throughput(config, device) if config.THROUGHPUT_MODE else run(config, device)
    except (DataError, engine.NonFiniteLoss, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.shutdown()


def build_model(config: CfgNode, num_classes: int) -> LITv2:
    lit = config.MODEL.LIT
    model = LITv2(
        in_chans=lit.IN_CHANS,
        num_classes=num_classes,
        patch_size=lit.PATCH_SIZE,
        embed_dim=lit.EMBED_DIM,
        depths=tuple(lit.DEPTHS),
        num_heads=tuple(lit.NUM_HEADS),
        mlp_ratio=lit.MLP_RATIO,
        qkv_bias=lit.QKV_BIAS,
        local_ws=tuple(lit.LOCAL_WS),
        alpha=lit.ALPHA,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
    )
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model


def throughput(config: CfgNode, device: torch.device) -> int:
    size = config.DATA.IMG_SIZE
    model = build_model(config, config.MODEL.NUM_CLASSES if config.MODEL.NUM_CLASSES > 0 else 1000).to(device)
    if config.COMPILE:
        model = torch.compile(model)
    images = torch.randn(config.DATA.BATCH_SIZE, config.MODEL.LIT.IN_CHANS, size, size, device=device)
    result = dict(
        model=config.MODEL.NAME,
        image_size=size,
        device=str(device),
        threads=torch.get_num_threads(),
        amp=config.AMP,
        compile=config.COMPILE,
        torch=str(torch.__version__),
        **engine.throughput(model, images, engine.Precision(device, config.AMP)),
    )
    if distributed.rank() == 0:
        for key, value in result.items():
            print(f"{key:>20}: {value:.2f}" if isinstance(value, float) else f"{key:>20}: {value}")
        folder = output_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "throughput.json").write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {folder / 'throughput.json'}")
    return 0


def run(config: CfgNode, device: torch.device) -> int:
    """Training, or with EVAL_MODE evaluation alone."""
    folder = output_folder(config)
    log = Logger(folder, active=distributed.rank() == 0)
    log(f"torch {torch.__version__}, timm {timm.__version__}, {distributed.world_size()} x {device}, results in {folder}")
    _seed(config.SEED + distributed.rank())

    # What to start from is read first: a wrong file should not cost the opening of a large data set.
    resumed = _find_checkpoint(config, folder, log)
    loaders = build_loaders(config)
    num_classes = _check_classes(config, loaders, resumed)
    _seed(config.SEED)  # the same weights on every rank
    model = build_model(config, num_classes).to(device)
    if config.MODEL.PRETRAINED:
        for note in load_weights(model, find_weights(read_checkpoint(config.MODEL.PRETRAINED)), allow_new_head=True):
            log(f"{config.MODEL.PRETRAINED}: {note}")
    precision = engine.Precision(device, config.AMP)
    bad_files = BadFiles(config.DATA.MAX_BAD_FILES, print)
    stop = engine.StopSignals()
    log(f"{config.MODEL.NAME}: {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters, "
        f"{model.flops(config.DATA.IMG_SIZE, config.DATA.IMG_SIZE) / 1e9:.3f} GFLOPs, {num_classes} classes")  # fmt: skip

    if config.EVAL_MODE:
        if resumed is not None:
            load_weights(model, find_weights(resumed))
        elif not config.MODEL.PRETRAINED:
            raise ValueError("--eval needs the weights to evaluate: --resume FILE or --pretrained FILE")
        result = engine.evaluate(model, loaders.val, precision, expected=loaders.val_size, bad_files=bad_files, log=log)
        log(f"Acc@1 {result['top1']:.3f}  Acc@5 {result['top5']:.3f}  loss {result['loss']:.4f}  images {result['images']}")
        log.close()
        return 0

    training = Training(config, folder, log, model, loaders, precision, bad_files, stop)
    if resumed is not None:
        training.load(resumed)
    if distributed.rank() == 0:
        (folder / "config.yaml").write_text(config.dump())
    try:
        training.fit()
    except engine.StopRequested as request:
        log(f"{request}: saved at epoch {training.progress.epoch}, step {training.progress.step}; the same command goes on from there")
        return 128 + request.number
    finally:
        log.close()
    return 0


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
        _seed(config.SEED + 1000 + distributed.rank())
        self._random_states: list[dict] | None = None

        self.runner = torch.compile(model) if config.COMPILE else model
        if distributed.world_size() > 1:
            ids = [precision.device] if precision.device.type == "cuda" else None
            self.runner = DistributedDataParallel(self.runner, device_ids=ids)

    @property
    def best_model(self) -> nn.Module:
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
        distributed.broadcast_buffers(self.best_model)
        return engine.evaluate(
            self.best_model, self.loaders.val, self.precision,
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
                    self.best_model, self.loaders.val.dataset, self.loaders.class_names, self.config, self.precision, predictions
                )
            rows = [
                ("best Acc@1", f"{progress.best:.3f} % after epoch {progress.best_epoch + 1}"),
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
        self.scheduler.load_state_dict(state["scheduler"])
        self.precision.scaler.load_state_dict(state["scaler"]) if state["scaler"] else None
        self.progress = engine.Progress(**state["progress"])
        self._random_states = state["random_states"]
        then, now = state["sampler"], dict(batch_size=self.loaders.batch_size, world_size=distributed.world_size())
        if self.progress.step and any(then[key] != now[key] for key in now):
            self.log(f"resumed within an epoch with {now} instead of { {key: then[key] for key in now} }: the epoch starts again")
            self.progress.step = 0
        if then["steps_per_epoch"] != self.loaders.steps_per_epoch:
            self.log(f"an epoch has {self.loaders.steps_per_epoch} steps, it had {then['steps_per_epoch']}: the schedule shifts")
        self.log.forget_after(self.progress.updates)
        self.log(f"resumed at epoch {self.progress.epoch}, step {self.progress.step}, update {self.progress.updates}")

    def _restore_random_state(self) -> None:
        if self._random_states is not None:
            checkpoint.restore_random_state(self._random_states, self.log)
            self._random_states = None


def output_folder(config: CfgNode) -> Path:
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def _find_checkpoint(config: CfgNode, folder: Path, log: Logger) -> dict | None:
    """What --resume names, else the newest of the output folder (unless only weights or an evaluation are asked for)."""
    if config.MODEL.RESUME:
        log(f"resuming from {config.MODEL.RESUME}")
        return read_checkpoint(config.MODEL.RESUME)
    if config.EVAL_MODE or not config.TRAIN.AUTO_RESUME:
        return None
    found = checkpoint.find_latest(folder, log)
    if found is None:
        return None
    log(f"resuming from {found[0]}")
    return found[1]


def _check_classes(config: CfgNode, loaders: Loaders, resumed: dict | None) -> int:
    found = len(loaders.class_names)
    if config.MODEL.NUM_CLASSES not in (-1, found):
        raise DataError(f"MODEL.NUM_CLASSES={config.MODEL.NUM_CLASSES}, but the training data has {found} classes")
    names = (resumed or {}).get("class_names")
    if names and list(names) != list(loaders.class_names):
        raise DataError(f"the checkpoint was trained on other classes ({len(names)}: {', '.join(names[:5])} ...) than the data has "
                        f"({found}: {', '.join(loaders.class_names[:5])} ...)")  # fmt: skip
    return found


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


if __name__ == "__main__":
    sys.exit(main())
