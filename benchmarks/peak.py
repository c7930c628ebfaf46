# SPDX-License-Identifier: Apache-2.0
"""The rate that the processor's own multiply-add instructions can reach, as what the models' speed is a share of.

A library's matrix product is no such measure: one that is slow on a processor makes every model look good there. The loops are in
peak.cpp; the system's C++ compiler (CXX, else c++) compiles them.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.cpp")
SECONDS = 0.1  # of one run


class NoPeak(Exception):
    """The peak cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Peak:
    instruction: str
    multiply_adds: float  # of a run
    run: Callable[[], object]


def peak(dtype: str, threads: int) -> Peak:
    """The fastest of the processor's instructions for a dtype; of one without any for bfloat16 those for float32, in which it computes.

    Raises:
        NoPeak: there is no compiler, or no loop for this dtype or processor.
    """
    library = _library()
    if dtype == "bfloat16" and not library.loop_name(b"bfloat16", 0):
        dtype = "float32"
    loops = {}
    while name := library.loop_name(dtype.encode(), len(loops)):
        loops[name.decode()] = partial(library.multiply_adds, dtype.encode(), len(loops), threads)
    if not loops:
        raise NoPeak(f"peak.cpp has no loop of {dtype} instructions that this processor has")
    peaks = [_measured(name, loop) for name, loop in loops.items()]
    return max(peaks, key=lambda peak: peak.multiply_adds)


def _measured(name: str, loop: Callable[[int], float]) -> Peak:
    """A loop of as many iterations as take about SECONDS."""

    def seconds() -> float:
        start = time.perf_counter()
        loop(iterations)
        return time.perf_counter() - start

    iterations = 1000
    while seconds() < SECONDS / 5:
        iterations *= 2
    iterations = max(1, round(iterations * SECONDS / min(seconds() for _ in range(3))))
    run = partial(loop, iterations)
    return Peak(name, run(), run)


@cache
def _library() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if not compiler or shutil.which(compiler[0]) is None:
        raise NoPeak(f"there is no C++ compiler {' '.join(compiler)} for peak.cpp")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "peak.so"
        command = [*compiler, "-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", str(SOURCE), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise NoPeak(f"{compiler[0]} does not compile peak.cpp: {(done.stderr.splitlines() or ['no message'])[0]}")
        library = ctypes.CDLL(str(path))
    library.loop_name.argtypes, library.loop_name.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_char_p
    library.multiply_adds.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    library.multiply_adds.restype = ctypes.c_double
    return library
