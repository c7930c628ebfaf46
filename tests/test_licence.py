# SPDX-License-Identifier: Apache-2.0
"""Each source file names its licence, by its SPDX identifier (https://spdx.dev), which tools look for."""

from __future__ import annotations

import pytest

from document_helpers import project_files
from helpers import ROOT

MARKS = {".py": "#", ".sh": "#", ".cpp": "//", ".h": "//", ".inl": "//", ".cu": "//", ".cuh": "//", ".js": "//"}


@pytest.mark.parametrize("suffix", MARKS)
def test_identifier(suffix):
    files = [ROOT / name for name in project_files(f"*{suffix}")]
    line = f"{MARKS[suffix]} SPDX-License-Identifier: Apache-2.0"
    assert files and not [path for path in files if (text := path.read_text()) and line not in text.splitlines()[:2]]
