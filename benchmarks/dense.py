"""Speed and memory of a detector or segmenter against the same one with another backbone, in interleaved runs.

    python benchmarks/dense.py detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py --synthetic
    python benchmarks/dense.py segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --synthetic

"Image to result" is ``test_step``: preprocessing, network, and boxes or labels at the end. Without --synthetic the images are
those of the configuration's test set. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch

from harness import interleaved, peak_memory, positive, table
from litv2.errors import MissingPackage, UserError, run_program

try:
    from litv2.openmmlab.build import build_model
    from litv2.openmmlab.commands import arguments
    from litv2.openmmlab.config import load_config
    from litv2.openmmlab.speed import random_images
except MissingPackage as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

# After the lines that say what to do where these are absent.
# isort: split
from mmengine.config import Config
from mmengine.registry import DATASETS

# Swin-T as mmdet and mmseg define it: the backbone of LITv2-S's size that they have.
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
        raise UserError(f"Swin-T gives 96 to 768 channels, this configuration's neck expects {config.model.neck.in_channels}")
    config.model.backbone = SWIN_T
    return config


def first_images(config: Config, count: int) -> list[dict]:
    """Batches of one image of the test set."""
    with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
        dataset = registry.build(config.test_dataloader.dataset)
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    return [dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]) for item in items]


def main() -> None:
    parser = arguments(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config")
    parser.add_argument("--synthetic", action="store_true", help="random images of --shape: no data set is needed")
    parser.add_argument(
        "--shape", type=positive, nargs=2, metavar=("H", "W"), help="default: 800 1216 for detectors, 512 512 for segmenters"
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
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
        if args.device == "cuda":
            torch.cuda.synchronize()

    rows = []
    with torch.inference_mode():
        for what, run in (("image to result", whole), ("backbone", backbone)):
            seconds = interleaved({name: lambda model=model, run=run: run(model) for name, model in models.items()}, args.rounds)
            ours, swin = (1e3 * value / len(batches) for value in seconds.values())
            rows.append([what, f"{ours:.0f}", f"{swin:.0f}", f"{swin / ours:.2f}"])
        memory = [peak_memory(lambda model=model: whole(model)) / 2**20 for model in models.values()]
    rows.append(["peak memory, MiB", f"{memory[0]:.0f}", f"{memory[1]:.0f}", f"{memory[1] / memory[0]:.2f}"])
    where = f"{args.device}, {args.threads} threads, torch {torch.__version__}"
    print(f"{config.model.type}, float32, one image of {shape[0]} x {shape[1]}, ms; {where}")
    print(table(["", *models, "times as good"], rows))


if __name__ == "__main__":
    sys.exit(run_program(main))
