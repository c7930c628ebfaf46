# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the documents, each for light and dark pages, into the folder of this file:

    python docs/figures/draw.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import architecture
import hilo_layer
import map_size
import model_speed
import small_models
from canvas import THEMES

HERE = Path(__file__).resolve().parent
FIGURES = {
    "hilo": hilo_layer.draw,
    "architecture": architecture.draw,
    "models": model_speed.draw,
    "map-size": map_size.draw,
    "small-models": small_models.draw,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="output folder; default: the folder of this program")
    folder = parser.parse_args().out
    for name, draw in FIGURES.items():
        for theme in THEMES:
            path = folder / f"{name}-{theme}.svg"
            path.write_text(draw(theme), encoding="utf-8", newline="\n")
            print(f"{path.name}: {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
