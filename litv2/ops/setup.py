# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU operators, litv2.ops._C; see ``mm_modules/build.py`` for the requirements.

    python setup.py build_ext --inplace
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

FOLDER = Path(__file__).resolve().parent
os.chdir(FOLDER)
sys.path.insert(0, str(FOLDER.parents[1]))

from mm_modules import __version__  # noqa: E402
from mm_modules.build import setup_arguments, why_not  # noqa: E402

if (problem := why_not()) is not None:
    sys.exit(f"litv2.ops: {problem}")
setup(name="litv2-ops", version=__version__, packages=["litv2.ops"], package_dir={"litv2.ops": "."}, **setup_arguments("litv2.ops._C"))
