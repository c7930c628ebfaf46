"""The benchmark commands run and compare what they say they compare."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers import ROOT

COMMANDS = {
    "layout.py": "--batch-size 1 --img-size 64 --rounds 1",
    "deform_conv.py": "--batch-size 1 --rounds 1",
    "runtimes.py": "--batch-sizes 1 --img-size 64 --rounds 1 --only DeformConv",
}


@pytest.mark.parametrize(
    "script", [pytest.param(script, marks=pytest.mark.extra if script == "runtimes.py" else ()) for script in COMMANDS]
)
def test_runs(script):
    command = [sys.executable, f"benchmarks/{script}", *COMMANDS[script].split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert ("times eager" if script == "runtimes.py" else "times as fast") in done.stdout


@pytest.mark.extra
@pytest.mark.parametrize(
    "task, config", [("detection", "retinanet_litv2_s_fpn_1x_coco"), ("segmentation", "litv2_s_fpn_r50_512x512_80k_ade20k")]
)
def test_detectors_and_segmenters(task, config):
    flags = f"configs/litv2/{config}.py --synthetic --shape 64 96 --rounds 1".split()
    done = subprocess.run([sys.executable, "tools/benchmark.py", *flags], cwd=ROOT / task, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f"| {row} | " in done.stdout for row in ("image to result", "backbone", "peak memory, MiB"))


def test_every_benchmark_is_run():
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*COMMANDS, "harness.py", "dense.py"}
