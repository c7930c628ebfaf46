# SPDX-License-Identifier: Apache-2.0
"""Measures the images per second of a segmenter. From segmentation/:

    python tools/benchmark.py configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --checkpoint CHECKPOINT
    python tools/benchmark.py configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --synthetic
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from litv2.errors import run_program


def main() -> None:
    from litv2.openmmlab.commands import benchmark  # imported here, so that a missing package gives a one-line error

    benchmark()


if __name__ == "__main__":
    sys.exit(run_program(main))
