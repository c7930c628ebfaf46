"""Compiles the extensions: what ``python -m litv2 build`` and the three ``setup.py`` have in common.

They are built against the torch of this environment: with their CPU kernels always, and, where there are CUDA sources, with those
where that torch has CUDA and nvcc is found (no GPU is needed). CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS are respected;
LITV2_DCN_CUDA=0 leaves the CUDA kernels out. Linux and macOS, GCC or clang. Nothing here imports torch before it is asked to.
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

__all__ = ["compiler_tag", "folder_of", "identity", "setup_arguments", "sources_digest", "why_no_cuda", "why_not"]

ROOT = Path(__file__).resolve().parents[1]  # of the importable packages, in a checkout or in site-packages
FLAGS = {
    "mm_modules.DCN._C": ["-O3"],
    "litv2.ops._C": ["-O3", "-ffp-contract=fast", "-Wno-psabi"],
}
SAMPLE = "mm_modules/DCN/csrc/sample.h"  # of the one, and included by the other
# Without debugging symbols, which are most of a library. Compiled with -fopenmp (at::parallel_for is serial without) but linked
# without: the symbols come from torch's own OpenMP runtime. A second one would bring a second pool of threads.
COMMON_FLAGS = ["-g0"] if sys.platform == "darwin" else ["-g0", "-fopenmp"]


def folder_of(name: str) -> Path:
    """The folder of an extension's package."""
    return ROOT.joinpath(*name.split(".")[:-1])


@cache
def sources_digest(name: str) -> str:
    """Of what an extension is compiled from: its csrc/, the arithmetic of deformable samples, which both share, and the flags.
    Empty where the sources are not installed.
    """
    files = sorted(path for path in folder_of(name).glob("csrc/*") if path.suffix)
    if not files:
        return ""
    digest = hashlib.sha256(repr((FLAGS[name], COMMON_FLAGS)).encode())
    for path in [*files, ROOT / SAMPLE]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def identity(torch_version: str, digest: str) -> str:
    """What the documentation of an extension's module ends with, in csrc/ (the one with ``PyInit__C``) as here."""
    return f"built for torch {torch_version} from the sources {digest}."


def why_not() -> str | None:
    """What is missing for a build, and how to get it; None if nothing is."""
    if sys.platform == "win32":
        return "the extensions are compiled with GCC or clang on Linux and macOS, not on Windows"
    for package in ("torch", "setuptools"):
        if importlib.util.find_spec(package) is None:
            return f"{package} must be installed first: pip install {package}"
    if shutil.which(_compiler()[0]) is None:
        return (
            f"no C++ compiler: {_compiler()[0]} was not found. Install GCC or clang (Debian, Ubuntu: apt install g++; "
            "macOS: xcode-select --install), or name yours in CXX"
        )
    spec = importlib.util.find_spec("torch")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not any((Path(folder) / "include/torch/csrc/api/include/torch/version.h").is_file() for folder in folders):
        return f"the torch in {', '.join(folders)} comes without its C++ headers; pip's and conda's have them"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's C headers are missing (Debian, Ubuntu: apt install python3-dev)"
    return None


def compiler_tag(name: str) -> str:
    """The compilers of an extension, with their versions, as part of a file name."""
    lines = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True).stdout.splitlines()
    tag = re.sub(r"[^\w.+]+", "-", lines[0] if lines else _compiler()[0])
    return f"{tag}-cuda" if _cuda_sources(name) and why_no_cuda() is None else tag


def setup_arguments(*names: str) -> dict:
    """``ext_modules`` and ``cmdclass`` for setuptools.setup(), which runs in the present folder. Nothing must be missing: ``why_not()``."""
    if any(map(_cuda_sources, names)) and why_no_cuda() is None:
        os.environ["CUDA_HOME"] = str(_cuda_home())  # read when torch.utils.cpp_extension is imported
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"  # for the ninja of this environment

    import torch
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;8.6;9.0+PTX"  # Ampere to Hopper, and by PTX what came later

    def extension(name: str, with_cuda: bool):
        csrc = Path(os.path.relpath(folder_of(name) / "csrc"))  # setuptools takes no absolute paths
        files = [str(path) for path in sorted(csrc.glob("*.cpp"))]
        flags = {"cxx": [*FLAGS[name], *COMMON_FLAGS, f"-DLITV2_SOURCES={sources_digest(name)}"]}
        arguments = dict(
            depends=[str(path) for path in sorted((*csrc.glob("*.h"), *csrc.glob("*.inl"), os.path.relpath(ROOT / SAMPLE)), key=str)],
            include_dirs=[str((ROOT / SAMPLE).parent)],
            extra_compile_args=flags,
        )
        if not with_cuda:
            return cpp_extension.CppExtension(name, files, **arguments)
        flags["cxx"].append("-DDCN_WITH_CUDA")
        flags["nvcc"] = ["-O3"]
        return cpp_extension.CUDAExtension(name, [*files, *(str(csrc / file) for file in _cuda_sources(name))], **arguments)

    class BuildExtension(cpp_extension.BuildExtension):
        """Falls back to the CPU kernels where the CUDA kernels do not build, and says at the end what was built."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "use_ninja": cpp_extension.is_ninja_available()})

        def run(self) -> None:
            reason = why_no_cuda()
            before = {name: vars(self)[name] for name in ("compiler", "inplace")}  # changed by the run, and not put back when it fails
            try:
                super().run()
            except Exception as error:  # the compiler has printed its own message
                if reason is not None or not any(map(_cuda_sources, names)):
                    raise
                reason = f"they do not compile ({type(error).__name__} above)"
                self.__dict__.update(before)
                for each in self.extensions:
                    vars(each).update(vars(extension(each.name, with_cuda=False)))  # setuptools' own marks on it stay
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
    """The reason not to build the CUDA kernels, or None."""
    import torch

    home = _cuda_home()
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


def _cuda_home() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else where the nvcc on PATH says that it lives, else the usual folder."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):  # possibly a wrapper: its own word counts, not its place
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True)
        if here := re.search(r"_HERE_=(\S+)", dry_run.stderr):
            return Path(here[1]).parent
    usual = Path("/usr/local/cuda")
    return usual if usual.is_dir() else None


def _cuda_sources(name: str) -> list[str]:
    """Their names in csrc/."""
    return [path.name for path in sorted(folder_of(name).glob("csrc/*.cu"))]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "") or ["c++"]
