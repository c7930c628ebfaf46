# SPDX-License-Identifier: Apache-2.0
"""A run where Unix's own modules and functions are missing, as on Windows; that sources can be pickled is in test_data.py."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from helpers import FAST, ROOT, trainer_environment

PROGRAM = """
import os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("resource", "fcntl"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
for name in ("resource", "fcntl"):
    sys.modules.pop(name, None)
for name in ("setpgrp", "sched_getaffinity", "fork"):
    delattr(os, name)

sys.path[:0] = sys.argv[1:3]
from litv2.errors import run_program
from main import main
sys.exit(run_program(lambda: main(sys.argv[3:])))
"""


@pytest.mark.extra
def test_without_unix(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    flags = ["--cfg", "configs/litv2-digits.yaml", "--workers", "0", "--batch-size", "256", "--output", str(tmp_path)]
    command = [sys.executable, str(program), str(ROOT), str(ROOT / "classification"), *flags, "--opts", *FAST, "TRAIN.EPOCHS", "1"]
    done = subprocess.run(command, cwd=ROOT / "classification", env=trainer_environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "epoch 1/1" in done.stdout and "mem ?" in done.stdout
    left = {path.name for path in (tmp_path / "litv2_digits/default").iterdir()}
    assert left >= {"latest.pth", "best.pth", "metrics.jsonl", "curves.png"}


def test_stop_signals_leave_other_threads_alone():
    """Only the main thread may install handlers: a trainer in another thread runs without them."""
    import signal
    from concurrent.futures import ThreadPoolExecutor

    from litv2.runs.signals import StopSignals

    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(StopSignals).result().received == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failing_worker_is_still_the_users_mistake():
    """Errors reach the main process through a pickle, or as the type with a message: both keep what they are."""
    from data.sources import DataError
    from litv2.errors import UserError

    assert isinstance(pickle.loads(pickle.dumps(DataError("none"))), UserError)
