"""Times the model of a configuration against the same one with Swin-T. From segmentation/:

    python tools/benchmark.py configs/litv2/litv2_s_fpn_r50_512x512_80k_ade20k.py --synthetic
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # of this checkout

from dense import main

if __name__ == "__main__":
    main()
