# SPDX-License-Identifier: Apache-2.0
"""pyproject.toml says everything. Only with LITV2_BUILD=1 are the compiled extensions put into the wheel, which then fits one torch:

    LITV2_BUILD=1 pip wheel --no-deps --no-build-isolation .
"""

import os
import sys
from pathlib import Path

from setuptools import setup

if os.environ.get("LITV2_BUILD") == "1":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from mm_modules.build import FLAGS, setup_arguments, why_not

    if (problem := why_not()) is not None:
        sys.exit(f"litv2: {problem}")
    setup(**setup_arguments(*FLAGS))
else:
    setup()
