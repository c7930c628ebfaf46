# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled backend of the deformable convolution, mm_modules.DCN._C; see ``mm_modules/build.py`` for the requirements.

    python setup.py build_ext --inplace      for use in this tree
    pip install .                            mm_modules.DCN on its own, for use elsewhere
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

FOLDER = Path(__file__).resolve().parent
os.chdir(FOLDER)
# pip builds in an isolated environment without the torch that will load the result: find that one.
sys.path.append(sysconfig.get_path("purelib"))
sys.path.insert(0, str(FOLDER.parents[1]))

from mm_modules import __version__  # noqa: E402
from mm_modules.build import setup_arguments, why_not  # noqa: E402

if (problem := why_not()) is not None:
    sys.exit(f"mm_modules.DCN: {problem}")
setup(
    name="litv2-dcn",
    version=__version__,
    description="Deformable convolution for CPU and CUDA, from LITv2",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["mm_modules", "mm_modules.DCN"],
    package_dir={"mm_modules": "..", "mm_modules.DCN": "."},
    install_requires=["torch>=2.6"],
    **setup_arguments("mm_modules.DCN._C"),
)
