# SPDX-License-Identifier: Apache-2.0
"""Counts multiply-adds and parameters. From segmentation/:

    python tools/get_flops.py configs/litv2/*.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, installed or not

from litv2.errors import run_program


def main() -> None:
    from litv2.openmmlab.commands import get_flops  # imported here, so that a missing package gives a one-line error

    get_flops()


if __name__ == "__main__":
    sys.exit(run_program(main))
