# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compiled for every architecture, and what the compiler made of them; needs nvcc, and no GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from gpu_helpers import cuobjdump
from mm_modules import build

CSRC = build.ROOT / "mm_modules/DCN/csrc"
PROBE = """
#include <c10/util/Half.h>
#include "kernels_cuda.cuh"
namespace litv2::dcn {
#define INSTANTIATE(T, V, A)                                                                                        \\
  template __global__ void gather_kernel<V, T>(Chunk<V>, const T*, const A*, const A*, T*);                         \\
  template __global__ void scatter_kernel<V, T>(Chunk<V>, int, const T*, const T*, const A*, const A*, A*, A*, A*); \\
  template __global__ void collect_kernel<V, T>(Chunk<V>, Chunk<V>::Index, Chunk<V>::Index, const int64_t*,         \\
                                                const int64_t*, const A*, const A*, const T*, A*);
#define INSTANTIATE_LIST(V, A) \\
  template __global__ void list_kernel<V, A>(Chunk<V>, Chunk<V>::Index, Chunk<V>::Index, const A*, Chunk<V>::Index*);
INSTANTIATE(c10::Half, 8, float)
INSTANTIATE(c10::BFloat16, 8, float)
INSTANTIATE(float, 4, float)
INSTANTIATE(double, 2, double)
INSTANTIATE(c10::Half, 1, float)
INSTANTIATE(double, 1, double)
INSTANTIATE_LIST(8, float)
INSTANTIATE_LIST(2, double)
INSTANTIATE_LIST(1, double)
}
"""
KERNELS = 21


def nvcc(*arguments: str) -> subprocess.CompletedProcess:
    if (compiler := build.nvcc()) is None or not compiler.is_file():
        pytest.skip("no nvcc")
    headers = Path(torch.__file__).parent / "include"
    return subprocess.run([str(compiler), "-std=c++20", "-O3", f"-I{CSRC}", f"-I{headers}", *arguments], capture_output=True, text=True)


def instructions(program: Path) -> dict[str, str]:
    """The machine code of each kernel by its name and vector, as in ``gather8``; those of several types together."""
    if (tool := cuobjdump()) is None:
        pytest.skip("no cuobjdump: neither the CUDA toolkit nor Triton has one here")
    text = subprocess.run([tool, "-sass", str(program)], capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for part in text.split("Function : ")[1:]:
        kernel = re.match(r"\w*?([a-z]+)_kernelILi(\d)E", part)
        assert kernel is not None, part[:200]
        found[kernel[1] + kernel[2]] = found.get(kernel[1] + kernel[2], "") + part
    return found


@pytest.mark.extra
@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_machine_code(architecture, tmp_path):
    """No spilled register, and as few as __launch_bounds__ asks for; 128 bits at once and no division where V > 1."""
    source, program = tmp_path / "probe.cu", tmp_path / "probe.cubin"
    source.write_text(PROBE)
    if (compiler := build.nvcc()) is not None and compiler.is_file() and architecture not in build.architectures():
        pytest.skip(f"this nvcc does not know compute capability {architecture}")
    done = nvcc("-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(program), str(source))
    assert done.returncode == 0, done.stderr
    resources = re.findall(r"properties for \w*?([a-z]+)_kernel.*\n\s*(\d+) bytes stack frame, (\d+) .*\n.*Used (\d+) reg", done.stderr)
    assert len(resources) == KERNELS
    for kernel, stack, spilled, registers in resources:
        assert (stack, spilled) == ("0", "0") and int(registers) <= (80 if kernel == "scatter" else 64), (kernel, stack, registers)

    code = instructions(program)
    assert {"gather1", "gather2", "gather4", "gather8", "scatter8", "collect8", "list8"} <= set(code)
    wide = r"\.(128|256)\b"
    for name, text in code.items():
        if name.endswith("1"):
            continue
        assert "MUFU.RCP" not in text, f"{name} divides"
        kernel = name[:-1]
        if kernel in ("gather", "scatter"):
            assert len(re.findall(rf"LDG\.E\S*{wide}", text)) >= 5, name  # four corners, and the gradient or the next tap
        if kernel in ("gather", "collect", "list"):
            assert re.search(rf"STG\.E\S*{wide}", text), name
        if kernel in ("gather", "collect"):
            assert not re.search(r"(LDG|STG)\.E\S*\.U?(8|16)\b", text), name
    assert ("REDG.E.ADD.F32x4" in code["scatter8"]) == (int(architecture) >= 90)


def test_architectures(monkeypatch, tmp_path):
    """All that this nvcc knows where there is no GPU, and the newest as PTX for those to come; else it is torch that chooses."""
    if problem := build.why_not() or build.why_no_cuda():
        pytest.skip(problem)
    for variable in ("CUDA_HOME", "PATH"):  # which setup_arguments changes
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)

    def flags() -> list[str]:
        (extension,) = build.setup_arguments("mm_modules.DCN._C")["ext_modules"]
        return [flag for flag in extension.extra_compile_args["nvcc"] if "arch" in flag]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    known = build.architectures()
    assert {"80", "86", "89", "90"} <= set(known)
    newest = f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"
    assert flags() == [*(f"-gencode=arch=compute_{number},code=sm_{number}" for number in known), newest]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert flags() == []
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert flags() == []


@pytest.mark.parametrize("variable", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
def test_fast_math_is_refused(variable, monkeypatch):
    if problem := build.why_no_cuda():
        pytest.skip(problem)
    monkeypatch.setenv(variable, "-lineinfo --use_fast_math")
    assert f"{variable} has -use_fast_math" in build.why_no_cuda.__wrapped__()
