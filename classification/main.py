"""Trains, evaluates and times LITv2 on images. From this folder:

    python main.py --cfg configs/litv2-digits.yaml                                  # embedded data set, a few minutes on a CPU
    python main.py --cfg configs/litv2-small.yaml --data-path DIR                   # DIR/train/CLASS/IMAGE, DIR/val/CLASS/IMAGE
    torchrun --nproc-per-node 8 main.py --cfg configs/litv2-small.yaml --data-path DIR --batch-size 128 --amp bf16
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --pretrained litv2_small --eval
    python main.py --cfg configs/litv2-small.yaml --data-path DIR --pretrained litv2_small --opts TRAIN.EPOCHS 30
    python main.py --cfg configs/litv2-small.yaml --throughput --batch-size 64

Results go to OUTPUT/MODEL.NAME/TAG; running the same command again goes on from there. ``config.py`` lists every key.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 and hilo of this checkout, installed or not

import timm
import torch
from yacs.config import CfgNode

import checkpoint
import distributed
import engine
from config import parse_args
from data import build_loaders
from data.loader import BadFiles, Loaders
from data.sources import DataError
from litv2 import LITv2
from litv2.weights.download import fetch
from litv2.weights.reading import read_checkpoint
from litv2.weights.state_dict import find_weights, load_weights
from logger import Logger
from training import Training, seed_everything


def main(argv: list[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit code: 0, 1 after an error, 128 + N after signal N."""
    config = parse_args(argv)
    try:
        device = distributed.pick_device(config.DEVICE)
        distributed.init(device)
        return throughput(config, device) if config.THROUGHPUT_MODE else run(config, device)
    except (ValueError, OSError, engine.NonFiniteLoss) as error:  # DataError is a ValueError
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

    # What to start from is read first: a wrong file should not cost the opening of a large data set.
    resumed = _find_checkpoint(config, folder, log)
    loaders = build_loaders(config)
    num_classes = _check_classes(config, loaders, resumed)
    seed_everything(config.SEED)  # the same weights on every rank
    # The layout that convolutions compute gradients in, else DDP copies them. Names, shapes and values stay.
    model = build_model(config, num_classes).to(device, memory_format=torch.channels_last)
    if config.MODEL.PRETRAINED:
        weights = find_weights(read_checkpoint(fetch(config.MODEL.PRETRAINED)))
        for note in load_weights(model, weights, new_heads=() if config.EVAL_MODE else ("head",)):
            log(f"{config.MODEL.PRETRAINED}: {note}")
    precision = engine.Precision(device, config.AMP)
    bad_files = BadFiles(config.DATA.MAX_BAD_FILES, log if log.active else print)
    log(f"{config.MODEL.NAME}: {sum(p.numel() for p in model.parameters()) / 1e6:.3f} M parameters, "
        f"{model.flops(config.DATA.IMG_SIZE, config.DATA.IMG_SIZE) / 1e9:.3f} GFLOPs, {num_classes} classes")  # fmt: skip

    if config.EVAL_MODE:
        if resumed is not None:
            load_weights(model, find_weights(resumed))
        elif not config.MODEL.PRETRAINED:
            raise ValueError("--eval needs the weights to evaluate: --resume FILE or --pretrained FILE_OR_NAME")
        result = engine.evaluate(model, loaders.val, precision, expected=loaders.val_size, bad_files=bad_files, log=log)
        log(f"Acc@1 {result['top1']:.3f}  Acc@5 {result['top5']:.3f}  loss {result['loss']:.4f}  images {result['images']}")
        log.close()
        return 0

    training = Training(config, folder, log, model, loaders, precision, bad_files, engine.StopSignals())
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


def output_folder(config: CfgNode) -> Path:
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


def _find_checkpoint(config: CfgNode, folder: Path, log: Logger) -> dict | None:
    """What --resume names, else the newest of the output folder (unless only weights or an evaluation are asked for)."""
    if config.MODEL.RESUME:
        log(f"resuming from {config.MODEL.RESUME}")
        return read_checkpoint(fetch(config.MODEL.RESUME))
    if config.EVAL_MODE or not config.TRAIN.AUTO_RESUME:
        return None
    path, state = checkpoint.find_latest(folder, log) or (None, None)
    positions = distributed.gather(None if state is None else state.get("progress"))
    if any(position != positions[0] for position in positions):
        raise ValueError(f"the processes see different checkpoints in {folder}: is it on a disk that all nodes share?")
    if path is not None:
        log(f"resuming from {path}")
    return state


def _check_classes(config: CfgNode, loaders: Loaders, resumed: dict | None) -> int:
    found = len(loaders.class_names)
    if config.MODEL.NUM_CLASSES not in (-1, found):
        raise DataError(f"MODEL.NUM_CLASSES={config.MODEL.NUM_CLASSES}, but the training data has {found} classes")
    names = (resumed or {}).get("class_names")
    if names and list(names) != list(loaders.class_names):
        raise DataError(f"the checkpoint was trained on other classes ({len(names)}: {', '.join(names[:5])} ...) than the data has "
                        f"({found}: {', '.join(loaders.class_names[:5])} ...)")  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
