# SPDX-License-Identifier: Apache-2.0
"""The campaign of faults, reduced: each fault once in the cheapest task; killed runs of two processes in the others, and of own data."""

from __future__ import annotations

import json

import pytest

from command_helpers import run
from document_helpers import documented

pytestmark = pytest.mark.extra
DOCUMENT = "docs/reliability.md"


def trials(command, folder, *flags: str) -> list[dict]:
    done = run(command, "--times", "1", "--json", folder / "faults.json", "--folder", folder, *flags, timeout=1800)
    content = json.loads((folder / "faults.json").read_text())
    assert all(f"| {trial['fault']} |" in done.stdout or trial["fault"] == "kill -9" for trial in content["trials"])
    return content["trials"]


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m tests\.faults --times 20 .*"), ids=str)
def test_each_fault_once(command, tmp_path):
    """The statuses say that nothing was lost; a second campaign finds that everything has been done."""
    done = trials(command, tmp_path, "--task", "classification")
    assert len({trial["fault"] for trial in done}) == len(done) >= 14 and not [trial for trial in done if trial["problem"]]
    assert trials(command, tmp_path, "--task", "classification") == done


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m tests\.faults --only \"kill -9\" --task classification .*"), ids=str)
def test_killed_runs_of_two_processes(command, tmp_path):
    pytest.importorskip("mmdet", exc_type=ImportError)
    pytest.importorskip("mmseg", exc_type=ImportError)
    done = trials(command, tmp_path, "--task", "detection", "segmentation", "--processes", "2")
    assert [(trial["task"], trial["processes"], trial["equal"]) for trial in done] == [("detection", 2, True), ("segmentation", 2, True)]
    assert all(trial["events"] >= 1 and trial["lost_steps"] == 0 for trial in done)


@pytest.mark.parametrize("command", documented(DOCUMENT, r"python -m tests\.faults --only \"kill -9\" --task weights .*"), ids=str)
def test_killed_runs_with_settings_for_own_data(command, tmp_path):
    """Of those settings, the one whose evaluation once changed the state of the training."""
    (trial,) = trials(command, tmp_path, "--task", "multi-label")
    assert trial["equal"] and trial["problem"] is None and trial["events"] >= 1
