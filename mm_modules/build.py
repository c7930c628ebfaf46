# SPDX-License-Identifier: Apache-2.0
"""Compiles the extensions: the common part of ``python -m litv2 build`` and the three ``setup.py``.

The extensions are built against the torch of this environment. The CUDA kernels, if an extension has any, are included if that torch
was built with CUDA and nvcc is found; LITV2_DCN_CUDA=0 leaves them out. They are compiled for the GPUs of this machine, on one without
a GPU for all of ARCHITECTURES. CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected. Linux and macOS with GCC or clang are
supported. torch is imported only by the functions that need it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path

__all__ = ["architectures", "compiler_tag", "folder_of", "identity", "nvcc", "setup_arguments", "sources_digest", "why_no_cuda", "why_not"]

ROOT = Path(__file__).resolve().parents[1]  # folder of the importable packages, in a checkout or in site-packages
FLAGS = {
    "mm_modules.DCN._C": ["-O3"],
    "litv2.ops._C": ["-O3", "-ffp-contract=fast", "-Wno-psabi"],
}
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")  # Turing to Blackwell: the GPUs of torch's own builds for CUDA
SAMPLE = "mm_modules/DCN/csrc/sample.h"  # part of one extension, included by the other
# No debugging symbols, which are most of a library's size. Compiled with -fopenmp (otherwise at::parallel_for is serial) but linked
# without it: the symbols come from torch's own OpenMP runtime, and a second runtime would add a second thread pool.
COMMON_FLAGS = ["-g0"] if sys.platform == "darwin" else ["-g0", "-fopenmp"]
# For tests: LITV2_SANITIZE=address,undefined builds, and loads, libraries with GCC's checks (tests/sanitizers.py).
SANITIZE = os.environ.get("LITV2_SANITIZE", "")
if SANITIZE:
    COMMON_FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]


def folder_of(name: str) -> Path:
    """Returns the folder of an extension's package."""
    return ROOT.joinpath(*name.split(".")[:-1])


@cache
def sources_digest(name: str) -> str:
    """Returns a digest of everything an extension is compiled from: its csrc/, the shared sample.h, and the flags.

    Empty if the sources are not installed.
    """
    files = sorted(path for path in folder_of(name).glob("csrc/*") if path.suffix)
    if not files:
        return ""
    digest = hashlib.sha256(repr((FLAGS[name], COMMON_FLAGS)).encode())
    for path in [*files, ROOT / SAMPLE]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def identity(torch_version: str, digest: str) -> str:
    """Returns the end of the docstring of an extension's module; must match the file in csrc/ that has ``PyInit__C``."""
    return f"built for torch {torch_version} from the sources {digest}."


def why_not() -> str | None:
    """Returns what is missing for a build and how to install it; None if nothing is."""
    if sys.platform == "win32":
        return "building the extensions is not supported on Windows; it needs Linux or macOS with GCC or clang"
    for package in ("torch", "setuptools"):
        if importlib.util.find_spec(package) is None:
            return f"{package} must be installed first: pip install {package}"
    if shutil.which(_compiler()[0]) is None:
        return (
            f"no C++ compiler: {_compiler()[0]} was not found. Install GCC or clang (Debian, Ubuntu: apt install g++; "
            "macOS: xcode-select --install), or set CXX"
        )
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not any((Path(folder) / "include/torch/csrc/api/include/torch/version.h").is_file() for folder in folders):
        return f"the torch in {', '.join(folders)} comes without its C++ headers; install torch with pip or conda"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's C headers are missing (Debian, Ubuntu: apt install python3-dev)"
    return None


def compiler_tag(name: str) -> str:
    """Returns the compilers of an extension with their versions, as part of a file name."""
    lines = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()
    tag = re.sub(r"[^\w.+]+", "-", lines[0] if lines else _compiler()[0])
    return f"{tag}-cuda" if _cuda_sources(name) and why_no_cuda() is None else tag


def setup_arguments(*names: str) -> dict:
    """Returns ``ext_modules`` and ``cmdclass`` for setuptools.setup() in the current folder; requires that ``why_not()`` is None."""
    if any(map(_cuda_sources, names)) and why_no_cuda() is None:
        os.environ["CUDA_HOME"] = str(_cuda_home())  # read when torch.utils.cpp_extension is imported
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"  # finds the ninja of this environment

    import torch
    from torch.utils import cpp_extension

    def extension(name: str, with_cuda: bool):
        csrc = Path(os.path.relpath(folder_of(name) / "csrc"))  # setuptools accepts no absolute paths
        headers = {path for path in csrc.iterdir() if path.suffix in (".h", ".inl", ".cuh")} | {Path(os.path.relpath(ROOT / SAMPLE))}
        files = [str(path) for path in sorted(csrc.glob("*.cpp"))]
        flags = {"cxx": [*FLAGS[name], *COMMON_FLAGS, f"-DLITV2_SOURCES={sources_digest(name)}"]}
        arguments = dict(
            depends=sorted(map(str, headers)),
            include_dirs=[str((ROOT / SAMPLE).parent)],
            extra_compile_args=flags,
            extra_link_args=[f"-fsanitize={SANITIZE}"] if SANITIZE else [],
        )
        if not with_cuda:
            return cpp_extension.CppExtension(name, files, **arguments)
        flags["cxx"].append("-DDCN_WITH_CUDA")
        flags["nvcc"] = ["-O3"]
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
            known = architectures()
            flags["nvcc"] += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
            flags["nvcc"].append(f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}")  # for newer GPUs, by PTX
        return cpp_extension.CUDAExtension(name, [*files, *(str(csrc / file) for file in _cuda_sources(name))], **arguments)

    class BuildExtension(cpp_extension.BuildExtension):
        """Falls back to the CPU kernels if the CUDA kernels do not build, and reports at the end what was built."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "use_ninja": cpp_extension.is_ninja_available()})

        def run(self) -> None:
            reason = why_no_cuda()
            before = {name: vars(self)[name] for name in ("compiler", "inplace")}  # changed by the run and not restored if it fails
            try:
                super().run()
            except Exception as error:  # the compiler has printed its own message
                if reason is not None or not any(map(_cuda_sources, names)):
                    raise
                reason = f"they do not compile ({type(error).__name__} above)"
                self.__dict__.update(before)
                for each in self.extensions:
                    vars(each).update(vars(extension(each.name, with_cuda=False)))  # keeps the attributes that setuptools has added
                super().run()
            for name in names:
                kernels = "CPU kernels" if not _cuda_sources(name) else "CPU and CUDA kernels"
                if _cuda_sources(name) and reason is not None:
                    kernels = f"CPU kernels, no CUDA kernels: {reason}"
                print(f"{name} for torch {torch.__version__}: {kernels}")

    extensions = [extension(name, bool(_cuda_sources(name)) and why_no_cuda() is None) for name in names]
    return dict(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})


@cache
def why_no_cuda() -> str | None:
    """Returns the reason why the CUDA kernels cannot be built, or None."""
    import torch

    program = nvcc()
    if os.environ.get("LITV2_DCN_CUDA") == "0":
        return "LITV2_DCN_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if program is None or not program.is_file():
        return f"no nvcc in {program.parent}" if program else "no CUDA toolkit was found; set CUDA_HOME"
    answer = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", answer)
    for variable in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):  # no macro tells the sources of this option
        if "use_fast_math" in os.environ.get(variable, ""):
            return f"{variable} has -use_fast_math, which rounds small numbers to zero; the kernels must compute what the CPU does"
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"{program} is {release[0] if release else 'unreadable'}, but torch was built with CUDA {torch.version.cuda}"
    return None


def nvcc() -> Path | None:
    """Returns where the CUDA compiler is, or would be; None if no CUDA toolkit is found."""
    home = _cuda_home()
    return None if home is None else home / "bin/nvcc"


@cache
def architectures() -> list[str]:
    """Returns those of ARCHITECTURES that the CUDA compiler knows; requires that there is one."""
    answer = subprocess.run([str(nvcc()), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return [number for number in ARCHITECTURES if f"compute_{number}" in answer]


def _cuda_home() -> Path | None:
    """Returns the folder of the CUDA toolkit: CUDA_HOME, else the one that the nvcc on PATH reports, else the usual one."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):  # may be a wrapper, so its output counts, not its location
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        if here := re.search(r"_HERE_=(\S+)", dry_run.stderr):
            return Path(here[1]).parent
    usual = Path("/usr/local/cuda")
    return usual if usual.is_dir() else None


def _cuda_sources(name: str) -> list[str]:
    """Returns the names of an extension's CUDA sources in csrc/."""
    return [path.name for path in sorted(folder_of(name).glob("csrc/*.cu"))]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "") or ["c++"]
