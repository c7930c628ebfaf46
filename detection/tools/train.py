# SPDX-License-Identifier: Apache-2.0
"""Trains a detector. From detection/:

    python tools/train.py configs/litv2/retinanet_litv2_s_fpn_1x_coco.py
    tools/dist_train.sh configs/litv2/retinanet_litv2_s_fpn_1x_coco.py 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from litv2.errors import run_program


def main() -> int | None:
    from litv2.openmmlab.commands import train  # imported here, so that a missing package gives a one-line error

    return train()


if __name__ == "__main__":
    sys.exit(run_program(main))
