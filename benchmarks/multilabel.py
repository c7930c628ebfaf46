"""Writes a small multi-label data set, which needs no download: canvases of 2 x 2 places, each with one of scikit-learn's handwritten
digits or none, and as labels the digits that a canvas shows. The digits of validation are others than those of training.

    python multilabel.py DIR        # DIR/train.csv, DIR/val.csv and their images
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

PLACE = 16  # pixels a side of a place
COUNTS = {"train": 1200, "val": 400}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    parts = dict(zip(COUNTS, np.split(order, [len(order) * 3 // 4])))
    for split, count in COUNTS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        rng, rows = np.random.default_rng(1), []
        for i in range(count):
            canvas, shown = Image.new("L", (2 * PLACE, 2 * PLACE)), set()
            for place in np.flatnonzero(rng.random(4) < 0.5).tolist():
                digit = rng.choice(parts[split])
                picture = Image.fromarray((digits.images[digit] * (255 / 16)).astype(np.uint8)).resize((PLACE, PLACE))
                canvas.paste(picture, (place % 2 * PLACE, place // 2 * PLACE))
                shown.add(str(digits.target[digit]))
            canvas.save(folder / split / f"{i}.png")
            rows.append([f"{split}/{i}.png", "|".join(sorted(shown))])
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["image", "labels"], *rows])


if __name__ == "__main__":
    main()
