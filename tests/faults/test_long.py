# SPDX-License-Identifier: Apache-2.0
"""The long runs, shortened."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from document_helpers import documented
from helpers import ROOT
from litv2.ops import native


@pytest.mark.extra
@pytest.mark.skipif(native.problem is not None, reason=f"the native operators: {native.problem}")
@pytest.mark.parametrize("command", documented("docs/reliability.md", r"python -m tests\.faults\.long"), ids=str)
def test_long_runs(command, tmp_path):
    """A leak of one map of a few KiB in each pass would be more than what is allowed."""
    names = ["classification", "native form, float32"]
    flags = ["--steps", "360", "--passes", "4000", "--json", str(tmp_path / "rows.json"), "--only", *names]
    subprocess.run([sys.executable, *command.words[1:], *flags], cwd=ROOT, check=True)  # alone: other tests leave their memory behind
    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert row["last_mib"] - row["first_mib"] < 15 and row["last_files"] <= row["first_files"] + 4, row
