# SPDX-License-Identifier: Apache-2.0
"""Measures the trainer's input pipeline in images/s by number of workers, compared with what a training step consumes.

    python benchmarks/loader.py --workers 0 1 2
    python benchmarks/loader.py --data-path DIR --workers 4 8 16 --consumed 1200      # DIR/train/CLASS/IMAGE; rate measured on the GPU

The images are read from a folder of JPEGs, from the release's zip and from a tar, and go through ``classification/data`` as in training:
reading, decoding, cropping, RandAugment, erasing, batching. Without --data-path, they are random crops of scikit-learn's two sample
photographs, about 500 x 375; with it, --images of them are drawn at random. All are in a temporary folder and are read once before the
timing, which therefore measures the processor, not the disk. Each pass starts with empty queues, so with few images, workers appear
slow. The consumption is that of a LITv2-S training step, measured in the same run (see ``training.py``) or given by --consumed. On a CPU,
workers and training share the cores. Writes JSON, CSV and a plot.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

from harness import COLOURS, ROOT, device_name, figure, non_negative, parser, percentiles, positive, publish, samples
from litv2.errors import MissingPackage, UserError, run_program
from litv2.export.images import photographs
from training_step import PRECISIONS, known_model, random_batch, training_step

# Modules of the trainer, which the harness makes importable.
# isort: split
import distributed
from config import load_config
from data import build_loaders

RECIPE = ROOT / "classification/configs/litv2-small.yaml"
SOURCES = {  # by name: keys of the trainer's configuration
    "folder": ["DATA.DATASET", "folder"],
    "zip": ["DATA.ZIP_MODE", True, "DATA.CACHE_MODE", "no"],
    "tar": ["DATA.DATASET", "tar"],
}


def main() -> None:
    flags = parser(__doc__, "loader")
    flags.set_defaults(rounds=3)
    flags.add_argument("--data-path", type=Path, metavar="DIR", help="data set with DIR/train/CLASS/IMAGE; default: generated images")
    flags.add_argument("--images", type=positive, default=512, help="images per source; a round is one pass over all of them")
    flags.add_argument("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    flags.add_argument("--workers", nargs="+", type=non_negative, default=[0, 1, 2], metavar="N")
    flags.add_argument("--batch-size", type=positive, default=32)
    flags.add_argument("--img-size", type=positive, default=224)
    flags.add_argument("--consumed", type=float, metavar="IMAGES_PER_S", help="consumption of training; default: measured")
    flags.add_argument("--dtype", default="float32", choices=PRECISIONS, help="dtype of the measured training step")
    flags.add_argument("--device", type=device_name, default="cpu", help="device of the measured training step")
    args = flags.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), args)
        loaders = {(source, workers): loader(Path(folder), source, workers, args) for source in args.sources for workers in args.workers}
        functions: dict[object, Callable[[], object]] = {key: partial(run_through, batches) for key, batches in loaders.items()}
        if args.consumed is None:
            batch = random_batch(args.batch_size, args.img_size)
            step = training_step(known_model("litv2_small"), batch, distributed.pick_device(args.device))
            functions["training"] = partial(step, PRECISIONS[args.dtype])
        seconds = samples(functions, args.rounds, args.warm_up)
    consumed = args.consumed or args.batch_size / statistics.median(seconds["training"])
    rows = [row(*key, [len(batches.sampler) / value for value in seconds[key]], consumed) for key, batches in loaders.items()]
    count = len(next(iter(loaders.values())).sampler)
    title = f"input pipeline, {count} images to {args.img_size} x {args.img_size}; training consumes {consumed:.1f} images/s"
    publish(rows, args.out, title, plot, device=args.device, batch_size=args.batch_size, img_size=args.img_size, dtype=args.dtype)


def fill(folder: Path, args: argparse.Namespace) -> None:
    """Writes folder/train/CLASS/IMAGE, and the same images as train.zip with train_map.txt and as train.tar."""
    chance = random.Random(0)
    if args.data_path:
        found = sorted(path for path in (args.data_path / "train").glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise UserError(f"there are no images at {args.data_path}/train/CLASS/IMAGE")
        for path in chance.sample(found, min(args.images, len(found))):
            target = folder / "train" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    else:
        if photographs() is None:
            raise MissingPackage("generating images needs scikit-learn's photographs: pip install scikit-learn, or pass --data-path")
        pictures = [Image.open(path).convert("RGB") for path in sorted(photographs().glob("*.jpg"))]
        for i in range(args.images):
            target = folder / "train" / f"class{i % 10}" / f"{i}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            random_crop(chance.choice(pictures), chance).save(target, quality=90)
    files = sorted((folder / "train").glob("*/*"))
    classes = sorted({path.parent.name for path in files})
    names = [f"{path.parent.name}/{path.name}" for path in files]
    with zipfile.ZipFile(folder / "train.zip", "w") as zipped, tarfile.open(folder / "train.tar", "w") as tarred:
        for path, name in zip(files, names):
            zipped.write(path, name)
            tarred.add(path, name)
    (folder / "train_map.txt").write_text("".join(f"{name}\t{classes.index(name.partition('/')[0])}\n" for name in names))


def random_crop(photograph: Image.Image, chance: random.Random) -> Image.Image:
    """Returns a random crop of a photograph, about 500 x 375 pixels, sometimes in portrait format."""
    size = [round(side * chance.uniform(0.8, 1.2)) for side in (500, 375)]
    width, height = size if chance.random() < 0.75 else size[::-1]
    part = chance.uniform(0.5, 1) * min(photograph.width / width, photograph.height / height)
    w, h = part * width, part * height
    left, top = chance.uniform(0, photograph.width - w), chance.uniform(0, photograph.height - h)
    return photograph.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))


def loader(folder: Path, source: str, workers: int, args: argparse.Namespace) -> DataLoader:
    """Builds the trainer's loader with the recipe of LITv2-S."""
    data = dict(DATA_PATH=str(folder), VAL_SPLIT="train", NUM_WORKERS=workers, BATCH_SIZE=args.batch_size, IMG_SIZE=args.img_size)
    overrides = [part for key, value in data.items() for part in (f"DATA.{key}", value)]
    return build_loaders(load_config(RECIPE, overrides + SOURCES[source])).train


def run_through(batches: DataLoader) -> None:
    """Runs one pass over the images, in whole batches."""
    for _ in batches:
        pass


def row(source: str, workers: int, rates: list[float], consumed: float) -> dict:
    """Returns a row of the table; with 0 workers the training process loads the images itself, in turns with the steps."""
    low, median, high = percentiles(rates)
    return dict(
        source=source,
        workers=workers,
        images_per_s=round(median, 1),
        p10=round(low, 1),
        p90=round(high, 1),
        consumed=round(consumed, 1),
        times_consumed=round(median / consumed, 2),
    )


def plot(rows: list[dict], path: Path) -> None:
    """Plots the speed over the number of workers, a line per source, and the consumption of training."""
    with figure(path) as axes:
        for source, colour in zip(SOURCES, (COLOURS["paper"], COLOURS["second"], COLOURS["third"])):
            own = sorted((row for row in rows if row["source"] == source), key=lambda row: row["workers"])
            if own:
                middle = [row["images_per_s"] for row in own]
                spans = [[row["images_per_s"] - row["p10"] for row in own], [row["p90"] - row["images_per_s"] for row in own]]
                axes.errorbar([row["workers"] for row in own], middle, yerr=spans, marker="o", capsize=3, color=colour, label=source)
        axes.axhline(rows[0]["consumed"], color=COLOURS["ours"], linestyle="--", label="consumed by training")
        axes.set(xlabel="workers", ylabel="images/s", xticks=sorted({row["workers"] for row in rows}))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(run_program(main))
