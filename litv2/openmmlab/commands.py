"""The commands of detection/ and segmentation/, thin over mmengine's Runner: train, test, get_flops and demo."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path

try:
    import mmcv
    import torch
    from mmengine.config import Config, DictAction
    from mmengine.dataset import Compose
    from mmengine.evaluator import DumpResults
    from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
except ImportError as error:
    raise SystemExit(f"error: {error}; detection and segmentation need OpenMMLab's packages: run `make mm` (README)") from None

from .config import adapt_to_device, load_config, revert_sync_bn
from .flops import count_flops
from .plots import plot_curves
from .runner import CarefulRunner, load_checkpoint

__all__ = ["arguments", "build_model", "command", "config_of", "demo", "get_flops", "load_config", "test", "train"]


def command(function: Callable[[], None]) -> Callable[[], None]:
    """Ends the program with one line for an error that our own checks found, with the traceback for any other."""

    @wraps(function)
    def run() -> None:
        try:
            function()
        except ModuleNotFoundError as error:
            raise SystemExit(f"error: {error}; `make mm` installs what detection and segmentation need (README)") from None
        except (ValueError, OSError) as error:
            if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent == Path(__file__).parent:
                raise SystemExit(f"error: {error}") from None
            raise

    return run


def arguments(description: str, launcher: bool = False) -> argparse.ArgumentParser:
    """The flags that the commands share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="changes to the configuration, such as train_dataloader.batch_size=4; data_root=DIR moves all data sets",
    )
    if launcher:
        parser.add_argument("--work-dir", help="folder of logs and checkpoints; default: work_dirs/NAME_OF_CONFIG")
        parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], help="default: pytorch under torchrun, else none")
        parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by torch.distributed.launch")
    return parser


def prepare(args: argparse.Namespace) -> Config:
    """The configuration that the command line asks for, for this machine."""
    launcher = args.launcher or ("pytorch" if "RANK" in os.environ and "WORLD_SIZE" in os.environ else "none")
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config = load_config(args.config, args.cfg_options)
    if args.work_dir:
        config.work_dir = args.work_dir
    if getattr(args, "amp", False):
        config.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic")
    adapt_to_device(config, launcher)
    return config


@command
def train() -> None:
    parser = arguments("Trains the model of a configuration.", launcher=True)
    parser.add_argument("config")
    parser.add_argument("--amp", action="store_true", help="mixed precision (the detectors' configurations have it on)")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="FILE", help="go on from FILE, or from the latest in the work folder")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the total batch size")
    args = parser.parse_args()
    config = prepare(args)
    if args.auto_scale_lr:
        if "auto_scale_lr" not in config:
            raise ValueError("--auto-scale-lr: the configuration has no auto_scale_lr, which says what batch size its learning rate is for")
        config.auto_scale_lr.enable = True
    if args.resume:
        config.resume = True
        config.load_from = None if args.resume == "auto" else args.resume
    runner = CarefulRunner.from_cfg(config)
    runner.train()
    if runner.rank == 0:
        plot_curves(runner.work_dir, Path(runner.work_dir) / "curves.png")
        print(f"checkpoints, logs and curves.png are in {runner.work_dir}")


@command
def test() -> None:
    parser = arguments("Evaluates a checkpoint.", launcher=True)
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", metavar="FILE.pkl", help="write the predictions")
    parser.add_argument("--show-dir", metavar="DIR", help="draw predictions beside the ground truth")
    args = parser.parse_args()
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        raise ValueError(f"--out {args.out}: predictions are written as .pkl")
    config = prepare(args)
    config.load_from = args.checkpoint
    if args.show_dir:
        config.default_hooks.visualization.update(draw=True, interval=1)
        if config.default_scope == "mmdet":
            config.default_hooks.visualization.test_out_dir = str(Path(args.show_dir).absolute())
        else:
            config.visualizer.save_dir = args.show_dir
    runner = CarefulRunner.from_cfg(config)
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    runner.test()


@command
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


@command
def demo() -> None:
    parser = arguments("Draws what a model finds in an image.")
    parser.add_argument("image")
    parser.add_argument("--checkpoint", required=True, help="a file or URL")
    parser.add_argument("--config", help="default: the one of ours whose name is in the checkpoint's path")
    parser.add_argument("--out", required=True, metavar="PICTURE")
    parser.add_argument("--score", type=float, default=0.3, help="boxes of a lower score are not drawn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not Path(args.image).is_file():
        raise FileNotFoundError(f"no image at {args.image}")
    picture = mmcv.imread(args.image)
    if picture is None:
        raise ValueError(f"{args.image} cannot be read as an image")
    config = load_config(args.config or config_of(args.checkpoint), args.cfg_options)
    model = build_model(config, args.checkpoint).to(args.device)

    pipeline = [step for step in config.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"]
    data = Compose(pipeline)(dict(img_path=args.image, img_id=0))
    with torch.inference_mode():
        result = model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0]

    visualizer = VISUALIZERS.build(config.visualizer)
    visualizer.dataset_meta = model.dataset_meta
    options = dict(pred_score_thr=args.score) if config.default_scope == "mmdet" else {}
    visualizer.add_datasample("demo", mmcv.bgr2rgb(picture), result, draw_gt=False, out_file=args.out, **options)
    if config.default_scope == "mmdet":
        print(f"{(result.pred_instances.scores >= args.score).sum()} objects")
    print(f"written to {args.out}")


def build_model(config: Config, checkpoint: str | None = None) -> torch.nn.Module:
    """The model of a configuration in evaluation mode, in one process on the CPU, with ``dataset_meta``.

    Without a checkpoint its weights are random.
    """
    init_default_scope(config.default_scope)
    revert_sync_bn(config.model)
    model = MODELS.build(config.model).eval().to(memory_format=torch.channels_last)
    meta = load_checkpoint(model, checkpoint)["meta"] if checkpoint else {}
    dataset = config.test_dataloader.dataset
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        model.dataset_meta = {**registry.get(dataset.type).METAINFO, **dataset.get("metainfo", {})}
    for source in (meta, meta.get("dataset_meta") or {}):  # the release's files, ours
        model.dataset_meta |= {key.lower(): value for key, value in source.items() if key.lower() in ("classes", "palette")}
    return model


def config_of(checkpoint: str) -> str:
    """The configuration of ours that a checkpoint's path names: ``.../NAME.pth`` or ``.../NAME/epoch_12.pth``."""
    root = Path(__file__).resolve().parents[1]
    configs = [path for task in ("detection", "segmentation") for path in (root / task / "configs/litv2").glob("*.py")]
    named = [path for path in configs if path.stem in checkpoint]
    if not named:
        raise ValueError(f"--checkpoint {checkpoint}: no configuration is named like it; say which with --config")
    return str(max(named, key=lambda path: len(path.stem)))
