# SPDX-License-Identifier: Apache-2.0
"""How well `python -m litv2 check-data` tells copies from other pictures and wrong labels from right ones, and how fast it reads.

    python benchmarks/check_data.py DIR --checkpoint FILE

DIR is a data set without duplicates. Copies of its images are made in several ways, and their hashes compared with the originals'. For the
labels, 20 at a time are changed at random, 12 times, and looked for with the features of the checkpoint.
"""

from __future__ import annotations

import io
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness import parser, publish, say
from litv2.data_check.duplicates import DISTANCE
from litv2.data_check.labels import suspicious_labels
from litv2.data_check.listing import find_images
from litv2.data_check.reading import fingerprints, read_images
from litv2.errors import run_program
from litv2.explain.subjects import Classifier
from litv2.preprocess import read_image

CHANGED, DRAWS = 20, 12


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without this share of the sides at each edge."""
    W, H = image.size
    return image.crop((round(share * W), round(share * H), round((1 - share) * W), round((1 - share) * H)))


COPIES = {
    "JPEG of quality 10": lambda image: jpeg(image, 10),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "32 x 32 pixels": lambda image: image.resize((32, 32)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "1.3 times as bright": lambda image: image.point(lambda value: min(255, round(1.3 * value))),
    "2 % cut off at each edge": lambda image: cropped(image, 0.02),
    "5 % cut off at each edge": lambda image: cropped(image, 0.05),
}


def main() -> None:
    flags = parser(__doc__, "check_data", threads=False)
    flags.add_argument("folder", type=Path, metavar="DIR")
    flags.add_argument("--checkpoint", required=True, metavar="FILE")
    flags.add_argument("--copies", type=int, default=150, metavar="N", help="images that are copied in each way")
    args = flags.parse_args()
    entries = find_images(args.folder).entries
    start = time.perf_counter()
    readings = [reading for batch, _ in read_images(entries, workers=0) for reading in batch]
    seconds = 1000 * (time.perf_counter() - start) / len(entries)
    say("read")
    rows = [dict(measure="seconds per 1000 images, in one process", value=seconds), *distances(readings)]
    rng = np.random.default_rng(0)
    chosen = [readings[i] for i in rng.permutation(len(readings))[: args.copies]]
    for name, change in COPIES.items():
        apart = np.array([bits_apart(fingerprints(change(read_image(reading.entry.path)))[1], reading.bits) for reading in chosen])
        rows.append(dict(measure=f"{name}: median bits", value=float(np.median(apart))))
        rows.append(dict(measure=f"{name}: found in %", value=float(100 * (apart <= DISTANCE).mean())))
        say(name)
    rows += labels(entries, args.checkpoint, rng)
    rows = [{**row, "value": round(row["value"], 1)} for row in rows]
    publish(rows, args.out, f"check-data, {len(entries)} images", checkpoint=args.checkpoint)


def bits_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.bitwise_count(a ^ b).sum())


def distances(readings: list) -> list[dict]:
    """The pairs of all images, none of which are copies."""
    bits = np.unpackbits(np.stack([reading.bits for reading in readings]), axis=1).astype(np.float32)
    apart = (bits @ (1 - bits).T + (1 - bits) @ bits.T)[np.triu_indices(len(bits), 1)]
    false = int((apart <= DISTANCE).sum())
    return [dict(measure="false near duplicates", value=false), dict(measure="fewest bits between two images", value=float(apart.min()))]


def labels(entries: list, checkpoint: str, rng: np.random.Generator) -> list[dict]:
    classifier = Classifier(checkpoint)
    features = [classifier.features(images) for _, images in read_images(entries, 0, classifier.transform) if images is not None]
    values, names = torch.cat(features).numpy(), np.array([entry.label for entry in entries])
    known = np.unique(names)
    listed, found = [], []
    for _ in range(DRAWS):
        changed = rng.permutation(len(names))[:CHANGED]
        others = np.array([rng.choice(known[known != name]) for name in names[changed]])
        wrong = names.copy()
        wrong[changed] = others
        suspicious = {suspicion.image for suspicion in suspicious_labels(values, wrong.tolist())}
        listed.append(len(suspicious))
        found.append(100 * len(suspicious & set(changed.tolist())) / len(changed))
    return [
        dict(measure="suspicious labels", value=len(suspicious_labels(values, names.tolist()))),
        dict(measure=f"suspicious labels, {CHANGED} being changed", value=float(np.mean(listed))),
        dict(measure="of the changed ones found in %", value=float(np.mean(found))),
    ]


if __name__ == "__main__":
    raise SystemExit(run_program(main))
