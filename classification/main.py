# SPDX-License-Identifier: Apache-2.0
"""Trains, evaluates and times LITv2 on images. From this folder:

    python main.py --cfg configs/litv2-digits.yaml                                  # built-in data set, a few minutes on a CPU
    python main.py --cfg configs/litv2-small.yaml --data-path DIR                   # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE
    torchrun --standalone --nproc-per-node=8 main.py --cfg configs/litv2-small.yaml --data-path DIR --batch-size 128
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --pretrained litv2_small --eval
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --pretrained litv2_small --opts TRAIN.EPOCHS 30
    python main.py --cfg configs/litv2-small.yaml --throughput --batch-size 64

Results go to OUTPUT/MODEL.NAME/TAG; running the same command again resumes from there. ``config.py`` lists every key.
The commands and YAML files of the public release work unchanged.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 and hilo from this checkout, installed or not

import timm
import torch
from torch import nn
from yacs.config import CfgNode

import checkpoint
import distributed
import engine
from class_map import imagenet_outputs, keep_outputs
from config import default_config, parse_args
from data import build_loaders
from data.loader import Loaders, with_transform
from data.sources import DataError
from data_summary import summarise
from heads import keep_shared_classes, names_in
from litv2.classes import imagenet_classes, task_in
from litv2.compilation import COMPILE_OPTIONS
from litv2.errors import UserError, run_program
from litv2.files import atomic_write, remove_drafts
from litv2.runs.failures import in_one_line
from litv2.runs.outputs import Outputs
from litv2.runs.signals import StopRequested, StopSignals
from litv2.runs.unreadable import BadFiles
from litv2.weights.download import fetch
from litv2.weights.reading import read_checkpoint
from litv2.weights.state_dict import find_weights, load_weights
from logger import close_log, open_log
from network import Build, build_model
from precision import Precision, choose_precision, set_tf32
from report import PAGE, REPORT, Predictions
from robustness import measure_robustness
from tasks import task_of
from throughput import measure_throughput
from trackers import check_installed
from training import Training, seed_everything
from views import MeanPrediction, Views, count_views


def main(argv: list[str] | None = None, build: Build = build_model) -> int:
    """Runs the command line and returns the exit status: 0, 1 after a non-finite loss, 128 + N after signal N.

    Args:
        build: what makes the model, for programs that train another one.

    Raises:
        UserError, OSError: a user error, or a file or network failure.
    """
    notes: list[str] = []
    config = parse_args(argv, notes.append)
    try:
        device = distributed.pick_device(config.DEVICE)
        with in_one_line():
            distributed.init(device, config.DIST_TIMEOUT)
        folder = output_folder(config)
        log = open_log(config.MODEL.NAME, folder, distributed.rank())
        try:
            log.info(f"torch {torch.__version__}, timm {timm.__version__}, {distributed.world_size()} x {device}, results in {folder}")
            precision, choice = choose_precision(config.AMP, device)
            for line in (choice, set_tf32(config.TF32, device), *notes):
                log.info(line)
            run = throughput if config.THROUGHPUT_MODE else train_or_evaluate
            with in_one_line():
                return run(config, precision, folder, log, build)
        finally:
            close_log(log)
    except engine.NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.shutdown()


def throughput(config: CfgNode, precision: Precision, folder: Path, log: logging.Logger, build: Build) -> int:
    """Times the model of the configuration, with random weights."""
    size, device = config.DATA.IMG_SIZE, precision.device
    network = build(config, config.MODEL.NUM_CLASSES if config.MODEL.NUM_CLASSES > 0 else 1000).to(device)
    model = precision.for_inference(network)
    if config.COMPILE:
        model = cast(nn.Module, torch.compile(model, options=COMPILE_OPTIONS))
    images = torch.randn(config.DATA.BATCH_SIZE, config.MODEL.LIT.IN_CHANS, size, size, device=device, dtype=precision.dtype)
    result = dict(
        model=config.MODEL.NAME,
        image_size=size,
        device=str(device),
        threads=torch.get_num_threads(),
        amp=precision.mode,
        weights=str(precision.dtype).removeprefix("torch."),
        compile=config.COMPILE,
        torch=str(torch.__version__),
        **measure_throughput(model, images),
    )
    if distributed.rank() == 0:
        for key, value in result.items():
            print(f"{key:>20}: {value:.2f}" if isinstance(value, float) else f"{key:>20}: {value}")
        with atomic_write(folder / "throughput.json") as draft:
            draft.write_text(json.dumps(result, indent=2) + "\n")
        log.info(f"written to {folder / 'throughput.json'}")
    return 0


def train_or_evaluate(config: CfgNode, precision: Precision, folder: Path, log: logging.Logger, build: Build) -> int:
    """Trains, or with EVAL_MODE only evaluates."""
    if not config.EVAL_MODE:
        check_installed(config.TRACK.TO)
    # Read the checkpoint first, so that a wrong file is reported before a large data set is opened.
    resumed = _find_checkpoint(config, folder, log)
    loaders = build_loaders(config)
    if loaders.note:
        log.info(loaders.note)
    classes = _check_classes(config, loaders, resumed)
    seed_everything(config.SEED)  # the same weights on every rank
    # Channels-last, the layout of the convolutions' gradients; otherwise DDP would copy them. Names, shapes and values stay the same.
    model = build(config, len(classes)).to(precision.device).to(memory_format=torch.channels_last)
    if config.MODEL.PRETRAINED and resumed is not None:
        log.info(f"the weights come from the checkpoint, not from MODEL.PRETRAINED={config.MODEL.PRETRAINED}")
    elif config.MODEL.PRETRAINED:
        content = read_checkpoint(fetch(config.MODEL.PRETRAINED))
        weights = find_weights(content)
        if config.EVAL_MODE:
            _check_classes(config, loaders, content)
        kept = keep_shared_classes(weights, names_in(content), model, classes)
        notes = load_weights(model, weights, new_heads=() if config.EVAL_MODE else ("head",))
        for note in [kept, *notes] if kept else notes:
            log.info(f"{config.MODEL.PRETRAINED}: {note}")
    bad_files = BadFiles(config.DATA.MAX_BAD_FILES, log.warning)
    log.info(f"{config.MODEL.NAME}: {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters, "
             f"{model.flops(config.DATA.IMG_SIZE, config.DATA.IMG_SIZE) / 1e9:.3f} GFLOPs, {len(classes)} classes")  # fmt: skip

    if config.EVAL_MODE:
        if resumed is not None:
            load_weights(model, find_weights(resumed))
        elif not config.MODEL.PRETRAINED:
            raise UserError("--eval needs the weights to evaluate: --resume FILE or --pretrained FILE_OR_NAME")
        if config.DATA.CLASS_MAP:
            keep_outputs(model, imagenet_outputs(loaders.class_names))
            log.info(f"of the classifier's 1000 outputs, the {len(loaders.class_names)} of the data's classes are kept")
        seen, images, predict, task = Predictions(), loaders.val, engine.logits_of, task_of(config)
        if config.TEST.VIEWS != default_config().TEST.VIEWS:
            images, predict = with_transform(images, Views(config)), MeanPrediction(config.TEST.VIEWS.FLIP)
            log.info(f"test-time augmentation: mean probabilities over {count_views(config)} views of each image")
        start = time.perf_counter()
        result = engine.evaluate(
            model, images, precision, expected=loaders.val_size, bad_files=bad_files, log=log.info, keep=seen, predict=predict,
            multi_label=config.MODEL.TASK == "multi",
        )  # fmt: skip
        robustness = None
        if config.TEST.CORRUPTIONS:
            clean, seconds = result["top1"], time.perf_counter() - start
            robustness = measure_robustness(model, loaders, precision, config, clean=clean, seconds=seconds, log=log.info)
        with Outputs(log.warning).writing(folder / REPORT):
            task.write_report(folder / REPORT, seen, loaders, config, robustness)
            log.info(f"classes, mistakes, every prediction: {folder / REPORT / PAGE}")
        log.info(f"{task.line(result)}  loss {result['loss']:.4f}  images {result['images']}")
        if config.MODEL.TASK == "multi":
            return 0
        # The release's two lines, for programs that parse its logs.
        log.info(f" * Acc@1 {result['top1']:.3f} Acc@5 {result['top5']:.3f}")
        log.info(f"Accuracy of the network on the {result['images']} test images: {result['top1']:.1f}%")
        return 0

    for line in summarise(loaders, config):
        log.info(line)
    training = Training(config, folder, log, model, loaders, precision, bad_files, StopSignals())
    try:
        if resumed is not None:
            training.load(resumed)
        if distributed.rank() == 0:
            remove_drafts(folder)
            with atomic_write(folder / "config.yaml") as draft:
                draft.write_text(config.dump())
        training.fit()
    except StopRequested as request:
        log.info(f"{request}: saved at epoch {training.progress.epoch}, step {training.progress.step}; run the same command to resume")
        return 128 + request.number
    finally:
        training.close()
    return 0


def output_folder(config: CfgNode) -> Path:
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def _find_checkpoint(config: CfgNode, folder: Path, log: logging.Logger) -> dict | None:
    """Reads the checkpoint given by --resume, else the newest one in the output folder (not with --pretrained or --eval)."""
    if config.MODEL.RESUME:
        log.info(f"resuming from {config.MODEL.RESUME}")
        return read_checkpoint(fetch(config.MODEL.RESUME))
    if config.EVAL_MODE or not config.TRAIN.AUTO_RESUME:
        return None
    path, state = checkpoint.find_latest(folder, log.warning) or (None, None)
    positions = distributed.gather(None if state is None else state.get("progress"))
    if any(position != positions[0] for position in positions):
        raise UserError(f"the processes see different checkpoints in {folder}; it must be on a disk that all nodes share")
    if path is not None:
        log.info(f"resuming from {path}")
    return state


def _check_classes(config: CfgNode, loaders: Loaders, checkpoint: dict | None) -> list[str]:
    """Returns the names of the model's classes, which are the data's or, with DATA.CLASS_MAP, ImageNet's. A ``checkpoint`` that is resumed
    or evaluated must have the same, in this order."""
    classes, whose = list(loaders.class_names), "the data"
    if config.DATA.CLASS_MAP:
        imagenet_outputs(classes)
        classes, whose = list(imagenet_classes()), "ImageNet"
    found = len(classes)
    if config.MODEL.NUM_CLASSES not in (-1, found):
        raise DataError(f"MODEL.NUM_CLASSES={config.MODEL.NUM_CLASSES}, but the training data has {found} classes")
    if checkpoint is not None and "class_names" in checkpoint and (task := task_in(checkpoint)) != config.MODEL.TASK:
        raise UserError(f"the checkpoint is of MODEL.TASK {task}, and cannot be used with MODEL.TASK {config.MODEL.TASK}; "
                        "use another --tag for another run")  # fmt: skip
    names = names_in(checkpoint or {})
    if names is not None and names != classes:
        raise DataError(f"the classes of the checkpoint ({len(names)}: {', '.join(names[:5])} ...) differ from those of {whose} "
                        f"({found}: {', '.join(classes[:5])} ...)")  # fmt: skip
    return classes


if __name__ == "__main__":
    sys.exit(run_program(main))
