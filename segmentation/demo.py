# SPDX-License-Identifier: Apache-2.0
"""Draws the segmentation of an image by a model. From segmentation/:

    python demo.py IMAGE --checkpoint litv2_s_fpn_r50_512x512_80k_ade20k.pth --out PICTURE.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from litv2.errors import run_program


def main() -> None:
    from litv2.openmmlab.commands import demo  # imported here, so that a missing package gives a one-line error

    demo()


if __name__ == "__main__":
    sys.exit(run_program(main))
