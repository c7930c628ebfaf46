"""Builds the compiled backend of the deformable convolution, mm_modules.DCN._C.

    python setup.py build_ext --inplace      for use in this tree
    pip install .                            mm_modules.DCN on its own, for use elsewhere

It is built against the torch of this environment: with its CPU kernels always, and with its CUDA kernels where that torch
has CUDA and nvcc is found (no GPU is needed). CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected;
LITV2_DCN_CUDA=0 leaves the CUDA kernels out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

os.chdir(Path(__file__).resolve().parent)
# pip builds in an environment of its own, without the torch that will load the result: find that one.
sys.path.append(sysconfig.get_path("purelib"))

try:
    import torch
except ImportError as error:
    sys.exit(f"mm_modules.DCN: torch must be installed first ({error}); with another build tool than pip, turn build isolation off")


def cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else where the nvcc on PATH says that it lives, else the usual folder."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):  # possibly a wrapper: its own word counts, not its place
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        if here := re.search(r"_HERE_=(\S+)", dry_run.stderr):
            return Path(here[1]).parent
    usual = Path("/usr/local/cuda")
    return usual if usual.is_dir() else None


def why_no_cuda(home: Path | None) -> str | None:
    """The reason not to build the CUDA kernels, or None."""
    if os.environ.get("LITV2_DCN_CUDA") == "0":
        return "LITV2_DCN_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if home is None or not (home / "bin" / "nvcc").is_file():
        return f"no nvcc in {home / 'bin'}" if home else "no CUDA toolkit was found; CUDA_HOME names one"
    answer = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", answer)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"nvcc in {home} is {release[0] if release else 'unreadable'}, but torch was built with CUDA {torch.version.cuda}"
    return None


home = cuda_home()
reason = why_no_cuda(home)
if reason is None:
    os.environ["CUDA_HOME"] = str(home)  # read when torch.utils.cpp_extension is imported
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;8.6;9.0+PTX"  # Ampere to Hopper, and by PTX what came later

from setuptools import setup  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

HEADERS = ["csrc/kernels.h", "csrc/sample.h"]
SOURCES = ["csrc/deform_conv.cpp", "csrc/kernels_cpu.cpp"]
CUDA_SOURCES = ["csrc/kernels_cuda.cu"]


def extension(with_cuda: bool):
    # Compiled with -fopenmp (at::parallel_for is serial without) but linked without: the symbols come from torch's own
    # OpenMP runtime. A second one would bring a second pool of threads.
    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    flags = {"cxx": ["-O3", *openmp]}
    if not with_cuda:
        return cpp_extension.CppExtension("mm_modules.DCN._C", SOURCES, depends=HEADERS, extra_compile_args=flags)
    flags["cxx"].append("-DDCN_WITH_CUDA")
    flags["nvcc"] = ["-O3"]
    return cpp_extension.CUDAExtension("mm_modules.DCN._C", SOURCES + CUDA_SOURCES, depends=HEADERS, extra_compile_args=flags)


class BuildExtension(cpp_extension.BuildExtension):
    """Falls back to the CPU kernels where the CUDA kernels do not build, and says at the end what was built."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "use_ninja": cpp_extension.is_ninja_available()})

    def run(self) -> None:
        global reason
        compiler, inplace = self.compiler, self.inplace  # the run changes both, and puts nothing back when it fails
        try:
            super().run()
        except Exception as error:  # the compiler has printed its own message
            if reason is not None:
                raise
            reason = f"they do not compile ({type(error).__name__} above)"
            self.compiler, self.inplace = compiler, inplace
            vars(self.extensions[0]).update(vars(extension(with_cuda=False)))  # setuptools' own marks on it stay
            super().run()
        kernels = "CPU and CUDA kernels" if reason is None else f"CPU kernels, no CUDA kernels: {reason}"
        print(f"mm_modules.DCN._C for torch {torch.__version__}: {kernels}")


setup(
    name="litv2-dcn",
    version="0.1.0",
    description="Deformable convolution for CPU and CUDA, of LITv2",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["mm_modules", "mm_modules.DCN"],
    package_dir={"mm_modules": "..", "mm_modules.DCN": "."},
    install_requires=["torch>=2.6"],
    ext_modules=[extension(with_cuda=reason is None)],
    cmdclass={"build_ext": BuildExtension},
)
