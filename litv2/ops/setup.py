"""Builds the native CPU operators, litv2.ops._C, against the torch of this environment.

    python setup.py build_ext --inplace

Optional: without it, or with LITV2_NATIVE=0, everything runs on torch's own operators. Linux and macOS, GCC or clang.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)

try:
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(f"litv2.ops: torch must be installed first ({error})")

from setuptools import setup  # noqa: E402

CSRC = Path("csrc")
SAMPLING = Path("../../mm_modules/DCN/csrc")  # the arithmetic of deformable samples
# As for mm_modules.DCN: compiled with -fopenmp but linked without, the symbols come from torch's own OpenMP runtime.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]

setup(
    name="litv2-ops",
    version="0.1.0",
    ext_modules=[
        cpp_extension.CppExtension(
            "litv2.ops._C",
            [str(path) for path in sorted(CSRC.glob("*.cpp"))],
            depends=[str(path) for path in sorted((*CSRC.glob("*.h"), *CSRC.glob("*.inl"), SAMPLING / "sample.h"))],
            include_dirs=[str(SAMPLING.resolve())],
            extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi", *OPENMP],
        )
    ],
    packages=["litv2.ops"],
    package_dir={"litv2.ops": "."},
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=cpp_extension.is_ninja_available())},
)
