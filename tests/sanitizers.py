# SPDX-License-Identifier: Apache-2.0
"""The native operators under GCC's AddressSanitizer and UndefinedBehaviorSanitizer: python -m tests.sanitizers [PYTEST ARGUMENT...]

Builds the extensions with the checks into an entry of the cache of their own (the CPU's code alone), and runs the tests of the operators
with the kernels of each instruction set that this processor has. Prints the tests and the reports; ends with 1 if there are any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = "address,undefined,float-cast-overflow"
# Those that compile or start other processes test no more of the operators, and are slow under the checks.
TESTS = ["tests/ops/test_native.py", "tests/ops/test_depthwise.py", "tests/ops/test_wild_maps.py", "tests/ops/test_bfloat16.py"]
TESTS += ["tests/mm_modules/test_deform_conv.py", "tests/mm_modules/test_modules.py"]
LEFT_OUT = "not compiled and not opcheck and not export and not memory"


def main(arguments: list[str]) -> int:
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {**os.environ, "LITV2_SANITIZE": CHECKS, "LITV2_DCN_CUDA": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"LD_PRELOAD": " ".join(libraries), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    build = [sys.executable, "-m", "litv2", "build"]
    subprocess.run(build, cwd=ROOT, env={**environment, "ASAN_OPTIONS": "detect_leaks=0"}, stdout=subprocess.DEVNULL, check=True)
    failed = False
    print(f"{'kernels':10} {'passed':>7} {'failed':>7} {'reports':>8}")
    for kernels in ("baseline", "AVX2", "AVX-512"):
        with tempfile.TemporaryDirectory() as folder:
            checks = dict(
                ASAN_OPTIONS=f"detect_leaks=0:log_path={folder}/report",  # Python frees little at its end
                UBSAN_OPTIONS=f"print_stacktrace=1:log_path={folder}/report",
                LITV2_NATIVE_KERNELS=kernels,
            )
            command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k", LEFT_OUT, *(arguments or TESTS)]
            done = subprocess.run(command, cwd=ROOT, env=environment | checks, capture_output=True, text=True)
            reports = [path.read_text(errors="replace") for path in Path(folder).iterdir()]
        if "has no such kernels" in done.stdout + done.stderr:
            print(f"{kernels:10} this processor does not have them")
            continue
        counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed)", done.stdout)}
        found = sum(len(re.findall(r"runtime error|ERROR: AddressSanitizer", report)) for report in reports)
        print(f"{kernels:10} {counts.get('passed', 0):7} {counts.get('failed', 0):7} {found:8}", flush=True)
        if found or done.returncode:
            failed = True
            print("\n".join(report[:4000] for report in reports), "\n".join(done.stdout.splitlines()[-30:]), done.stderr[-2000:], sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
