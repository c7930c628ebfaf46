# SPDX-License-Identifier: Apache-2.0
"""Measures `python -m litv2 predict FOLDER --csv` in images/s, beside the model alone and the reading of images alone, and its memory.

    python benchmarks/predict.py --checkpoint FILE --data-path DIR --images 500 2000

The images of DIR are linked under new names, repeated in turns, into temporary folders of so many images. Reading is what ``predict`` does
without the model: decoding, resizing and batching in its workers. The model alone runs on a batch that is there already. Each command runs
in a process of its own, whose start, about that of importing torch, counts in the seconds and not in the images/s: those are of the images
that the largest folder has more than the smallest. Memory is the highest resident one of the command's process. Writes JSON and CSV.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from harness import ROOT, parser, positive, publish, say
from litv2.commands.predict import use_fastest
from litv2.errors import UserError, run_program
from litv2.explain.subjects import Classifier
from litv2.image_batches import batches, usual_workers
from litv2.image_list import image_list


def main() -> None:
    flags = parser(__doc__, "predict", threads=False)
    flags.add_argument("--checkpoint", required=True, metavar="FILE", help="a classifier's weights")
    flags.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="images, also in subfolders")
    flags.add_argument("--images", type=positive, nargs="+", default=[500, 2000], metavar="N", help="default: 500 2000")
    flags.add_argument("--batch-size", type=positive, default=32)
    flags.add_argument("--fast", action="store_true", help="as of predict; the model alone is then in that form, too")
    args = flags.parse_args()
    if len(set(args.images)) < 2:
        raise UserError(f"--images {args.images}: expected two sizes or more, since the start of the command does not count")
    sources = image_list([args.data_path])
    classifier = Classifier(args.checkpoint)
    if args.fast:
        use_fastest(classifier, args.batch_size)
    measured: dict[int, tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(args.images):
            images = Path(folder, str(count))
            images.mkdir()
            for i in range(count):
                source = sources[i % len(sources)].resolve()
                (images / f"{i:07}{source.suffix}").symlink_to(source)
            measured[count] = (*command(images, args), read(images, classifier, args.batch_size))
            say(f"{count} images: done")
    least, most = min(measured), max(measured)
    rates = dict(
        predict=(most - least) / (measured[most][0] - measured[least][0]), reading=most / measured[most][2], model=compute(classifier, args)
    )
    title = "images/s: " + ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items())
    rows = [
        dict(images=count, seconds=round(seconds, 1), peak_MiB=round(mebibytes), reading_s=round(reading, 1))
        for count, (seconds, mebibytes, reading) in measured.items()
    ]
    publish(rows, args.out, title, batch_size=args.batch_size, img_size=classifier.size)


def command(images: Path, args: argparse.Namespace) -> tuple[float, float]:
    """Runs it, and returns its seconds and its highest resident memory in MiB."""
    line = [sys.executable, "-m", "litv2", "predict", str(images), "--checkpoint", args.checkpoint, "--device", "cpu"]
    line += ["--batch-size", str(args.batch_size), *(["--fast"] if args.fast else []), "--csv", str(images.with_suffix(".csv"))]
    start = time.perf_counter()
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(line)} failed; see its message above")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def read(images: Path, classifier: Classifier, batch_size: int) -> float:
    """Returns the seconds of reading all images without the model."""
    paths = image_list([images])
    start = time.perf_counter()
    for _ in batches(paths, classifier.transform, batch_size, usual_workers(len(paths), batch_size), []):
        pass
    return time.perf_counter() - start


def compute(classifier: Classifier, args: argparse.Namespace, rounds: int = 20) -> float:
    """Returns the images/s of the model alone, with the median time of the rounds."""
    batch = torch.randn(args.batch_size, classifier.network.in_chans, classifier.size, classifier.size)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        classifier.confidences(batch)
        seconds.append(time.perf_counter() - start)
    return args.batch_size / sorted(seconds)[rounds // 2]


if __name__ == "__main__":
    sys.exit(run_program(main))
