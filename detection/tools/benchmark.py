"""Times the model of a configuration against the same one with Swin-T. From detection/:

    python tools/benchmark.py configs/litv2/retinanet_litv2_s_fpn_1x_coco.py --synthetic
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # of this checkout

from dense import main

if __name__ == "__main__":
    main()
