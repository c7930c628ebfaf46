# SPDX-License-Identifier: Apache-2.0
"""locks/: what each requirements file leads to, with hashes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import ROOT

FILES = sorted(path.name for path in ROOT.glob("requirements*.txt"))


def pins(path: Path) -> dict[str, str]:
    """Of a requirements file and those that it includes."""
    found = {}
    for line in path.read_text().splitlines():
        if line.startswith("-r "):
            found |= pins(path.parent / line.removeprefix("-r "))
        elif match := re.match(r"([\w.-]+)==([\w.]+)", line):
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2]
    return found


def test_each_file_has_a_lock():
    assert sorted(path.name for path in (ROOT / "locks").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_lock(name):
    """It has the versions of the requirements file, a version and hashes of everything else, and names no server."""
    text = (ROOT / "locks" / name).read_text()
    locked = pins(ROOT / "locks" / name)
    assert pins(ROOT / name).items() <= locked.items() and len(locked) > len(pins(ROOT / name))
    entries = re.split(r"\n(?=\S)", text.strip())
    assert len(entries) == len(locked)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(?: ;[^\\]*)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+", entry) for entry in entries)
