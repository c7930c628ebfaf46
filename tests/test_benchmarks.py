"""The benchmark commands run and compare what they say they compare."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers import ROOT

COMMANDS = {
    "layout.py": "--batch-size 1 --img-size 64 --rounds 1",
    "deform_conv.py": "--batch-size 1 --rounds 1",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_runs(script):
    command = [sys.executable, f"benchmarks/{script}", *COMMANDS[script].split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "times as fast" in done.stdout


def test_every_benchmark_is_run():
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == {*COMMANDS, "harness.py"}
