"""Speed and memory of a detector or segmenter against the same one with another backbone, in interleaved runs.

    python detection/tools/benchmark.py detection/configs/litv2/retinanet_litv2_s_fpn_1x_coco.py --synthetic
    python segmentation/tools/benchmark.py segmentation/configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --synthetic

"Image to result" is ``test_step``: preprocessing, network, and boxes or labels at the end. Without --synthetic the images are
those of the configuration's test set. Weights are random.
"""

from __future__ import annotations

import argparse
import copy

import numpy as np
import torch

from harness import interleaved, peak_memory, positive, table
from litv2.openmmlab.commands import arguments, build_model, command, load_config

# The import before says what to do where these fail.
# isort: split
from mmengine.config import Config
from mmengine.dataset import Compose
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
        raise SystemExit(f"error: Swin-T gives 96 to 768 channels, this configuration's neck expects {config.model.neck.in_channels}")
    config.model.backbone = SWIN_T
    return config


def samples(config: Config, count: int, synthetic: bool, shape: tuple[int, int]) -> list[dict]:
    """Batches of one image, through the test pipeline."""
    if not synthetic:
        with DATASETS.switch_scope_and_registry(config.default_scope) as registry:
            dataset = registry.build(config.test_dataloader.dataset)
        items = [dataset[i] for i in range(min(count, len(dataset)))]
    else:
        steps = [step for step in config.test_dataloader.dataset.pipeline if not step["type"].startswith("Load")]
        resize = next(step for step in steps if step["type"] == "Resize")
        resize["scale"] = (shape[1], shape[0])
        pipeline = Compose([dict(type="LoadImageFromNDArray"), *steps])
        pixels = np.random.default_rng(0).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
        items = [pipeline(dict(img=image, img_id=i, img_path="")) for i, image in enumerate(pixels)]
    return [dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]) for item in items]


@command
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
    batches = samples(config, 1 if args.synthetic else 8, args.synthetic, shape)

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
