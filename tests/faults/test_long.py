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
    """Open files stay few. Memory is for the long run itself: a short one measures how it warms up."""
    names = ["native form, float32"]
    flags = ["--passes", "4000", "--json", str(tmp_path / "rows.json"), "--only", *names]
    subprocess.run([sys.executable, *command.words[1:], *flags], cwd=ROOT, check=True)  # alone: other tests leave their memory behind
    for row in json.loads((tmp_path / "rows.json").read_text()):
        assert row["count"] == 4000 and row["last_mib"] > 0 and row["last_files"] <= row["first_files"] + 4, row
