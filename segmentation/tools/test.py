# SPDX-License-Identifier: Apache-2.0
"""Evaluates a segmenter. From segmentation/:

    python tools/test.py configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py CHECKPOINT --eval mIoU
    tools/dist_test.sh configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py CHECKPOINT 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from litv2.errors import run_program


def main() -> None:
    from litv2.openmmlab.commands import test  # imported here, so that a missing package gives a one-line error

    test()


if __name__ == "__main__":
    sys.exit(run_program(main))
