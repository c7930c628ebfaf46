# SPDX-License-Identifier: Apache-2.0
"""Compares speed and memory of a detector or segmenter with LITv2 and with another backbone, in interleaved runs.

    python benchmarks/dense.py detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py --synthetic
    python benchmarks/dense.py segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --synthetic

"Image to result" is ``test_step``: preprocessing, network, and postprocessing to boxes or labels. Without --synthetic the images are
from the configuration's test set. Weights are random. Writes JSON and CSV.
"""

from __future__ import annotations

import copy
import statistics
import sys
from functools import partial

import torch

from harness import device_name, milliseconds, parser, peak_memory, positive, publish, samples
from litv2.errors import MissingPackage, UserError, run_program

try:
    from litv2.openmmlab.build import build_model
    from litv2.openmmlab.config import load_config
    from litv2.openmmlab.speed import random_images
except MissingPackage as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

# These imports come after the check that reports missing packages.
# isort: split
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS

# Swin-T as defined in mmdet and mmseg: their backbone closest in size to LITv2-S.
SWIN_T = dict(
    type="SwinTransformer",
    embed_dims=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    mlp_ratio=4,
    qkv_bias=True,
    drop_path_rate=0.2,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
)


def with_swin(config: Config) -> Config:
    config = copy.deepcopy(config)
    if config.model.neck.in_channels != [96, 192, 384, 768]:
        raise UserError(f"Swin-T has 96 to 768 channels, but this configuration's neck expects {config.model.neck.in_channels}")
    config.model.backbone = SWIN_T
    return config


def first_images(config: Config, count: int) -> list[dict]:
    """Returns batches of one image from the test set."""
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        dataset = registry.build(config.test_dataloader.dataset)
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    return [dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]) for item in items]


def main() -> None:
    flags = parser(__doc__, "dense")
    flags.set_defaults(rounds=7)
    flags.add_argument("config")
    flags.add_argument("--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override keys of the configuration")
    flags.add_argument("--synthetic", action="store_true", help="use random images of --shape; needs no data set")
    flags.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="default: 800 1216 for detectors, 512 512 for segmenters"
    )
    flags.add_argument("--device", type=device_name, default="cuda" if torch.cuda.is_available() else "cpu")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(args.config, args.cfg_options)
    shape = tuple(args.shape or ((800, 1216) if config.default_scope == "mmdet" else (512, 512)))
    models = {"LITv2": build_model(config).to(args.device), "Swin-T": build_model(with_swin(config)).to(args.device)}
    batches = random_images(config, 1, *shape) if args.synthetic else first_images(config, 8)

    def whole(model: torch.nn.Module) -> None:
        for batch in batches:
            model.test_step(batch)

    def backbone(model: torch.nn.Module) -> None:
        for batch in batches:
            model.backbone(model.data_preprocessor(batch, False)["inputs"])

    rows = []
    with torch.inference_mode():
        for part, run in (("image to result", whole), ("backbone", backbone)):
            calls = {name: partial(run, model) for name, model in models.items()}
            times = samples(calls, args.rounds, args.warm_up, device=args.device)
            seconds = {name: [each / len(batches) for each in own] for name, own in times.items()}
            theirs = statistics.median(seconds["Swin-T"])
            for name, own in seconds.items():
                row = dict(part=part, model=name, **milliseconds(own), times_as_fast=round(theirs / statistics.median(own), 2))
                rows.append(row | dict(memory_MiB=round(peak_memory(calls[name], args.device) / 2**20)))
    title = f"{config.model.type}, float32, one image of {shape[0]} x {shape[1]}, medians of {args.rounds} interleaved rounds"
    publish(rows, args.out, title, device=args.device, config=str(args.config), shape=shape)


if __name__ == "__main__":
    sys.exit(run_program(main))
