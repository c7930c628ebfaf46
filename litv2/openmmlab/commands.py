# SPDX-License-Identifier: Apache-2.0
"""The commands of detection/ and segmentation/, thin layers over mmengine's Runner: train, test, get_flops, benchmark and demo."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.evaluator import DumpResults
from mmengine.registry import VISUALIZERS

from ..configurations import config_of
from ..errors import UserError
from ..runs.failures import in_one_line
from ..runs.outputs import Outputs
from ..runs.signals import StopRequested
from .build import build_model
from .config import adapt_to_device, image_steps, load_config
from .evaluation import augment, draw, format_only, select_metrics
from .flops import count_flops
from .plots import plot_curves
from .runner import StrictRunner
from .speed import frames_per_second, random_images

__all__ = ["arguments", "benchmark", "demo", "get_flops", "test", "train"]


WORK_DIR = "folder for logs and checkpoints; default: work_dirs/NAME_OF_CONFIG"


def arguments(description: str, launcher: bool = False) -> argparse.ArgumentParser:
    """Returns a parser with the flags that the commands share; ``launcher`` adds those for multi-process runs."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--cfg-options",
        "--options",  # the release's name
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override keys of the configuration, such as train_dataloader.batch_size=4; data_root=DIR moves all data sets",
    )
    if launcher:
        parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], help="default: pytorch under torchrun, else none")
        parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by torch.distributed.launch")
    return parser


def prepare(args: argparse.Namespace) -> Config:
    """Returns the configuration that the command line asks for, adapted to this machine."""
    launcher = args.launcher or ("pytorch" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else "none")
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config = load_config(args.config, args.cfg_options)
    if args.work_dir:
        config.work_dir = args.work_dir
    if getattr(args, "amp", False):
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    adapt_to_device(config, launcher)
    return config


def train() -> int | None:
    parser = arguments("Trains the model of a configuration.", launcher=True)
    parser.add_argument("config")
    parser.add_argument("--work-dir", help=WORK_DIR)
    parser.add_argument("--amp", action="store_true", help="mixed precision (the detectors' configurations have it on)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help="resume from FILE, default: the latest checkpoint")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the total batch size")
    args = parser.parse_args()
    with in_one_line():
        return _train(prepare(args), args)


def _train(config: Config, args: argparse.Namespace) -> int | None:
    if args.auto_scale_lr:
        if "auto_scale_lr" not in config:
            raise UserError("--auto-scale-lr: the configuration has no auto_scale_lr, the batch size that its learning rate is tuned for")
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    runner = StrictRunner.from_cfg(config)
    try:
        runner.train()
    except StopRequested as stop:
        print(f"{stop}: a checkpoint is in {runner.work_dir}; the same command with --resume goes on from there")
        return 128 + stop.number
    if runner.rank == 0:
        with Outputs(runner.logger.warning).writing("curves.png"):
            plot_curves(runner.work_dir, Path(runner.work_dir) / "curves.png")
        print(f"checkpoints, logs and curves.png are in {runner.work_dir}")
    return None


def test() -> None:
    parser = arguments("Evaluates a checkpoint.", launcher=True)
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--work-dir", help=WORK_DIR)
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--eval", nargs="+", metavar="METRIC", help="bbox, segm, ... or mIoU, mDice, ...; default: the configuration's")
    what.add_argument("--format-only", action="store_true", help="write the predictions in the format of test servers, without evaluation")
    parser.add_argument("--tta", "--aug-test", action="store_true", help="merge the predictions of several views of each image")
    parser.add_argument("--show-dir", metavar="DIR", help="draw predictions beside the ground truth")
    parser.add_argument("--show", action="store_true", help="the same, on the display")
    parser.add_argument("--wait-time", type=float, default=2.0, metavar="SECONDS", help="how long --show shows each; default: %(default)s")
    args = parser.parse_args()
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise UserError(f"--out {args.out}: the file name must end in .pkl")
    config = prepare(args)
    config.load_from = args.checkpoint
    if args.show or args.show_dir:
        draw(config, args.show_dir, args.show, args.wait_time)
    if args.eval:
        select_metrics(config, args.eval)
    predictions = format_only(config) if args.format_only else None
    if args.tta:
        augment(config)
    runner = StrictRunner.from_cfg(config)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    runner.test()
    if predictions and runner.rank == 0:
        print(f"predictions are in {predictions}")


def get_flops() -> None:
    parser = arguments("Counts multiply-adds and parameters.")
    parser.add_argument("config", nargs="+")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("H", "W"), help="default: 800 1280 for detectors, 512 512 for segmenters")
    args = parser.parse_args()
    print(f"{'':44} {'params M':>9} {'published G':>12} {'full G':>9}    (full: with the deformable convolutions themselves)")
    for path in args.config:
        config = load_config(path, args.cfg_options)
        height, width = args.shape or ((800, 1280) if config.default_scope == "mmdet" else (512, 512))
        model = build_model(config)
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        count = count_flops(model, height, width)
        published, full = count["published"] / 1e9, count["full"] / 1e9
        print(f"{Path(path).stem:44} {parameters:9.2f} {published:12.2f} {full:9.2f}    {height} x {width}", flush=True)


def benchmark() -> None:
    parser = arguments("Measures images per second, one image at a time.", launcher=True)
    parser.add_argument("config")
    parser.add_argument("weights", nargs="?", metavar="checkpoint", help="default: random weights")
    parser.add_argument("--checkpoint", help="the checkpoint, as a flag")
    parser.add_argument("--max-iter", type=int, metavar="IMAGES", help="default: 2000 for detectors, 200 for segmenters")
    parser.add_argument("--log-interval", type=int, default=50, metavar="IMAGES", help="default: %(default)s")
    parser.add_argument("--synthetic", action="store_true", help="random images of --shape instead of the test set")
    parser.add_argument("--shape", type=int, nargs=2, metavar=("H", "W"), help="default: 800 1216 for detectors, 512 512 for segmenters")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the benchmark runs in one process; start it with --nproc_per_node=1")
    config = load_config(args.config, args.cfg_options)
    detector = config.default_scope == "mmdet"
    images = args.max_iter or (2000 if detector else 200)
    model = build_model(config, args.checkpoint or args.weights).to(args.device)
    if args.synthetic:
        batches: Iterable[dict] = random_images(config, min(images, 20), *(args.shape or ((800, 1216) if detector else (512, 512))))
    else:
        config.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
        batches = StrictRunner.build_dataloader(config.test_dataloader)
    frames_per_second(model, batches, images, args.log_interval)


def demo() -> None:
    parser = arguments("Draws what a model finds in an image.")
    parser.add_argument("image")
    parser.add_argument("--checkpoint", required=True, help="a file or URL")
    parser.add_argument("--config", help="default: the configuration whose name is in the checkpoint's path")
    parser.add_argument("--out", required=True, metavar="PICTURE")
    parser.add_argument("--score", type=float, default=0.3, help="do not draw boxes with a lower score; default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not Path(args.image).is_file():
        raise FileNotFoundError(f"no image at {args.image}")
    picture = mmcv.imread(args.image)
    if picture is None:
        raise UserError(f"{args.image} cannot be read as an image")
    config = load_config(args.config or config_of(args.checkpoint), args.cfg_options)
    model = build_model(config, args.checkpoint).to(args.device)

    data = Compose(image_steps(config.test_dataloader.dataset))(dict(img_path=args.image, img_id=0))
    with torch.inference_mode():
        result = model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0]

    visualizer = VISUALIZERS.build(config.visualizer)
    visualizer.dataset_meta = model.dataset_meta
    options = dict(pred_score_thr=args.score) if config.default_scope == "mmdet" else {}
    visualizer.add_datasample("demo", mmcv.bgr2rgb(picture), result, draw_gt=False, out_file=args.out, **options)
    if config.default_scope == "mmdet":
        print(f"{(result.pred_instances.scores >= args.score).sum()} objects")
    print(f"written to {args.out}")
