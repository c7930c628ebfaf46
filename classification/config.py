# SPDX-License-Identifier: Apache-2.0
"""Configuration of the classification trainer: every key with its default, and the command line that overrides it.

The YAML file given by --cfg overrides the defaults, flags override the file, and --opts KEY VALUE overrides everything. Flags
that are not given have no effect. An unknown flag or key or a wrong type ends the program before anything is loaded.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

import release_keys
from data.corruption import corruption_kinds
from data.sources import FOLDERS
from litv2.attentions import ATTENTIONS
from litv2.errors import UserError, listed
from litv2.features import pyarrow
from litv2.plain_yaml import parse
from optim import LOOKAHEAD, SCHEDULES, optimizer_names

_C = CN()
_C.BASE = []  # YAML files to load first, relative to the file that names them

_C.DATA = CN()
_C.DATA.BATCH_SIZE = 128  # images per process and step; --batch-size
_C.DATA.DATA_PATH = ""  # root of the data set; --data-path
_C.DATA.DATASET = "digits"  # a name of data/sources.py, e.g. digits, folder, csv, cifar100, or of timm: hfds/NAME, hfids/, wds/, tfds/
_C.DATA.CLASSES = ""  # csv only: file in DATA_PATH with the name of a class per line, in order; "" = those of the training table, sorted
_C.DATA.TRAIN_SPLIT = "train"  # folder under DATA_PATH, stem of the zip or tar file, or split name of a timm reader
_C.DATA.VAL_SPLIT = "val"  # the same for validation
_C.DATA.CLASS_MAP = ""  # imagenet: the folders of VAL_SPLIT are some of ImageNet's 1000 classes, by WordNet ID or number, as in ImageNet-A,
# -R and -V2, and --eval reduces a classifier of all 1000 to them; no TRAIN_SPLIT is needed; --class-map
_C.DATA.IMG_SIZE = 224  # side of the square training image in pixels
_C.DATA.INTERPOLATION = "bicubic"  # interpolation: bicubic | bilinear | random (training only)
_C.DATA.ZIP_MODE = False  # read train.zip and val.zip with train_map.txt and val_map.txt; --zip
_C.DATA.CACHE_MODE = "part"  # zip only: no = read each time, full = keep all in memory, part = this process's share; --cache-mode
_C.DATA.PIN_MEMORY = True  # page-locked batches for faster copies to CUDA
_C.DATA.NUM_WORKERS = -1  # loader processes per training process, -1 = one per core, at most 8; --workers
_C.DATA.SAMPLING = "all"  # all = each image once per epoch, balanced = each class equally often (for zips not with CACHE_MODE part)
_C.DATA.MAX_BAD_FILES = 10  # unreadable images that are logged and skipped; one more stops the run

_C.MODEL = CN()
_C.MODEL.NAME = "litv2_small"  # names the output folder
_C.MODEL.TASK = "single"  # classes of an image: single = one | multi = any number, needs DATA.DATASET csv or folder
_C.MODEL.NUM_CLASSES = -1  # -1 = from the training data; a number is checked against the data
_C.MODEL.DROP_RATE = 0.0  # dropout rate of projections and head
_C.MODEL.DROP_PATH_RATE = 0.2  # stochastic depth of the last block
_C.MODEL.LABEL_SMOOTHING = 0.1  # share of each target that is spread evenly over the classes; multi: that is 1/2 instead
_C.MODEL.RESUME = ""  # checkpoint to resume from: weights, optimizer, epoch; --resume
_C.MODEL.PRETRAINED = ""  # initial weights: a file, a URL or a zoo name; --pretrained
_C.MODEL.OFFSET_LR_MULTI = 0.01  # factor on the learning rate of DTM's offset convolutions
_C.MODEL.LIT = CN()
_C.MODEL.LIT.PATCH_SIZE = 4
_C.MODEL.LIT.IN_CHANS = 3  # 3 = RGB, 1 = grey
_C.MODEL.LIT.EMBED_DIM = 96
_C.MODEL.LIT.DEPTHS = [2, 2, 6, 2]
_C.MODEL.LIT.NUM_HEADS = [3, 6, 12, 24]
_C.MODEL.LIT.MLP_RATIO = 4.0
_C.MODEL.LIT.QKV_BIAS = True
_C.MODEL.LIT.LOCAL_WS = [0, 0, 2, 1]  # HiLo's window per stage; 0 = no attention
_C.MODEL.LIT.ALPHA = 0.9  # share of HiLo's heads that are Lo-Fi
_C.MODEL.LIT.ATTENTION = "hilo"  # hilo, or in its place msa | sra | w-msa | t-msa (the paper's table 4) | relative-msa (LIT's)
_C.MODEL.LIT.CONV_FFN = True  # depthwise convolution in the feed-forward networks; False in LIT

_C.TRAIN = CN()
_C.TRAIN.EPOCHS = 300
_C.TRAIN.WARMUP_EPOCHS = 20
_C.TRAIN.WEIGHT_DECAY = 0.05  # not applied to biases, 1-D tensors and LIT's tables of relative positions
_C.TRAIN.BASE_LR = 5e-4  # this and the next two are per 512 images of total batch (processes x accumulation x BATCH_SIZE)
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6  # an absolute floor, also for the offset group
_C.TRAIN.LAYER_DECAY = 1.0  # factor on the learning rate per layer from the head down; 1 = none
_C.TRAIN.MULTI_LABEL_LOSS = "bce"  # of TASK multi: bce = binary cross-entropy | asymmetric (arXiv 2009.14119)
_C.TRAIN.CLIP_GRAD = 5.0  # largest gradient norm; 0 = no clipping
_C.TRAIN.ACCUMULATION_STEPS = 1  # batches per optimizer step; --accumulation-steps
_C.TRAIN.CLASS_WEIGHTS = "none"  # of the images in the loss: none | inverse | effective | auto | a CSV file class,weight; see balance.py
_C.TRAIN.CLASS_WEIGHTS_BETA = 0.999  # beta of "effective" (arXiv 1901.05555)
_C.TRAIN.FREEZE = "0"  # parts that keep their weights: the first N stages, or head = all but the head; see freezing.py; --freeze
_C.TRAIN.UNFREEZE_EVERY = 0  # epochs after which the last frozen stage joins the training, and so on; 0 = never
_C.TRAIN.PATIENCE = 0  # evaluations in a row without a better top-1, or mAP, that end the run; 0 = off
_C.TRAIN.USE_CHECKPOINT = False  # recompute activations to save memory; --use-checkpoint
_C.TRAIN.AUTO_RESUME = True  # resume from latest.pth in the output folder if neither --resume nor --eval is given
_C.TRAIN.EMA_DECAY = 0.0  # decay of the moving average of the weights, which is evaluated and saved, too; 0 = off; --ema-decay
_C.TRAIN.MAX_NONFINITE = 0  # steps with a NaN or infinite loss that are skipped before the run stops
_C.TRAIN.OPTIMIZER = CN()
_C.TRAIN.OPTIMIZER.NAME = "adamw"  # a timm optimizer: adamw, sgd (with Nesterov momentum), lamb, lion ...
_C.TRAIN.OPTIMIZER.EPS = 1e-8  # this and the next two are passed to the optimizers that use them
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9
_C.TRAIN.LR_SCHEDULER = CN()
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"  # cosine | linear | step, or timm's multistep, poly, tanh, wsd, rsqrt, constant
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30.0  # step: epochs between decays; wsd, rsqrt: epochs of the last decay
_C.TRAIN.LR_SCHEDULER.DECAY_MILESTONES = [90, 180, 270]  # multistep: epochs of the decays
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1  # step, multistep: decay factor; poly: exponent

_C.AUG = CN()
_C.AUG.SCALE = [0.08, 1.0]  # area of the random crop relative to the image
_C.AUG.RATIO = [3 / 4, 4 / 3]  # aspect ratio (width / height) of the random crop
_C.AUG.HFLIP = 0.5  # probability of a horizontal flip
_C.AUG.COLOR_JITTER = 0.4  # used if AUTO_AUGMENT is "none"
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"  # a timm policy, or none
_C.AUG.REPROB = 0.25  # random erasing: probability,
_C.AUG.REMODE = "pixel"  # filling (const | rand | pixel)
_C.AUG.RECOUNT = 1  # and number of rectangles
_C.AUG.MIXUP = 0.8  # alpha; 0 = off
_C.AUG.CUTMIX = 1.0  # alpha; 0 = off
_C.AUG.CUTMIX_MINMAX = []  # range of the side of cutmix's rectangle relative to the image, instead of CUTMIX; [] = off
_C.AUG.MIXUP_PROB = 1.0  # probability of applying either
_C.AUG.MIXUP_SWITCH_PROB = 0.5  # probability of cutmix if both are on
_C.AUG.MIXUP_MODE = "batch"  # batch | pair | elem; with the last two the host waits for CUDA in each step

_C.DISTILL = CN()
_C.DISTILL.TEACHER = ""  # a trained model to learn from: a checkpoint of this trainer, a zoo name or a timm name; "" = none
_C.DISTILL.TEACHER_FILE = ""  # weights for the named teacher instead of the published ones
_C.DISTILL.TEMPERATURE = 4.0  # divides the logits of both before the softmax
_C.DISTILL.WEIGHT = 0.5  # share of the teacher's answers in the loss, in [0, 1]; the labels have the rest
_C.DISTILL.FEATURES = 0.0  # weight of the squared difference to the teacher's pooled features; 0 = off
_C.DISTILL.AMP = "auto"  # the teacher's mixed precision, as AMP

_C.TEST = CN()
_C.TEST.CROP = True  # resize the short side to 256/224 of the size, then crop the centre; False = resize to the square
_C.TEST.IMG_SIZE = 0  # side of the evaluation image; 0 = DATA.IMG_SIZE
_C.TEST.VIEWS = CN()  # test-time augmentation of --eval: mean probabilities over all views, which are CROPS x SCALES, and mirrored ones
_C.TEST.VIEWS.CROPS = 1  # 1 = the centre | 5 = the corners of the resized image and the centre; --crops
_C.TEST.VIEWS.FLIP = False  # each view's mirror image too; --flip
_C.TEST.VIEWS.SCALES = [1.0]  # factors on the side of the evaluation image; --scales
_C.TEST.CORRUPTIONS = ""  # kinds of ImageNet-C's corruptions that --eval measures the errors under: fog,frost,... or all; --corruptions
_C.TEST.SEVERITIES = [1, 2, 3, 4, 5]  # of the corruptions
_C.TEST.PREDICTIONS = "csv"  # csv | parquet: the report has predictions.parquet, too, which needs pyarrow

_C.AMP = "auto"  # mixed precision: auto = fp16 on CUDA, else off | on = fp16 on CUDA, else bf16 | off | fp16 | bf16; --amp
_C.TF32 = False  # CUDA rounds the factors of float32 products and convolutions, those of offsets too, to 10 bits
_C.DEVICE = "auto"  # auto | cpu | cuda | mps; --device
_C.COMPILE = False  # torch.compile; --compile
_C.DIST_TIMEOUT = 1800  # seconds that a process waits for the others; then it ends and names those that do not answer
_C.SEED = 0  # --seed
_C.OUTPUT = "output"  # results go to OUTPUT/MODEL.NAME/TAG; --output
_C.TAG = "default"  # --tag
_C.TRACK = CN()
_C.TRACK.TO = []  # trackers that get the metrics as well: wandb, mlflow, clearml
_C.TRACK.PROJECT = "litv2"  # the project, in MLflow the experiment
_C.TRACK.NAME = ""  # of the run; "" = MODEL.NAME/TAG
_C.EVAL_FREQ = 1  # epochs between evaluations; the last epoch is always evaluated
_C.SAVE_FREQ = 0  # epochs between checkpoints that are kept; 0 = keep only latest and best
_C.SAVE_STEPS = 0  # optimizer steps between writes of latest.pth within an epoch; 0 = only at its end
_C.PRINT_FREQ = 50  # steps between log lines
_C.EVAL_MODE = False  # evaluate and stop; --eval
_C.THROUGHPUT_MODE = False  # time the model and stop; --throughput

DEEPEST_BASE = 10  # files that name each other as BASE
_CHOICES = {
    "DATA.CLASS_MAP": ("", "imagenet"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "random"),
    "DATA.CACHE_MODE": ("no", "full", "part"),
    "MODEL.TASK": ("single", "multi"),
    "DATA.SAMPLING": ("all", "balanced"),
    "MODEL.LIT.IN_CHANS": (1, 3),
    "TRAIN.MULTI_LABEL_LOSS": ("bce", "asymmetric"),
    "MODEL.LIT.ATTENTION": ATTENTIONS,
    "TEST.VIEWS.CROPS": (1, 5),
    "TEST.PREDICTIONS": ("csv", "parquet"),
    "AUG.REMODE": ("const", "rand", "pixel"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AMP": ("auto", "on", "off", "fp16", "bf16"),
    "DISTILL.AMP": ("auto", "on", "off", "fp16", "bf16"),
    "DEVICE": ("auto", "cpu", "cuda", "mps"),
}
_AT_LEAST = {
    "DATA.BATCH_SIZE": 1, "DATA.IMG_SIZE": 32, "DATA.NUM_WORKERS": -1, "DATA.MAX_BAD_FILES": 0, "TRAIN.EPOCHS": 1,
    "TRAIN.WARMUP_EPOCHS": 0, "TRAIN.ACCUMULATION_STEPS": 1, "TRAIN.CLIP_GRAD": 0, "TRAIN.EMA_DECAY": 0,
    "TRAIN.MAX_NONFINITE": 0, "TRAIN.UNFREEZE_EVERY": 0, "TRAIN.PATIENCE": 0, "AUG.MIXUP": 0, "AUG.CUTMIX": 0, "TEST.IMG_SIZE": 0,
    "DISTILL.FEATURES": 0,
    "DIST_TIMEOUT": 1, "PRINT_FREQ": 1, "EVAL_FREQ": 1, "SAVE_FREQ": 0, "SAVE_STEPS": 0,
}  # fmt: skip


class ConfigError(UserError):
    """Invalid configuration; the message names the key, the value and what was expected."""


def default_config() -> CN:
    return _C.clone()


def load_config(path: str | Path, overrides: list | None = None, note: Callable[[str], None] = lambda line: None) -> CN:
    """Merges the defaults, the file (after its BASE files) and ``overrides`` (key, value, key, value ...); checked and frozen.

    Args:
        note: called with a line for each key of the release that has no effect here.

    Raises:
        ConfigError: the file is missing, a key is unknown, or a value has the wrong type or is out of range.
    """
    config = default_config()
    obsolete = {}
    for source, key, value in [*_of_file(Path(path)), *_of_pairs(overrides or [])]:
        if key in release_keys.OBSOLETE:
            obsolete[key] = value
        elif entry := release_keys.translate(key, value):
            _set(config, source, *entry)
    _check(config)
    for key, value in obsolete.items():
        note(release_keys.explain(key, value, config))
    config.freeze()
    return config


def parse_args(argv: list[str] | None = None, note: Callable[[str], None] = lambda line: None) -> CN:
    """Returns the configuration for a command line; ``note`` as in ``load_config``.

    Raises:
        ConfigError: as in ``load_config``. For unknown flags, argparse exits with status 2.
    """
    args = _parser().parse_args(argv)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    overrides = []
    for key, value in vars(args).items():
        if key.isupper() and value is not None:  # flags are stored under the name of the key that they set
            overrides += [key, value]
    return load_config(args.cfg, overrides + (args.opts or []), note)


def to_dict(config: CN) -> dict:
    return {key: to_dict(value) if isinstance(value, CN) else value for key, value in config.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train, evaluate or time LITv2 on images.", allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML configuration")
    add("--opts", nargs="+", metavar="KEY VALUE", help="any key of config.py, e.g. --opts TRAIN.EPOCHS 30 AUG.MIXUP 0")
    add("--batch-size", dest="DATA.BATCH_SIZE", type=int, metavar="N", help="images per process and step")
    add("--data-path", dest="DATA.DATA_PATH", metavar="DIR", help="root of the data set")
    add("--zip", dest="DATA.ZIP_MODE", action="store_const", const=True, help="read zip archives instead of folders")
    add("--cache-mode", dest="DATA.CACHE_MODE", choices=("no", "full", "part"), help="what a zip data set keeps in memory")
    add("--workers", dest="DATA.NUM_WORKERS", type=int, metavar="N", help="loader processes per training process")
    start = parser.add_mutually_exclusive_group().add_argument
    start("--resume", dest="MODEL.RESUME", metavar="FILE", help="resume from this checkpoint (or, with --eval, evaluate it)")
    start("--pretrained", dest="MODEL.PRETRAINED", metavar="FILE", help="start from these weights: file, URL or zoo name (litv2_small)")
    add("--accumulation-steps", dest="TRAIN.ACCUMULATION_STEPS", type=int, metavar="N", help="batches per optimizer step")
    add("--freeze", dest="TRAIN.FREEZE", metavar="N|head", help="keep the weights of the first N stages, or of all but the head")
    add("--use-checkpoint", dest="TRAIN.USE_CHECKPOINT", action="store_const", const=True, help="recompute activations to save memory")
    add("--ema-decay", dest="TRAIN.EMA_DECAY", type=float, metavar="D", help="decay of the moving average of the weights, e.g. 0.9999")
    add("--amp-opt-level", dest="AMP_OPT_LEVEL", choices=("O0", "O1", "O2"), help="the release's --amp: O0 = off, O1 and O2 = on")
    add("--amp", dest="AMP", choices=_CHOICES["AMP"], help="mixed precision; auto: fp16 on CUDA, off elsewhere")
    add("--device", dest="DEVICE", choices=("auto", "cpu", "cuda", "mps"), help="device to compute on")
    add("--compile", dest="COMPILE", action="store_const", const=True, help="torch.compile the model")
    add("--seed", dest="SEED", type=int, metavar="N", help="seed of weights, data order and augmentation")
    add("--output", dest="OUTPUT", metavar="DIR", help="root of the output folder OUTPUT/MODEL.NAME/TAG")
    add("--tag", dest="TAG", metavar="NAME", help="name of the run")
    add("--eval", dest="EVAL_MODE", action="store_const", const=True, help="evaluate and stop")
    add("--class-map", dest="DATA.CLASS_MAP", choices=("imagenet",), help="--eval on folders of some of ImageNet's classes")
    add("--crops", dest="TEST.VIEWS.CROPS", type=int, choices=_CHOICES["TEST.VIEWS.CROPS"], help="crops of each image for --eval")
    add("--flip", dest="TEST.VIEWS.FLIP", action="store_const", const=True, help="--eval averages over mirror images, too")
    add("--scales", dest="TEST.VIEWS.SCALES", nargs="+", type=float, metavar="X", help="--eval averages over these sizes, e.g. 0.9 1 1.1")
    add("--corruptions", dest="TEST.CORRUPTIONS", nargs="?", const="all", metavar="KINDS", help="--eval under corruptions: fog,... or all")
    add("--throughput", dest="THROUGHPUT_MODE", action="store_const", const=True, help="time the model and stop; needs no data")
    add("--local-rank", "--local_rank", dest="local_rank", type=int, metavar="N", help="set by launchers older than torchrun")
    return parser


def _of_file(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, str, Any]]:
    """Yields (source, key, value) for each value in a YAML file, after those of its BASE files; ``above`` are those that led to it."""
    if not os.path.isfile(path):  # unlike Path's, it takes names that no file can have
        raise ConfigError(f"there is no configuration file {path}")
    if len(above) > DEEPEST_BASE:
        raise ConfigError(f"{path}: BASE files name each other more than {DEEPEST_BASE} deep: {listed(above)}")
    try:
        content = parse(path.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must contain keys and values, got a {type(content).__name__}")
    bases = content.pop("BASE", None) or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: BASE must be a list of files, got {bases!r}")
    for base in filter(None, bases):  # the release's default is a list of one empty name
        yield from _of_file(path.parent / base, (*above, path))
    for key, value in flat(content):
        yield str(path), key, value


def _of_pairs(pairs: list) -> Iterator[tuple[str, str, Any]]:
    if len(pairs) % 2:
        raise ConfigError(f"--opts expects pairs of KEY VALUE, got {pairs}")
    for key, value in zip(pairs[::2], pairs[1::2]):
        yield "the command line", str(key), value


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"TRAIN": {"EPOCHS": 3}} -> ("TRAIN.EPOCHS", 3)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(config: CN, source: str, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    node = config
    for section in sections:
        node = node.get(section)
        if not isinstance(node, CN):
            break
    if not isinstance(node, CN) or last not in node:
        raise ConfigError(f"{source}: there is no key {key}; config.py lists all keys")
    if isinstance(node[last], CN):
        raise ConfigError(f"{source}: {key} is a section, got the value {value!r}")
    node[last] = _typed(value, node[last], key, source)


def _typed(value: Any, default: Any, name: str, source: str) -> Any:
    """Converts ``value`` to the type of ``default``. Text is parsed as Python ("1e-3" is text in YAML 1.1 and --opts)."""
    if isinstance(value, str) and not isinstance(default, str):
        with suppress(ValueError):
            value = parse(value)
            value = float(value) if isinstance(value, str) else value
    if isinstance(default, str) and type(value) is int:
        value = str(value)
    if isinstance(default, float) and type(value) is int:
        with suppress(OverflowError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{source}: {name} must be finite, got {value}")
    if isinstance(default, list) and isinstance(value, (list, tuple)) and len(default):
        return [_typed(item, default[0], f"{name}[{i}]", source) for i, item in enumerate(value)]
    if type(value) is not type(default):
        raise ConfigError(f"{source}: {name} must be a {type(default).__name__} like {default!r}, got {value!r}")
    return value


def _check(config: CN) -> None:
    def get(name: str) -> Any:
        node = config
        for part in name.split("."):
            node = node[part]
        return node

    for name, choices in _CHOICES.items():
        if get(name) not in choices:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {get(name)!r}")
    for name, least in _AT_LEAST.items():
        if get(name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {get(name)}")
    for name in ("AUG.REPROB", "AUG.HFLIP", "AUG.MIXUP_PROB", "AUG.MIXUP_SWITCH_PROB", "MODEL.LIT.ALPHA", "DISTILL.WEIGHT"):
        if not 0 <= get(name) <= 1:
            raise ConfigError(f"{name} must lie in [0, 1], got {get(name)}")
    for name in ("MODEL.LABEL_SMOOTHING", "MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "TRAIN.EMA_DECAY", "TRAIN.CLASS_WEIGHTS_BETA"):
        if not 0 <= get(name) < 1:
            raise ConfigError(f"{name} must lie in [0, 1), got {get(name)}")
    if config.MODEL.NUM_CLASSES != -1 and config.MODEL.NUM_CLASSES < 1:
        raise ConfigError(f"MODEL.NUM_CLASSES must be -1 (from the data) or at least 1, got {config.MODEL.NUM_CLASSES}")
    table = config.DATA.DATASET == "csv" and not config.DATA.ZIP_MODE
    if config.MODEL.TASK == "multi" and not (table or config.DATA.DATASET in FOLDERS and not config.DATA.ZIP_MODE):
        raise ConfigError("MODEL.TASK multi needs DATA.DATASET csv or folder, which can give an image several classes")
    if config.MODEL.TASK == "multi" and (config.TEST.VIEWS != _C.TEST.VIEWS or config.TEST.CORRUPTIONS or config.TEST.PREDICTIONS != "csv"):
        raise ConfigError("TEST.VIEWS, TEST.CORRUPTIONS and TEST.PREDICTIONS parquet are for MODEL.TASK single only")
    if config.DATA.CLASSES and not table:
        raise ConfigError(f"DATA.CLASSES={config.DATA.CLASSES!r} needs DATA.DATASET csv; other data sets name their classes themselves")
    if config.TRAIN.CLASS_WEIGHTS != "none" and config.DATA.SAMPLING == "balanced":
        raise ConfigError(f"DATA.SAMPLING=balanced and TRAIN.CLASS_WEIGHTS={config.TRAIN.CLASS_WEIGHTS} would both favour rare classes; "
                          "use one of them")  # fmt: skip
    if config.DATA.SAMPLING == "balanced" and config.DATA.ZIP_MODE and config.DATA.CACHE_MODE == "part":
        raise ConfigError("DATA.SAMPLING=balanced gives each process other images in each epoch; use --cache-mode full or no, not part")
    stages = [str(number) for number in range(len(config.MODEL.LIT.DEPTHS) + 1)]
    if config.TRAIN.FREEZE not in (*stages, "head"):
        raise ConfigError(f"TRAIN.FREEZE must be a number of stages, {', '.join(stages)}, or head, got {config.TRAIN.FREEZE!r}")
    if config.TRAIN.FREEZE != "0" and not (config.MODEL.PRETRAINED or config.MODEL.RESUME or config.EVAL_MODE or config.THROUGHPUT_MODE):
        raise ConfigError(f"TRAIN.FREEZE={config.TRAIN.FREEZE} would keep random weights; give the weights by --pretrained")
    if config.TRAIN.FREEZE == "0" and config.TRAIN.UNFREEZE_EVERY:
        raise ConfigError(f"TRAIN.UNFREEZE_EVERY={config.TRAIN.UNFREEZE_EVERY} needs something to unfreeze: set TRAIN.FREEZE")
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        raise ConfigError(f"TRAIN.WARMUP_EPOCHS={config.TRAIN.WARMUP_EPOCHS} must be below TRAIN.EPOCHS={config.TRAIN.EPOCHS}")
    if config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS <= 0:
        raise ConfigError(f"TRAIN.LR_SCHEDULER.DECAY_EPOCHS must be above 0, got {config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS}")
    if config.DISTILL.TEMPERATURE <= 0:
        raise ConfigError(f"DISTILL.TEMPERATURE must be above 0, got {config.DISTILL.TEMPERATURE}")
    if config.DISTILL.TEACHER_FILE and not config.DISTILL.TEACHER:
        raise ConfigError("DISTILL.TEACHER_FILE needs DISTILL.TEACHER, the name of the model whose weights it holds")
    if config.TRAIN.MULTI_LABEL_LOSS != _C.TRAIN.MULTI_LABEL_LOSS and config.MODEL.TASK != "multi":
        raise ConfigError(f"TRAIN.MULTI_LABEL_LOSS={config.TRAIN.MULTI_LABEL_LOSS} is of MODEL.TASK multi, got {config.MODEL.TASK}")
    if config.DISTILL.TEACHER and config.DISTILL.WEIGHT == config.DISTILL.FEATURES == 0:
        raise ConfigError("DISTILL.WEIGHT=0 and DISTILL.FEATURES=0: nothing would be learnt from DISTILL.TEACHER")
    if unknown := [name for name in config.TRACK.TO if name not in ("wandb", "mlflow", "clearml")]:
        raise ConfigError(f"TRACK.TO may contain wandb, mlflow and clearml, got {unknown[0]!r}")
    sides = config.AUG.CUTMIX_MINMAX
    if sides and not (len(sides) == 2 and all(type(side) in (int, float) for side in sides) and 0 < sides[0] < sides[1] <= 1):
        raise ConfigError(f"AUG.CUTMIX_MINMAX must be two increasing numbers in (0, 1], or [], got {sides}")
    _check_evaluation(config)
    for name, known in (("TRAIN.OPTIMIZER.NAME", optimizer_names()), ("TRAIN.LR_SCHEDULER.NAME", list(SCHEDULES))):
        if get(name).removeprefix(LOOKAHEAD) not in known:
            near = difflib.get_close_matches(get(name), known, cutoff=0.4) or known
            raise ConfigError(f"{name}={get(name)!r} is unknown; similar names: {listed(near)}")


def _check_evaluation(config: CN) -> None:
    """Of --eval, what it needs besides the model; packages too, since it would take them only after minutes."""
    if config.DATA.CLASS_MAP and not (config.EVAL_MODE and config.DATA.DATASET in FOLDERS and not config.DATA.ZIP_MODE):
        raise ConfigError(f"DATA.CLASS_MAP is for --eval on folders (DATA.DATASET {', '.join(FOLDERS)})")
    if config.DATA.CLASS_MAP and config.MODEL.TASK == "multi":
        raise ConfigError("DATA.CLASS_MAP is for MODEL.TASK single only")
    views = config.TEST.VIEWS
    if not views.SCALES or min(views.SCALES) <= 0 or len(set(views.SCALES)) < len(views.SCALES):
        raise ConfigError(f"TEST.VIEWS.SCALES must be different factors above 0, got {views.SCALES}")
    if views.CROPS > 1 and not config.TEST.CROP:
        raise ConfigError(f"TEST.VIEWS.CROPS={views.CROPS} needs TEST.CROP=True: without it the whole image is the only crop")
    if not config.TEST.SEVERITIES or not set(config.TEST.SEVERITIES) <= {1, 2, 3, 4, 5}:
        raise ConfigError(f"TEST.SEVERITIES must be some of 1 to 5, got {config.TEST.SEVERITIES}")
    corruption_kinds(config.TEST.CORRUPTIONS)
    if not config.EVAL_MODE and (config.TEST.CORRUPTIONS or views != _C.TEST.VIEWS):
        raise ConfigError("TEST.VIEWS and TEST.CORRUPTIONS are for --eval: other evaluations take the centre of the image as it is")
    if config.TEST.CORRUPTIONS and (side := config.TEST.IMG_SIZE or config.DATA.IMG_SIZE) < 32:
        raise ConfigError(f"TEST.CORRUPTIONS needs images of at least 32 pixels, got {side}")
    if config.TEST.CORRUPTIONS and views != _C.TEST.VIEWS:
        raise ConfigError("errors under TEST.CORRUPTIONS are measured without TEST.VIEWS; use one of the two")
    if config.TEST.PREDICTIONS == "parquet":
        pyarrow()
