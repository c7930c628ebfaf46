# SPDX-License-Identifier: Apache-2.0
"""Writes a small multi-label data set, which needs no download: canvases of 2 x 2 places, each with one of scikit-learn's handwritten
digits or none, and as labels the digits that a canvas shows. The digits of validation are others than those of training. From this folder:

    python digits_to_csv.py DIR        # DIR/train.csv, DIR/val.csv and their images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # litv2 of this checkout, installed or not

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from data.table import IMAGE, LABELS, SEPARATOR
from litv2.errors import run_program
from report import write_csv

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
            rows.append([f"{split}/{i}.png", SEPARATOR.join(sorted(shown))])
        write_csv(folder / f"{split}.csv", [[IMAGE, LABELS], *rows])


if __name__ == "__main__":
    sys.exit(run_program(main))
